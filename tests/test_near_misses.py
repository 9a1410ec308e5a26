"""Which known name a mistyped one was meant for, and which names are others' own."""

from __future__ import annotations

import pytest

from kalshi_cancel.settings.foreign import foreign_variables
from kalshi_cancel.settings.near_misses import nearest
from kalshi_cancel.settings.reader import SettingsError
from kalshi_cancel.settings.redis import RedisSettings

QUEUES = ("risk", "cancels")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[(name, "cancels") for name in ("cancel", "cancles", "CANCELS", "cancels1", "cancells", " cancels")],
        *[(name, "risk") for name in ("risks", "rsk", "Risk", "riks", "risk_", "-risk")],
        *[
            (name, None)
            for name in ("cancels", "risk", "risk-eu", "desk.risk", "cancels:2", "orders", "", "celery")
        ],
    ],
)
def test_a_queue_is_told_from_a_mistyped_one(name, meant):
    assert nearest(name, QUEUES) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("KALSHI_CANCEL_DEADLINE", "KALSHI_CANCEL_DEADLINE_S"),
        ("KALSHI_CANCEL_DEADLINE_SECONDS", "KALSHI_CANCEL_DEADLINE_S"),
        ("KALSHI_AUDIT_MAX_AGE", "KALSHI_AUDIT_MAX_AGE_S"),
        ("KALSHI_PRIVATE_KEY_PASPHRASE", "KALSHI_PRIVATE_KEY_PASSPHRASE"),
        ("KALSHI_API_KEY", "KALSHI_API_KEY_ID"),
        ("KALSHI_BASEURL", "KALSHI_BASE_URL"),
        ("KALSHI__BASE_URL", "KALSHI_BASE_URL"),
        ("KALSHI_HTTPS_PROXY", "KALSHI_HTTP_PROXY"),
        ("kalshi_base_url", "KALSHI_BASE_URL"),
        ("KALSI_BASE_URL", "KALSHI_BASE_URL"),
        ("KALSHI_REDIS_URL", "REDIS_URL"),
        ("KALSHI_REDIS_URI", "REDIS_URL"),
        ("KALSHI_DEMO_API_KEY_ID", None),  # another tool's, or for another account
        ("KALSHI_API_KEY_ID_PROD", None),
        ("KALSHI_PRIVATE_KEY_FILE", None),  # of deploy/compose.yaml
        ("KALSHI_STRATEGY", None),
    ],
)
def test_a_variable_is_told_from_a_mistyped_one(name, meant):
    assert foreign_variables({name: "x", "HOME": "/", "KALSHI_AUDIT": "on"}) == {name: meant}


def test_what_is_not_set_or_has_nothing_to_do_with_us_is_no_near_miss():
    others = {"BASE_URL": "x", "CASHIER_BASE_URL": "x", "KALSHI_BASEURL": " "}
    assert foreign_variables(others) == {}


def test_a_producer_is_refused_what_is_nearly_its_own_and_not_what_is_nearly_a_workers():
    redis = {"REDIS_URL": "redis://localhost/0"}
    assert RedisSettings.from_env({**redis, "KALSHI_API_KEY": "its own"})
    with pytest.raises(
        SettingsError, match=r"^KALSHI_KEYPREFIX is no setting: did you mean KALSHI_KEY_PREFIX"
    ):
        RedisSettings.from_env({**redis, "KALSHI_KEYPREFIX": "mine", "KALSHI_API_KEY": "its own"})
