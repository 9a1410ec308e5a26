"""Redis, and nothing else is in here: every key and every script."""
