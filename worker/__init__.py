"""The service: takes cancels in from Redis, and sees each through to a known outcome.

Started as ``celery -A worker.app worker`` in a clone or the image; producers use ``kalshi_cancel``.
"""
