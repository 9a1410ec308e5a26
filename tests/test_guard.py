"""The door of the queues: what of an item reaches Celery, and what a sender may not say."""

from __future__ import annotations

import base64
import json
import uuid

import pytest
from envelopes import BAD_ENVELOPES, NO_MESSAGES, envelope
from hypothesis import given
from hypothesis import strategies as st

from worker.broker.guard import ETA_MOST_S, RESERVED_IDS, UNREADABLE, checked, plain_call
from worker.broker.links import LINKS_HEADER

ORDER = {"order_id": "an-order"}


def as_bytes(message):
    return json.dumps({name: value for name, value in message.items() if value is not None}).encode()


def opened(item):
    """The envelope that Celery gets, and the call in it."""
    made = json.loads(item)
    return made, json.loads(base64.b64decode(made["body"]))


def is_wrapped(item, original):
    """Whether the consumer gets the item as it was, to be kept."""
    made = json.loads(item)
    return made["content-type"] == UNREADABLE and base64.b64decode(made["body"]) == original


# -- what Celery cannot open


@pytest.mark.parametrize("item", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_wrapped_up_whole(item):
    assert is_wrapped(checked(item, "cancels"), item)
    assert plain_call(item, "cancels") is None


@pytest.mark.parametrize("message", BAD_ENVELOPES.values(), ids=BAD_ENVELOPES)
def test_an_envelope_that_cannot_be_used_is_wrapped_up_whole_and_says_why(message):
    item = as_bytes(message)
    wrapped = checked(item, "risk")
    assert is_wrapped(wrapped, item)
    made = json.loads(wrapped)
    assert made["headers"]["why"].isprintable()
    assert made["properties"]["delivery_info"]["routing_key"] == "risk"


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_item_whatever_it_is_raises(item):
    assert is_wrapped(checked(item, "cancels"), item)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("task", "id", "eta", "expires", "retries", "timelimit", "shadow", "lang", "callbacks", "self")


@given(
    headers=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    properties=st.dictionaries(
        st.sampled_from(("delivery_info", "delivery_tag", "body_encoding")), JSON, max_size=2
    ),
    call=JSON | st.tuples(st.lists(JSON, max_size=2), st.dictionaries(st.text(max_size=5), JSON), JSON),
)
def test_of_any_envelope_what_passes_has_all_that_celery_needs(headers, properties, call):
    item = as_bytes(envelope(call, headers=headers, properties=properties))
    made = json.loads(checked(item, "cancels"))
    assert isinstance(made["properties"]["delivery_tag"], str)
    assert made["properties"]["delivery_info"]["routing_key"] == "cancels"
    if made["content-type"] != UNREADABLE:
        assert isinstance(made["headers"]["task"], str)
        assert isinstance(made["headers"]["id"], str)
        assert not made["headers"]["id"].startswith(RESERVED_IDS)


def test_whoever_waits_for_an_unusable_item_is_found_by_its_task_id():
    task_id = str(uuid.uuid4())
    wrapped = checked(as_bytes(envelope(body=b"no JSON", headers={"id": task_id})), "cancels")
    assert json.loads(wrapped)["headers"]["id"] == task_id


@pytest.mark.parametrize("reserved", RESERVED_IDS)
def test_an_unusable_item_fails_nobody_elses_result(reserved):
    wrapped = checked(as_bytes(envelope(body=b"no JSON", headers={"id": f"{reserved}x"})), "cancels")
    assert "id" not in json.loads(wrapped)["headers"]


# -- what Celery gets


def test_a_usable_message_passes_unchanged():
    item = as_bytes(envelope([[], ORDER, {}]))
    assert checked(item, "cancels") is item


@pytest.mark.parametrize("reserved", RESERVED_IDS)
def test_a_message_may_not_say_that_its_result_is_anothers(reserved):
    made, _ = opened(checked(as_bytes(envelope(headers={"id": f"{reserved}an-order"})), "cancels"))
    assert uuid.UUID(made["headers"]["id"])


def test_the_queue_is_the_one_that_it_was_taken_from():
    sent = envelope(properties={"delivery_info": {"exchange": "elsewhere", "routing_key": "risk"}})
    made, _ = opened(checked(as_bytes(sent), "cancels"))
    assert made["properties"]["delivery_info"] == {"exchange": "", "routing_key": "cancels"}


def test_what_is_to_run_afterwards_is_taken_out_and_told():
    then = {"task": "x", "args": [], "kwargs": {}, "options": {}}
    made, call = opened(checked(as_bytes(envelope([[], ORDER, {"callbacks": [then]}])), "cancels"))
    assert made["headers"][LINKS_HEADER]
    assert not call[2].get("callbacks")


def test_nobody_can_say_that_something_was_taken_out():
    made, _ = opened(checked(as_bytes(envelope(headers={LINKS_HEADER: {"chain": ["x"]}})), "cancels"))
    assert LINKS_HEADER not in made["headers"]


def test_a_field_named_self_reaches_the_task_under_another_name():
    _, call = opened(checked(as_bytes(envelope([[], {"self": 1, **ORDER}, {}])), "cancels"))
    assert call[1] == {"self (field)": 1, **ORDER}


# -- what the intake may take without Celery


def test_a_plain_call_has_what_the_message_asks_for():
    call = plain_call(as_bytes(envelope([["an-order"], {"reason": "x"}, {}], headers={"id": "i"})), "cancels")
    assert (call.task, call.task_id, call.args, call.kwargs) == (
        "cancel_order",
        "i",
        ["an-order"],
        {"reason": "x"},
    )


@pytest.mark.parametrize(
    "message",
    [
        envelope(headers={"eta": "2020-01-01T00:00:00"}),
        envelope(headers={"expires": "2020-01-01T00:00:00"}),
        envelope([[], ORDER, {"chain": [{"task": "x", "args": [], "kwargs": {}}]}]),
    ],
    ids=["a time", "an end", "a chain"],
)
def test_what_only_celery_can_do_is_left_to_it(message):
    assert plain_call(as_bytes(message), "cancels") is None


def test_a_message_may_be_held_back_for_less_than_its_second_delivery():
    late = envelope(headers={"eta": "9999-01-01T00:00:00+00:00"})
    item = as_bytes(late)
    assert is_wrapped(checked(item, "cancels"), item)
    assert f"{ETA_MOST_S:g} s" in json.loads(checked(item, "cancels"))["headers"]["why"]
