"""Who may sign, with what, and when."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from signed import Client, pem_of

from kalshi_cancel.sandbox.control import ControlError

PATH = "/portfolio/orders"
FULL_PATH = "/trade-api/v2/portfolio/orders"


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_rsa_and_ed25519_signatures_are_let_in(sandbox, control, rsa_key, ed25519_key, kind):
    control.place("a")
    key = {"rsa": rsa_key, "ed25519": ed25519_key}[kind]

    assert Client(sandbox.url, key, f"key-{kind}").cancel("a").status == 200


def test_a_signature_by_another_key_is_named_as_incorrect(sandbox, rsa_key, ed25519_key):
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    for key, key_id in ((stranger, "key-rsa"), (ed25519_key, "key-rsa"), (rsa_key, "key-ed25519")):
        answer = Client(sandbox.url, key, key_id).get(PATH)
        assert (answer.status, answer.json) == (
            401,
            {
                "error": {
                    "code": "authentication_error",
                    "message": "authentication_error",
                    "details": "INCORRECT_API_KEY_SIGNATURE",
                }
            },
        )


def test_an_unknown_key_id_is_named_as_not_found(sandbox, rsa_key):
    answer = Client(sandbox.url, rsa_key, "nobody").get(PATH)

    assert (answer.status, answer.json["error"]["details"]) == (401, "NOT_FOUND")


def test_missing_headers_are_named(client):
    complete = client.headers("GET", FULL_PATH)
    for missing, code in (
        ("KALSHI-ACCESS-KEY", "access_key_is_missing_from_headers"),
        ("KALSHI-ACCESS-SIGNATURE", "signature_is_missing_from_headers"),
        ("KALSHI-ACCESS-TIMESTAMP", "timestamp_is_missing_from_headers"),
    ):
        headers = {name: value for name, value in complete.items() if name != missing}
        answer = client.ask("GET", PATH, headers=headers)
        assert (answer.status, answer.json["error"]["code"]) == (401, code)


@pytest.mark.parametrize("salt_length", [0, 20, 222])
def test_only_a_salt_as_long_as_the_digest_will_do(client, salt_length):
    assert client.get(PATH, salt_length=salt_length).status == 401


@pytest.mark.parametrize(
    "signed", ["/portfolio/orders", FULL_PATH + "/", FULL_PATH + "?limit=1", FULL_PATH.upper()]
)
def test_the_signature_covers_the_path_as_it_was_sent(client, signed):
    assert client.get(PATH, "limit=1", signed=signed).status == 401
    assert client.get(PATH, "limit=1", signed=FULL_PATH).status == 200


def test_the_signature_covers_the_percent_encoding_as_it_was_sent(control, client):
    control.place("a~b")

    assert client.cancel("a%7Eb", signed="/trade-api/v2/portfolio/events/orders/a~b").status == 401
    assert client.cancel("a%7Eb").status == 200


@pytest.mark.parametrize(
    ("offset_ms", "status"), [(-9_000, 200), (9_000, 200), (-11_000, 401), (11_000, 401)]
)
def test_timestamps_are_accepted_within_ten_seconds(client, offset_ms, status):
    answer = client.get(PATH, offset_ms=offset_ms)

    assert answer.status == status
    if status == 401:
        assert answer.json == {
            "error": {"code": "header_timestamp_expired", "message": "header timestamp expired"}
        }


def test_the_window_can_be_changed_and_garbage_is_outside_of_any(control, client):
    control.configure(timestamp_window_s=60)
    assert client.get(PATH, offset_ms=-50_000).status == 200
    for timestamp in ("soon", "-1", "9" * 5000, "1e12"):
        headers = client.headers("GET", FULL_PATH) | {"KALSHI-ACCESS-TIMESTAMP": timestamp}
        assert client.ask("GET", PATH, headers=headers).status == 401


def test_a_skewed_clock_moves_both_the_window_and_the_date(control, client):
    control.configure(skew_s=-3600)

    answer = client.get(PATH)
    assert answer.json["error"]["code"] == "header_timestamp_expired"
    answer = client.get(PATH, offset_ms=-3_600_000)
    assert answer.status == 200
    control.configure(skew_s=0)
    assert answer.headers["Date"] != client.get(PATH).headers["Date"]


def test_a_read_only_key_reads_but_gets_a_403_on_writes(sandbox, control, rsa_key):
    control.place("a")
    control.register_key("reader", pem_of(rsa_key), scope="read_only")
    reader = Client(sandbox.url, rsa_key, "reader")

    assert reader.get("/portfolio/orders/a").status == 200
    assert reader.cancel("a").status == 403
    assert reader.create().status == 403
    assert control.order("a")["status"] == "resting"


def test_a_key_for_trading_alone_may_cancel(sandbox, control, rsa_key):
    control.place("a")
    control.register_key("trader", pem_of(rsa_key), scope="trade")

    assert Client(sandbox.url, rsa_key, "trader").cancel("a").status == 200


def test_the_accounts_keys_are_told_with_their_scopes_and_subaccounts(sandbox, control, rsa_key):
    control.register_key("reader", pem_of(rsa_key), scope="read_only", name="the dashboard")
    control.register_key("desk-2", pem_of(rsa_key), scope="trade", subaccount=2)
    reader = Client(sandbox.url, rsa_key, "reader")

    answer = reader.get("/api_keys")

    assert answer.status == 200
    assert {key["api_key_id"]: key for key in answer.json["api_keys"]} == {
        "key-rsa": {"api_key_id": "key-rsa", "name": "key-rsa", "scopes": ["read", "write"]},
        "key-ed25519": {"api_key_id": "key-ed25519", "name": "key-ed25519", "scopes": ["read", "write"]},
        "reader": {"api_key_id": "reader", "name": "the dashboard", "scopes": ["read"]},
        "desk-2": {
            "api_key_id": "desk-2",
            "name": "desk-2",
            "scopes": ["read", "write::trade"],
            "subaccount": 2,
        },
    }
    control.revoke_key("desk-2")
    assert "desk-2" not in {key["api_key_id"] for key in reader.get("/api_keys").json["api_keys"]}


def test_a_key_confined_to_a_subaccount_sees_and_touches_only_that(sandbox, control, rsa_key):
    control.place("ours", subaccount=2)
    control.place("theirs", subaccount=3)
    for order_id, subaccount in (("our-past", 2), ("their-past", 3)):
        control.place(order_id, subaccount=subaccount, status="executed")
        control.archive(order_id)
    control.register_key("desk-2", pem_of(rsa_key), subaccount=2)
    confined = Client(sandbox.url, rsa_key, "desk-2")

    assert [order["order_id"] for order in confined.get(PATH).json["orders"]] == ["ours"]
    assert confined.get("/portfolio/orders/theirs").status == 404
    past = confined.get("/historical/orders").json["orders"]
    assert [order["order_id"] for order in past] == ["our-past"]
    assert confined.get("/historical/orders", "subaccount=3").status == 403
    assert confined.cancel("theirs").status == 404
    assert confined.cancel("theirs", "subaccount=3").status == 403
    assert confined.batch("ours", {"order_id": "theirs", "subaccount": 3}).status == 403
    assert confined.ask("DELETE", "/portfolio/events/orders", "subaccount=3").status == 403
    assert control.order("ours")["status"] == "resting"
    assert confined.ask("DELETE", "/portfolio/events/orders").status == 204
    assert [control.order(name)["status"] for name in ("ours", "theirs")] == ["canceled", "resting"]


def test_a_reused_signature_or_timestamp_is_noted_and_can_be_refused(control, client):
    headers = client.headers("GET", FULL_PATH)
    client.ask("GET", PATH, headers=headers)
    assert client.ask("GET", PATH, headers=headers).status == 200
    assert [call["reused"] for call in control.calls("list")] == [[], ["signature", "timestamp"]]

    control.configure(refuse_reuse="refuse")
    assert client.ask("GET", PATH, headers=headers).status == 401
    assert client.get(PATH).status == 200


def test_a_revoked_key_gets_a_401(sandbox, control, rsa_key):
    control.register_key("passing", pem_of(rsa_key))
    passing = Client(sandbox.url, rsa_key, "passing")
    assert passing.get(PATH).status == 200
    control.revoke_key("passing")
    assert passing.get(PATH).status == 401


def test_only_rsa_and_ed25519_keys_can_be_registered(control, rsa_key):
    with pytest.raises(ControlError, match="RSA or Ed25519"):
        control.register_key("k", pem_of(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(ControlError, match="PEM"):
        control.register_key("k", "nonsense")
    with pytest.raises(ControlError, match="scope"):
        control.register_key("k", pem_of(rsa_key), scope="admin")
