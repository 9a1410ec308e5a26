"""Kalshi order cancellation: requests in from a Redis queue, known outcomes out.

Producers use :class:`worker.client.CancelClient`; workers run ``celery -A worker.app worker``.
"""
