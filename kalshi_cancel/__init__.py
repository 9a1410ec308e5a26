"""Cancels Kalshi orders through a service that sees each one through to a known outcome.

    from kalshi_cancel import CancelClient

    with closing(CancelClient.from_env()) as client:
        print(client.cancel("3f2c...", requested_by="mm-btc").result(timeout=10).outcome)

These names are the public face; each is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalshi_cancel.client import CancelClient, Lost, NotSettled
    from kalshi_cancel.model.fields import BadRequest
    from kalshi_cancel.model.requests import Lane
    from kalshi_cancel.model.results import CancelResult, Outcome
    from kalshi_cancel.settings.reader import SettingsError
    from kalshi_cancel.store.scripts import StoreError

__all__ = [
    "BadRequest",
    "CancelClient",
    "CancelResult",
    "Lane",
    "Lost",
    "NotSettled",
    "Outcome",
    "SettingsError",
    "StoreError",
]

_MODULES = {
    "BadRequest": "model.fields",
    "StoreError": "store.scripts",
    "CancelClient": "client",
    "CancelResult": "model.results",
    "Lane": "model.requests",
    "Lost": "client",
    "NotSettled": "client",
    "Outcome": "model.results",
    "SettingsError": "settings.reader",
}


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use: ``import kalshi_cancel.sandbox`` needs no Celery."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
