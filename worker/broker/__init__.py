"""Celery's edge: what comes off the queues is checked and entered here."""
