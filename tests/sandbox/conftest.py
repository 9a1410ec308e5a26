"""A sandbox per test, with keys that are made once per run."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from signed import Client, pem_of

from conformance.answers import departures
from conformance.watching import watch
from kalshi_cancel.sandbox.control import Control
from kalshi_cancel.sandbox.server import SandboxServer


@pytest.fixture(scope="session")
def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="session")
def ed25519_key():
    return ed25519.Ed25519PrivateKey.generate()


@pytest.fixture(autouse=True)
def every_answer_is_as_documented():
    answers = []
    end = watch(answers.append)
    yield answers
    end()
    assert [said for each in answers if each.odd is None for said in departures(each)] == []


@pytest.fixture
def sandbox(rsa_key, ed25519_key):
    keys = {"key-rsa": pem_of(rsa_key), "key-ed25519": pem_of(ed25519_key)}
    with SandboxServer(keys=keys) as server:
        yield server


@pytest.fixture
def control(sandbox):
    with Control(sandbox.url) as remote:
        yield remote


@pytest.fixture
def client(sandbox, rsa_key):
    signed = Client(sandbox.url, rsa_key)
    yield signed
    signed.connection.close()
