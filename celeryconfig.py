"""Queue policy: how Celery is set up for work whose truth lives in the store, every value with its reason.

Celery on Redis loses about one message per killed worker, and redelivers late. So our own messages only wake
workers up (kalshi_cancel/store/cancels.py), and all others are taken in one step (worker/broker/channel.py).
"""

import sys

from kombu.entity import Exchange, Queue

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.redis import RedisSettings, refuse_celery_overrides
from kalshi_cancel.settings.worker import WorkerSettings
from kalshi_cancel.store.scripts import CONNECT_TIMEOUT_S, SOCKET_TIMEOUT_S, celery_options
from worker.broker.channel import use_lossless_transport

try:
    refuse_celery_overrides()
    _redis = RedisSettings.from_env()
except SettingsError as _problem:
    try:
        WorkerSettings.from_env()  # to tell everything that is wrong at once, not only what is about Redis
    except SettingsError as _all:
        _problem = _all
    sys.exit(f"cannot start: {_problem}")

# -- where ------------------------------------------------------------------------------------------------
broker_url = _redis.celery_url
use_lossless_transport()  # Celery's own loses messages, and ends over one that it cannot open
result_backend = _redis.celery_url
result_backend_transport_options = celery_options(_redis)
imports = ("worker.tasks",)

# -- what is accepted ---------------------------------------------------------------------------------------
task_serializer = result_serializer = "json"
accept_content = result_accept_content = ["json"]  # pickle would run what a stranger sends
enable_utc = True

# -- queues: risk first -------------------------------------------------------------------------------------
# Exchange and routing key as any Celery producer makes them up for `queue=`: one of each per queue.
task_queues = [Queue(lane.queue, Exchange(lane.queue), routing_key=lane.queue) for lane in Lane]
task_default_queue = Lane.STRATEGY.queue
task_create_missing_queues = True  # `-Q` may name a queue of somebody else's
# Default priority steps stay: a raw producer's `priority=` must not end in a list nobody reads.
broker_transport_options = {
    **celery_options(_redis),
    "queue_order_strategy": "priority",  # queues in the order above, always; the default rotates them
    "store_prefix": _redis.key_prefix,  # where the messages are noted that workers have taken
    "unacked_restore_interval": 1,  # how often their leases are extended, and what has none is put back
    "socket_timeout": SOCKET_TIMEOUT_S,  # as everywhere: longer silence is an outage
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_keepalive": True,
    "health_check_interval": 1,  # finds a half-open connection in 2 to 3 s instead of ~50
}

# -- workers ------------------------------------------------------------------------------------------------
worker_consumer = "worker.runtime.consumer:CancelConsumer"
worker_pool = (
    "threads"  # one key, one connection pool, least memory; leases and HTTP deadlines bound the work
)
# Senders, most of which wait for answers: at 20 ms each, 450 single calls a second take ten.
worker_concurrency = 16
worker_prefetch_multiplier = 1  # more would hide urgent messages behind waiting ones
task_acks_late = True  # a raw message is ours only once its order is in the store
worker_cancel_long_running_tasks_on_connection_loss = False  # the store decides who works on what
worker_enable_remote_control = False  # it can shut workers down; who may write to Redis should not
worker_send_task_events = False  # a fifth of the throughput
task_track_started = False
# Celery logs what a task returns: of a refused message, what a stranger wrote, line breaks and all.
task_annotations = {"*": {"resultrepr_maxsize": 0}}
worker_hijack_root_logger = True
worker_redirect_stdouts = False

# -- when Redis is away -------------------------------------------------------------------------------------
broker_connection_retry_on_startup = False  # refuse to start without Redis, in one line
broker_connection_max_retries = None  # later: for ever; the default gives up after 100
task_publish_retry = False  # a lost wake-up must not keep a sender: the sweeper sends another
broker_channel_error_retry = True  # NOREPLICAS, READONLY and OOM would end the worker
redis_socket_timeout = 5  # the defaults wait two minutes for a host that is gone
redis_socket_connect_timeout = 1
result_backend_always_retry = True  # a result that cannot be stored is stored later, not dropped
result_backend_max_retries = 1000
result_backend_base_sleep_between_retries_ms = 50
result_backend_max_sleep_between_retries_ms = 500
result_expires = _redis.result_expires_s
