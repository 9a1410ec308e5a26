"""The Celery application: ``celery -A worker.app worker``."""

from celery import Celery

from worker.consumer import Beat, Sweep

app = Celery("worker")
app.config_from_object("celeryconfig")
app.steps["consumer"].update((Sweep, Beat))
