"""The JSON Schema files say what the service accepts and answers: they are current, and agree with it."""

from __future__ import annotations

import json
import re
import uuid
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend

from kalshi_cancel.model import schemas
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.requests import CancelRequest
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem
from kalshi_cancel.model.scope import Scope
from trials.stack import ROOT, wait_until

FOLDER = ROOT / "docs" / "schemas"
PATIENCE_S = 30.0


def pattern(_validator, expected, instance, _schema):
    """As ECMA 262 means it: `$` is the end, and not also before a last line break."""
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", expected), instance):
        yield ValidationError(f"{instance!r} does not match {expected!r}")


FORMATS = FormatChecker(())


@FORMATS.checks("date-time", raises=ValueError)
def is_moment(value):
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


def validator(name):
    """Of the file as it is committed."""
    kind = extend(Draft202012Validator, {"pattern": pattern})
    return kind(json.loads((FOLDER / f"{name}.json").read_text()), format_checker=FORMATS)


CANCEL, CANCELS, MASS, RESULT, REPORT, PROGRESS = map(
    validator, ("cancel_order", "cancel_orders", "mass_cancel", "result", "mass_report", "mass_progress")
)


def is_accepted(parse, message):
    try:
        parse(message)
    except BadRequest:
        return False
    return True


# -- the files


def test_the_committed_files_are_what_the_code_says():
    expected = {f"{name}.json": schemas.text_of(schema) for name, schema in schemas.schemas().items()}
    found = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert found == expected, "run: python -m kalshi_cancel.model.schemas docs/schemas"


def test_the_command_writes_the_files(tmp_path):
    schemas.main(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", schemas.schemas())
def test_each_file_is_a_valid_schema_that_needs_no_other_file(name):
    text = (FOLDER / f"{name}.json").read_text()
    Draft202012Validator.check_schema(json.loads(text))
    assert {ref for ref in re.findall(r'"\$ref": "([^"]+)"', text) if not ref.startswith("#/$defs/")} == set()


# -- messages: what is valid is accepted, what is not is refused

# (Neither 1.0 for 1, nor the rarer characters that cannot be printed: the schema's first lines say so.)
TEXTS = st.text(
    st.characters(categories=["L", "N", "P", "S", "M"]) | st.sampled_from(" \n\t\x00\x7f\xa0\u2028\u200b")
)
LONG = st.integers(195, 520).map(lambda length: "x" * length)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False).filter(lambda number: not number.is_integer()),
    TEXTS,
    LONG,
    st.lists(TEXTS, max_size=2),
    st.dictionaries(TEXTS, st.integers(), max_size=1),
)
IDS = st.from_regex(r"[A-Za-z0-9_-]{1,129}\n?", fullmatch=True)
SMALL = st.integers(-2, 3) | st.sampled_from([1_000_000, 1_000_001])
SECONDS = st.floats(0.01, 3600.5).filter(lambda number: not number.is_integer()) | st.integers(-1, 3601)
GOOD = {
    "order_id": IDS,
    "market_ticker": st.from_regex(r"[A-Za-z0-9_.:-]{1,129}\n?", fullmatch=True),
    "exchange_index": SMALL,
    "subaccount": SMALL,
    "requested_by": TEXTS,
    "reason": TEXTS,
    "deadline_s": SECONDS,
    "request_id": IDS,
}


def messages(good, *, always=()):
    """Objects with some of the fields; mostly with values that may well be meant, some with anything."""
    fields = {name: values | st.none() for name, values in good.items()}
    sane = st.fixed_dictionaries(
        {name: good[name] for name in always}, optional={k: v for k, v in fields.items() if k not in always}
    )
    odd = st.dictionaries(st.sampled_from([*good, "unknown", ""]), ODD, max_size=2)
    return st.one_of(sane, st.builds(lambda first, more: {**first, **more}, sane, odd), ODD)


@settings(max_examples=500, deadline=None)
@given(messages(GOOD, always=["order_id"]))
def test_a_cancel_is_valid_exactly_when_it_is_accepted(message):
    assert CANCEL.is_valid(message) == is_accepted(CancelRequest.parse, message)


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS | messages(GOOD, always=["order_id"]), max_size=3))
def test_a_list_of_cancels_is_valid_exactly_when_each_is_accepted(orders):
    each = [{"order_id": order} if isinstance(order, str) else order for order in orders]
    accepted = all(is_accepted(CancelRequest.parse, order) for order in each)
    assert CANCELS.is_valid({"orders": orders}) == accepted


