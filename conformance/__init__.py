"""`make conformance`: checks the sandbox's answers, and those that tests make up, by the exchange's document.

answers    the forms of all answers in short: what the ordinary suite checks, without document or network
watching   has a sandbox's own answers noted
recording  a plugin of pytest: notes the sandbox's answers in tests, and those that tests make up
notes      what is noted of an answer
document   the exchange's OpenAPI document: does a body conform?
clients    two clients that others wrote, unmodified, at every endpoint of the sandbox
judging    which notes conform, and which do not
left_out   what does not conform on purpose
report     bench/results/conformance.md

`python -m conformance` puts them together. It runs under Python 3.12+ with
requirements-conformance.lock; `answers`, `watching`, `notes` and `recording` run with the tests.
"""
