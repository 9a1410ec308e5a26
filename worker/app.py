"""The Celery application: ``celery -A worker.app worker``."""

from celery import Celery

from worker import lifecycle

app = Celery("worker")
app.config_from_object("celeryconfig")
lifecycle.attach(app)