@pytest.mark.parametrize(
    "message", [{}, {"orders": "a"}, {"orders": [], "queue": "risk"}, {"order_id": "a"}, []]
)
def test_what_is_no_list_of_cancels_is_not_valid(message):
    assert not CANCELS.is_valid(message)


OFFSETS = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = (
    st.datetimes(datetime(1901, 1, 1), datetime(2098, 1, 1), timezones=OFFSETS).map(datetime.isoformat)  # noqa: DTZ001 - hypothesis adds the zones
    | st.integers(0, 2_000_000_000)
    | st.sampled_from(
        ["2026-11-22T10:00:00Z", "2026-13-22T10:00:00Z", "2026-11-22T10:00:00", "2026-11-22", "now"]
    )
)
PRICES = st.sampled_from(["0", "0.05", "1", "1.00", "1.01", "-0.1", "", "half", 0, 1, 0.5, 1.5, -0.5, "NaN"])
SCOPE_TEXTS = TEXTS | LONG
FILTERS = {
    "everything": st.booleans(),
    "order_ids": st.lists(IDS, max_size=3),
    "subaccount": SMALL,
    "tickers": SCOPE_TEXTS | st.lists(SCOPE_TEXTS, max_size=2),
    "event_tickers": SCOPE_TEXTS | st.lists(SCOPE_TEXTS, max_size=2),
    "series": SCOPE_TEXTS,
    "ticker_prefix": SCOPE_TEXTS,
    "side": st.sampled_from(["yes", "no", "bid", "ask", "buy"]),
    "client_order_id_prefix": SCOPE_TEXTS,
    "order_group_id": SCOPE_TEXTS,
    "exchange_index": SMALL,
    "created_after": MOMENTS,
    "created_before": MOMENTS,
    "min_price": PRICES,
    "max_price": PRICES,
}
SCOPE = Draft202012Validator.evolve(MASS, schema={**MASS.schema["$defs"]["scope"]})


def may_contradict_itself(scope):
    """Whether a scope has filters that may leave no order: no schema says that."""
    if not isinstance(scope, dict):
        return False
    given = {name for name, value in scope.items() if value is not None}
    kinds = (
        {"created_after", "created_before"},
        {"tickers", "event_tickers", "series", "ticker_prefix"},
    )
    return any(len(given & kind) > 1 for kind in kinds) or bool(given & {"min_price", "max_price"})


def in_other_forms(scope):
    """Whether a scope has a time or a price that is accepted in more forms than the schema shows."""
    forms = {"created_after", "created_before", "min_price", "max_price"}
    return isinstance(scope, dict) and any(scope.get(name) is not None for name in forms)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.dictionaries(st.sampled_from([*FILTERS]), st.none(), max_size=2), messages(FILTERS)))
def test_a_scope_that_is_valid_is_accepted_and_one_that_is_not_is_refused(scope):
    valid, accepted = SCOPE.is_valid(scope), is_accepted(Scope.parse, scope)
    assert accepted or not valid or may_contradict_itself(scope)
    if not in_other_forms(scope):
        assert valid or not accepted


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_alone_is_a_scope(name):
    value = {"everything": True, "order_ids": ["a"], "side": "yes", "min_price": "0.05", "max_price": 1}.get(
        name
    )
    value = value or (3 if name in {"subaccount", "exchange_index"} else "2026-11-22T10:00:00Z")
    assert SCOPE.is_valid({name: value})
    assert is_accepted(Scope.parse, {name: value})


MASS_FIELDS = {
    "request_id": IDS,
    "scope": st.sampled_from([{"everything": True}, {}, {"side": "yes"}, {"everything": True, "side": "no"}]),
    "requested_by": TEXTS,
    "reason": TEXTS,
    "automated": st.booleans(),
    "dry_run": st.booleans(),
    "deadline_s": SECONDS,
    "traceparent": st.sampled_from([f"00-{'a' * 32}-{'b' * 16}-01", f"00-{'0' * 32}-{'b' * 16}-01", ""]),
}


@settings(max_examples=500, deadline=None)
@given(messages(MASS_FIELDS, always=["scope"]).filter(lambda message: isinstance(message, dict)))
def test_a_mass_cancel_is_valid_exactly_when_it_is_accepted(message):
    assert MASS.is_valid(message) == is_accepted(MassRequest.parse, message)


