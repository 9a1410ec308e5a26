"""Kalshi, and nothing else is in here: its protocol, signatures, HTTP and clock."""
