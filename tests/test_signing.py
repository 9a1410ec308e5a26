"""Keys of every kind, good and bad, made when the tests run; signatures are verified with the public key."""

from __future__ import annotations

import base64
import copy
import pickle
import re
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import NameOID

from kalshi_cancel.exchange.signing import (
    KeyProblem,
    RequestSigner,
    load_private_key,
    permission_warning,
)

PASSPHRASE = b"correct horse battery staple"
PKCS1 = serialization.PrivateFormat.TraditionalOpenSSL
PKCS8 = serialization.PrivateFormat.PKCS8
OPENSSH = serialization.PrivateFormat.OpenSSH
PATH = "/trade-api/v2/portfolio/events/orders/0b0d8a5e-1"

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED25519_KEY = ed25519.Ed25519PrivateKey.generate()


def pem_of(key, form=PKCS8, passphrase=None):
    encryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def public_pem_of(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def armoured(label, der):
    body = base64.encodebytes(der)
    return b"-----BEGIN " + label + b"-----\n" + body + b"-----END " + label + b"-----\n"


def der_of(pem):
    return base64.b64decode(b"".join(line for line in pem.splitlines() if b"-----" not in line))


def certificate():
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(RSA_KEY.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(RSA_KEY, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def cut(pem, lines):
    kept = pem.splitlines(keepends=True)
    return b"".join([*kept[:lines], kept[-1]])


def same_key(loaded, key):
    return public_pem_of(loaded) == public_pem_of(key)


GOOD_KEYS = {
    "RSA PKCS#1": (pem_of(RSA_KEY, PKCS1), None, RSA_KEY),
    "RSA PKCS#8": (pem_of(RSA_KEY), None, RSA_KEY),
    "RSA PKCS#1 encrypted": (pem_of(RSA_KEY, PKCS1, PASSPHRASE), PASSPHRASE, RSA_KEY),
    "RSA PKCS#8 encrypted": (pem_of(RSA_KEY, PKCS8, PASSPHRASE), PASSPHRASE, RSA_KEY),
    "Ed25519 PKCS#8": (pem_of(ED25519_KEY), None, ED25519_KEY),
    "Ed25519 PKCS#8 encrypted": (pem_of(ED25519_KEY, PKCS8, PASSPHRASE), PASSPHRASE, ED25519_KEY),
    "text, not bytes": (pem_of(RSA_KEY).decode(), None, RSA_KEY),
    "literal newlines": (pem_of(RSA_KEY, PKCS1).replace(b"\n", b"\\n"), None, RSA_KEY),
    "literal CR and newlines": (pem_of(RSA_KEY).replace(b"\n", b"\\r\\n"), None, RSA_KEY),
    "literal newlines, quoted twice": (pem_of(RSA_KEY).replace(b"\n", rb"\\n"), None, RSA_KEY),
    "encrypted with literal newlines": (
        pem_of(RSA_KEY, PKCS1, PASSPHRASE).replace(b"\n", b"\\n"),
        PASSPHRASE,
        RSA_KEY,
    ),
    "Windows line ends": (pem_of(RSA_KEY).replace(b"\n", b"\r\n"), None, RSA_KEY),
    "byte order mark": (b"\xef\xbb\xbf" + pem_of(ED25519_KEY), None, ED25519_KEY),
    "newlines turned into blanks": (pem_of(RSA_KEY).replace(b"\n", b" "), None, RSA_KEY),
    "blank lines between": (pem_of(RSA_KEY).replace(b"\n", b"\n\n"), None, RSA_KEY),
    "indented": (pem_of(ED25519_KEY).replace(b"\n", b"\n    "), None, ED25519_KEY),
    "blank lines around": (b"\n\n  " + pem_of(ED25519_KEY) + b"\n\n", None, ED25519_KEY),
    "empty passphrase": (pem_of(ED25519_KEY), b"", ED25519_KEY),
}


@pytest.mark.parametrize(("pem", "passphrase", "key"), GOOD_KEYS.values(), ids=GOOD_KEYS)
def test_a_key_is_loaded_from_every_form_that_the_exchange_or_openssl_writes(pem, passphrase, key):
    assert same_key(load_private_key(pem, passphrase=passphrase), key)


EC_KEY = ec.generate_private_key(ec.SECP256R1())
DSA_KEY = dsa.generate_private_key(key_size=1024)
RSA_PEM = pem_of(RSA_KEY)
P256_OID = bytes.fromhex("2a8648ce3d030107")
UNKNOWN_CIPHER = RSA_PEM.replace(
    b"BEGIN PRIVATE KEY-----\n",
    b"BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: ROT13,00\n\n",
).replace(b"END PRIVATE", b"END RSA PRIVATE")

BAD_KEYS = {
    "empty": (b"", None, "is empty"),
    "blank": (" \n\n", None, "is empty"),
    "not PEM": (b"hello, key", None, "is not PEM text"),
    "a path": (b"/run/secrets/kalshi.pem", None, "looks like the path of a file"),
    "a relative path": (b"kalshi.pem", None, "looks like the path of a file"),
    "base64 without armour": (base64.b64encode(der_of(RSA_PEM)), None, "is not PEM text"),
    "base64 of the whole text": (base64.b64encode(RSA_PEM), None, "a PEM text in base64: decode it once"),
    "hard space": (RSA_PEM.decode().replace("\n", "\u00a0\n", 1), None, "a character in line 1 that PEM"),
    "long dash": (RSA_PEM.decode().replace("-----END", "\u2014\u2014-END"), None, "that PEM text has not"),
    "DER": (der_of(RSA_PEM), None, "binary data"),
    "UTF-16": (RSA_PEM.decode().encode("utf-16"), None, "UTF-16"),
    "lone surrogates": ("-----BEGIN\udc80", None, "binary data"),
    "huge": (b"x" * 100_000, None, "longer than 64 KiB"),
    "PKCS#1 encrypted, no passphrase": (pem_of(RSA_KEY, PKCS1, PASSPHRASE), None, "no passphrase was given"),
    "PKCS#8 encrypted, no passphrase": (pem_of(RSA_KEY, PKCS8, PASSPHRASE), None, "no passphrase was given"),
    "encrypted, empty passphrase": (pem_of(RSA_KEY, PKCS8, PASSPHRASE), b"", "no passphrase was given"),
    "PKCS#1 encrypted, wrong passphrase": (
        pem_of(RSA_KEY, PKCS1, PASSPHRASE),
        b"wrong-phrase",
        "cannot be decrypted",
    ),
    "PKCS#8 encrypted, wrong passphrase": (
        pem_of(RSA_KEY, PKCS8, PASSPHRASE),
        b"wrong-phrase",
        "cannot be decrypted",
    ),
    "unknown cipher": (UNKNOWN_CIPHER, PASSPHRASE, "is not supported|cannot be decrypted"),
    "passphrase for a plain key": (RSA_PEM, PASSPHRASE, "is not encrypted"),
    "public key": (public_pem_of(RSA_KEY), None, "is a public key"),
    "OpenSSH public key": (b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me@here", None, "an OpenSSH public key"),
    "certificate": (certificate(), None, "is a certificate;"),
    "certificate request": (armoured(b"CERTIFICATE REQUEST", b"0\x00"), None, "is a certificate request"),
    "OpenSSH key": (pem_of(ED25519_KEY, OPENSSH), None, "OpenSSH's own format"),
    "PuTTY key": (b"PuTTY-User-Key-File-3: ssh-rsa\nEncryption: none", None, "a PuTTY key file"),
    "EC key, PKCS#8": (pem_of(EC_KEY), None, "elliptic curve"),
    "EC key, SEC1": (pem_of(EC_KEY, PKCS1), None, "elliptic curve"),
    "EC parameters and key": (
        armoured(b"EC PARAMETERS", b"\x06\x08") + pem_of(EC_KEY, PKCS1),
        None,
        "elliptic curve",
    ),
    "EC key on an unknown curve": (
        armoured(b"PRIVATE KEY", der_of(pem_of(EC_KEY)).replace(P256_OID, P256_OID[:-1] + b"\x7f")),
        None,
        "an algorithm or a cipher that is not supported",
    ),
    "DSA key, PKCS#8": (pem_of(DSA_KEY), None, "a DSA key"),
    "DSA key, traditional": (pem_of(DSA_KEY, PKCS1), None, "a DSA key"),
    "Ed448 key": (pem_of(ed448.Ed448PrivateKey.generate()), None, "of another kind .Ed448"),
    "PGP": (armoured(b"PGP PRIVATE KEY BLOCK", b"x"), None, r"of another kind \(PGP PRIVATE KEY BLOCK\)"),
    "small RSA key": (
        pem_of(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
        None,
        "1024 bits; at least 2048",
    ),
    "PKCS#8 said to be PKCS#1": (RSA_PEM.replace(b"PRIVATE", b"RSA PRIVATE"), None, "armour is wrong"),
    "PKCS#1 said to be PKCS#8": (pem_of(RSA_KEY, PKCS1).replace(b"RSA ", b""), None, "armour is wrong"),
    "public key said to be private": (
        public_pem_of(RSA_KEY).replace(b"PUBLIC", b"PRIVATE"),
        None,
        "inside is a public key",
    ),
    "begin and end differ": (RSA_PEM.replace(b"END ", b"END RSA "), None, "cut off or its armour is wrong"),
    "cut off before its end": (RSA_PEM[:900], None, "cut off or its armour is wrong"),
    "body cut off at a line": (cut(RSA_PEM, 9), None, "cut off: it holds less than it announces"),
    "body cut off in a line": (RSA_PEM.replace(RSA_PEM[700:705], b""), None, "damaged or cut off"),
    "no body": (cut(RSA_PEM, 1), None, "cut off"),
    "foreign characters": (RSA_PEM.replace(RSA_PEM[700:705], b"*****"), None, "damaged or cut off"),
    "nonsense inside": (armoured(b"PRIVATE KEY", b"0\x03abc"), None, "no key inside"),
    "two keys": (RSA_PEM + pem_of(ED25519_KEY), None, r"2 PEM blocks \(PRIVATE KEY, PRIVATE KEY\)"),
    "key and certificate": (RSA_PEM + certificate(), None, "2 PEM blocks"),
}


def secrets_of(pem, passphrase):
    """Every piece of 16 characters of the key's body, and the passphrase."""
    text = pem.decode("latin-1") if isinstance(pem, bytes) else pem
    body = [line for line in re.split(r"\\n|\n", text) if "-----" not in line and ":" not in line]
    pieces = {line[at : at + 16] for line in body for at in range(len(line) - 15)}
    return pieces | ({passphrase.decode()} if passphrase else set())


@pytest.mark.parametrize(("pem", "passphrase", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_each_kind_of_bad_key_gets_one_clear_error_that_holds_nothing_of_the_key(pem, passphrase, message):
    with pytest.raises(KeyProblem, match=message) as caught:
        load_private_key(pem, passphrase=passphrase)

    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert not [piece for piece in secrets_of(pem, passphrase) if piece in shown]


def test_a_key_cut_off_at_any_place_is_a_key_problem_and_nothing_else():
    pem = pem_of(ED25519_KEY)
    for length in range(len(pem.rstrip())):
        with pytest.raises(KeyProblem):
            load_private_key(pem[:length])


def test_a_key_file_that_others_can_read_or_change_earns_a_warning(tmp_path):
    file = tmp_path / "key.pem"
    file.write_bytes(pem_of(ED25519_KEY))
    for mode in (0o644, 0o640, 0o604, 0o620, 0o602):
        file.chmod(mode)
        warning = permission_warning(file)
        assert warning is not None
        assert f"{mode:04o}" in warning
        assert "chmod 600" in warning
    for mode in (0o600, 0o400, 0o711):
        file.chmod(mode)
        assert permission_warning(file) is None


def test_no_permission_warning_is_given_for_a_file_that_is_not_there(tmp_path):
    assert permission_warning(tmp_path / "missing.pem") is None


def verify(public_key, headers, message, *, salt_length=32):
    signature = base64.b64decode(headers["KALSHI-ACCESS-SIGNATURE"], validate=True)
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        public_key.verify(signature, message)
    else:
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=salt_length)
        public_key.verify(signature, message, pss, hashes.SHA256())


@pytest.mark.parametrize("key", [RSA_KEY, ED25519_KEY], ids=["RSA", "Ed25519"])
def test_exactly_timestamp_method_and_path_are_signed_and_three_headers_say_so(key):
    headers = RequestSigner("key-1", key).headers("DELETE", PATH, timestamp_ms=1_715_793_660_456)

    assert set(headers) == {"KALSHI-ACCESS-KEY", "KALSHI-ACCESS-SIGNATURE", "KALSHI-ACCESS-TIMESTAMP"}
    assert headers["KALSHI-ACCESS-KEY"] == "key-1"
    assert headers["KALSHI-ACCESS-TIMESTAMP"] == "1715793660456"
    verify(key.public_key(), headers, b"1715793660456DELETE" + PATH.encode())
    with pytest.raises(InvalidSignature):
        verify(key.public_key(), headers, b"1715793660457DELETE" + PATH.encode())


@pytest.mark.parametrize("salt_length", [0, 20, 31, 33, 222])
def test_the_salt_of_an_rsa_signature_is_32_bytes_and_no_other_length(salt_length):
    headers = RequestSigner("key-1", RSA_KEY).headers("GET", PATH, timestamp_ms=1)

    verify(RSA_KEY.public_key(), headers, b"1GET" + PATH.encode(), salt_length=32)
    with pytest.raises(InvalidSignature):
        verify(RSA_KEY.public_key(), headers, b"1GET" + PATH.encode(), salt_length=salt_length)


def test_the_same_request_signed_twice_with_rsa_has_two_signatures():
    signer = RequestSigner("key-1", RSA_KEY)
    first, second = (signer.headers("GET", PATH, timestamp_ms=5)["KALSHI-ACCESS-SIGNATURE"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    "path",
    [
        "",
        "trade-api/v2/portfolio/orders/x",
        "https://external-api.kalshi.com/trade-api/v2/portfolio/orders/x",
        PATH + "?subaccount=1",
        PATH + "?",
        PATH + "#x",
        PATH + " ",
        PATH + "\n",
        PATH + "\r\nX: y",
        PATH + "%2",
        PATH + "%zz",
        PATH + "é",
        PATH + "\\x",
        PATH + '"',
        PATH + "/../x",
        PATH + "/.",
        "/./x",
    ],
)
def test_a_path_that_would_not_be_sent_as_it_is_signed_is_refused(path):
    with pytest.raises(ValueError, match="the path to sign must"):
        RequestSigner("key-1", ED25519_KEY).headers("GET", path, timestamp_ms=1)


def test_a_percent_encoded_path_is_signed_byte_for_byte():
    headers = RequestSigner("key-1", ED25519_KEY).headers("GET", "/a%20b/c:d~e", timestamp_ms=1)
    verify(ED25519_KEY.public_key(), headers, b"1GET/a%20b/c:d~e")


@pytest.mark.parametrize("method", ["", "delete", "Delete", "GET ", "GET\n", "GÉT"])
def test_a_method_that_is_not_in_upper_case_letters_is_refused(method):
    with pytest.raises(ValueError, match="the method must be"):
        RequestSigner("key-1", ED25519_KEY).headers(method, PATH, timestamp_ms=1)


@pytest.mark.parametrize("timestamp_ms", [0, -1, 1.5, "1", True, None])
def test_a_timestamp_that_is_not_a_positive_integer_is_refused(timestamp_ms):
    with pytest.raises(ValueError, match="timestamp_ms must be"):
        RequestSigner("key-1", ED25519_KEY).headers("GET", PATH, timestamp_ms=timestamp_ms)


@pytest.mark.parametrize("key_id", ["", " ", "a b", "a\r\nX: y", "a\n", "é", "x" * 257, None, b"key"])
def test_a_key_id_that_could_not_travel_in_a_header_is_refused(key_id):
    with pytest.raises(ValueError, match="the API key id must be"):
        RequestSigner(key_id, ED25519_KEY)


@pytest.mark.parametrize("key", [EC_KEY, ED25519_KEY.public_key(), pem_of(ED25519_KEY), None])
def test_a_signer_takes_a_loaded_private_key_and_nothing_else(key):
    with pytest.raises(TypeError, match="must be an RSA or Ed25519 key object"):
        RequestSigner("key-1", key)


def test_a_signer_shows_its_key_id_and_algorithm_and_nothing_else():
    signer = RequestSigner("key-1", RSA_KEY)

    assert repr(signer) == str(signer) == "RequestSigner(key_id='key-1', algorithm='RSA-PSS-SHA256')"
    assert repr(RequestSigner("k", ED25519_KEY)) == "RequestSigner(key_id='k', algorithm='Ed25519')"
    assert signer.key_id == "key-1"
    assert not hasattr(signer, "__dict__")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("key", [RSA_KEY, ED25519_KEY], ids=["RSA", "Ed25519"])
def test_a_signer_is_neither_copied_nor_pickled(duplicate, key):
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        duplicate(RequestSigner("key-1", key))


@pytest.mark.parametrize("key", [RSA_KEY, ED25519_KEY], ids=["RSA", "Ed25519"])
def test_threads_that_share_a_signer_each_get_a_valid_signature_of_their_own_request(key):
    signer = RequestSigner("key-1", key)
    start = threading.Barrier(8)

    def sign(worker):
        start.wait(timeout=30)
        return [
            (signer.headers("GET", f"/o/{worker}-{turn}", timestamp_ms=turn), worker, turn)
            for turn in range(1, 21)
        ]

    with ThreadPoolExecutor(8) as pool:
        signed = [each for batch in pool.map(sign, range(8)) for each in batch]
    assert len(signed) == 160
    for headers, worker, turn in signed:
        verify(key.public_key(), headers, f"{turn}GET/o/{worker}-{turn}".encode())
