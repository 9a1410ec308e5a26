"""The fault campaign: real processes, every kind of fault, and what became of each cancel that was accepted.

    python -m trials.campaign --seeds 10 --cancels 500 --write bench/results/faults.md   (or: make faults)
    python -m trials.campaign --only redis-restart --seed 7 --cancels 500            (one run again)

For every kind of fault and every seed, several producers ask for cancels while the fault plays; afterwards
every accepted cancel must settle, and its record must say what the exchange's own books say. Who does what:

plan       which orders there are, who asks for which of them when, who meddles: drawn from the seed
kinds      the table of faults; mass_plays: those around a mass cancel
scene      what a fault can reach; relay: a way to Redis that can be cut
run        plays one: producers ask and wait, the fault plays, everything is observed
judge      holds what was promised against what the exchange knows; sweeps: the same for mass cancels
report     the findings as a table, and the document around it
"""
