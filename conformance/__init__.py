"""Holds the sandbox against the forms that the exchange documents for its answers.

answers    those forms in short, for the ordinary suite: no document, no network
watching   has a sandbox's own answers noted
"""
