"""The Celery application: ``celery -A worker.app worker``."""

from celery import Celery

from worker.consumer import Sweep

app = Celery("worker")
app.config_from_object("celeryconfig")
app.steps["consumer"].add(Sweep)