# -- values


COUNTS = (
    st.none()
    | st.decimals(0, 10**12, places=2)
    | st.decimals(0, 100, places=5)
    | st.integers(0, 9).map(Decimal)
)
WORDS = st.none() | st.text()
RESULTS = st.builds(
    CancelResult,
    order_id=WORDS,
    outcome=st.sampled_from(Outcome),
    status=st.sampled_from([None, OrderStatus.CANCELED, OrderStatus.EXECUTED]),
    reduced_by=COUNTS,
    fill_count=COUNTS,
    remaining_count=COUNTS,
    confirmed_by=st.sampled_from([None, *ConfirmedBy]),
    attempts=st.integers(0, 99),
    requested_at=st.sampled_from([None, "2026-11-22T10:00:00.000Z"]),
    settled_at=st.sampled_from([None, "2026-11-22T10:00:00.000Z"]),
    exchange_ts_ms=st.none() | st.integers(0),
    requested_by=st.lists(st.text(), max_size=2).map(tuple),
    error=st.none() | st.builds(Problem, st.text(), st.text(), st.none() | st.integers(100, 599)),
    order=st.none() | st.dictionaries(st.text(), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(RESULTS)
def test_every_result_that_can_be_written_is_valid(result):
    RESULT.validate(result.to_json())


@settings(max_examples=200, deadline=None)
@given(RESULTS, st.data())
def test_a_result_that_lacks_a_field_or_has_another_outcome_is_not_valid(result, data):
    value = result.to_json()
    del value[data.draw(st.sampled_from(sorted(value)))]
    assert not RESULT.is_valid(value)
    assert not RESULT.is_valid({**result.to_json(), "outcome": "gone"})


def test_the_values_of_a_running_service_are_valid_and_have_no_field_that_the_schemas_do_not_name(
    control, client, celery_producer
):
    ids = [str(uuid.uuid4()) for _ in range(4)]
    canceled, executed, fractional, paused = ids
    control.place(canceled)
    control.place(executed, status="executed")
    control.place(fractional, count="2.7512")
    values = [client.cancel(each).result(PATIENCE_S).to_json() for each in (canceled, executed, fractional)]
    values.append(client.cancel(str(uuid.uuid4())).result(PATIENCE_S).to_json())
    sent = celery_producer.send_task("cancel_order", kwargs={"order_id": "?"}, queue="cancels")
    values.append(sent.get(timeout=PATIENCE_S))
    control.place(paused)
    control.configure(exchange_paused=True)
    values.append(client.cancel(paused, deadline_s=0.2).result(PATIENCE_S).to_json())
    control.configure(exchange_paused=False)
    assert {value["outcome"] for value in values} == {outcome.value for outcome in Outcome}
    for value in values:
        RESULT.validate(value)
        assert set(value) == set(RESULT.schema["properties"])
    wait_until(lambda: client.status(paused).open is None, what="the paused one is settled")


def test_the_reports_and_the_progress_of_a_mass_cancel_are_valid(control, client, celery_producer):
    for number in range(3):
        control.place(client_order_id=f"schema-{number}", exchange_index=number)
    scope = {"client_order_id_prefix": "schema-", "order_ids": None}
    planned = client.mass_cancel({"client_order_id_prefix": "schema-"}, dry_run=True).result(PATIENCE_S)
    message = {"scope": scope, "requested_by": "risk", "deadline_s": 30}
    MASS.validate(message)
    sent = celery_producer.send_task("mass_cancel", kwargs=message, queue="risk")
    done = sent.get(timeout=PATIENCE_S)
    assert (done["flat"], done["orders_affected"]) == (True, 3)
    unknown = client.mass_cancel({"order_ids": [str(uuid.uuid4())]}).result(PATIENCE_S)
    assert unknown["not_affected"]
    for report in (planned, done, unknown):
        REPORT.validate(report)
        assert set(report) == set(REPORT.schema["anyOf"][0]["properties"])
        assert set(report["plan"]) == set(REPORT.schema["anyOf"][0]["properties"]["plan"]["properties"])
    refused = celery_producer.send_task("mass_cancel", kwargs={"scope": {}}, queue="risk").get(PATIENCE_S)
    REPORT.validate(refused)
    assert not MASS.is_valid({"scope": {}})
    progress = client._mass_cancels.progress(done["request_id"])
    PROGRESS.validate(progress)
    assert set(progress) == set(PROGRESS.schema["properties"])
