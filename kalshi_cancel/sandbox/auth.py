"""Who a request comes from: key ids, signatures, the clock window, scopes."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from kalshi_cancel.sandbox.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kalshi_cancel.sandbox.wire import Request

PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey
# What GET /api_keys says of a key, and whether it may write; "trade" is for orders and nothing else.
SCOPES = {"full": ("read", "write"), "trade": ("read", "write::trade"), "read_only": ("read",)}
KEY_HEADER = "kalshi-access-key"
SIGNATURE_HEADER = "kalshi-access-signature"
TIMESTAMP_HEADER = "kalshi-access-timestamp"
# Strict: the salt is as long as the digest; a signature with another salt length is refused.
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)


@dataclass(frozen=True, slots=True)
class Key:
    """A registered key: who may sign with it and for which subaccount (None = all)."""

    key_id: str
    public_key: PublicKey
    scope: str = "full"
    subaccount: int | None = None
    name: str = ""

    @property
    def may_write(self) -> bool:
        """Whether it may do more than read."""
        return self.scope != "read_only"


def read_key(
    key_id: str,
    public_key_pem: str,
    *,
    scope: str = "full",
    subaccount: int | None = None,
    name: str | None = None,
) -> Key:
    """A key from its public PEM; ValueError when it is neither RSA nor Ed25519. It is called by its id."""
    try:
        public_key = serialization.load_pem_public_key(public_key_pem.encode())
    except ValueError as error:
        raise ValueError("a public key in PEM is needed (BEGIN PUBLIC KEY)") from error
    if not isinstance(public_key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        found = type(public_key).__name__
        raise ValueError(f"an RSA or Ed25519 public key is needed, not {found}")  # noqa: TRY004  # the PEM is at fault
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not {scope!r}")
    return Key(key_id, public_key, scope, subaccount, key_id if name is None else name)


def authenticate(request: Request, keys: Mapping[str, Key], *, now_ms: int, window_s: float) -> Key:
    """The key that signed `request` within the window around the front's clock; a 401 Refusal otherwise."""
    key_id = request.headers.get(KEY_HEADER, "")
    signature = request.headers.get(SIGNATURE_HEADER, "")
    timestamp = request.headers.get(TIMESTAMP_HEADER, "")
    if not key_id:
        raise Refusal(401, "access_key_is_missing_from_headers")
    if not signature:
        raise Refusal(401, "signature_is_missing_from_headers")
    if not timestamp:
        raise Refusal(401, "timestamp_is_missing_from_headers")
    key = keys.get(key_id)
    if key is None:
        raise Refusal(401, "authentication_error", "authentication_error", "NOT_FOUND")
    timely = timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 20
    if not timely or abs(now_ms - int(timestamp)) > window_s * 1000:
        raise Refusal(401, "header_timestamp_expired")
    if not _signed_by(key.public_key, signature, f"{timestamp}{request.method}{request.path}"):
        raise Refusal(401, "authentication_error", "authentication_error", "INCORRECT_API_KEY_SIGNATURE")
    return key


def _signed_by(public_key: PublicKey, signature: str, message: str) -> bool:
    try:
        raw = base64.b64decode(signature, validate=True)
        if isinstance(public_key, rsa.RSAPublicKey):
            public_key.verify(raw, message.encode(), _PSS, hashes.SHA256())
        else:
            public_key.verify(raw, message.encode())
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True
