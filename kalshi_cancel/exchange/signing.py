"""Signs requests: loads private keys, says what is wrong with one, and makes the signatures.

The message is ``timestamp_ms + METHOD + path`` without separators, query, body or host. An RSA key signs it
with RSA-PSS (SHA-256, MGF1-SHA-256, salt of 32 bytes), an Ed25519 key as it is.

No error of this module quotes a key or a passphrase, and none carries the cryptography library's own
exception along, so a traceback holds no key material.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never, TypeAlias, final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa

if TYPE_CHECKING:
    import os

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

EXPECTED: Final = "expected is one RSA or Ed25519 private key in PEM text, as downloaded from the exchange"
MIN_RSA_BITS: Final = 2048  # what NIST SP 800-131A still allows; the exchange itself issues 2048 and more
MAX_KEY_BYTES: Final = (
    64 * 1024
)  # an encrypted 16384-bit RSA key in PEM takes 13 KB; a whole log file does not fit

_ACCEPTED: Final = frozenset({"PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"})
_OTHER_BLOCKS: Final = {
    "PUBLIC KEY": "a public key; the private key belongs here, the public one at the exchange",
    "RSA PUBLIC KEY": "a public key; the private key belongs here, the public one at the exchange",
    "CERTIFICATE": "a certificate",
    "X509 CERTIFICATE": "a certificate",
    "TRUSTED CERTIFICATE": "a certificate",
    "CERTIFICATE REQUEST": "a certificate request",
    "OPENSSH PRIVATE KEY": "a key in OpenSSH's own format",
    "EC PARAMETERS": "an EC (elliptic curve) key, which the exchange does not take",
    "EC PRIVATE KEY": "an EC (elliptic curve) key, which the exchange does not take",
    "DSA PARAMETERS": "a DSA key, which the exchange does not take",
    "DSA PRIVATE KEY": "a DSA key, which the exchange does not take",
}
_BEGIN: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_BLOCK: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,40})-----(.*?)-----END \1-----", re.DOTALL)

_DIGEST: Final = hashes.SHA256()
_PSS: Final = padding.PSS(mgf=padding.MGF1(_DIGEST), salt_length=_DIGEST.digest_size)

_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")
_METHOD: Final = re.compile(r"[A-Z]{1,16}")
# Only what travels as it is: everything else an HTTP library would encode after it was signed.
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})*")


class KeyProblem(ValueError):  # noqa: N818  (it is shown to the operator as it is: a problem with the key)
    """A private key that cannot be used: what was found and what is expected, never a byte of the key."""


@final
class RequestSigner:
    """The account's key id together with its private key: the headers that sign a request.

    Thread-safe. It refuses to be copied or pickled: the key stays in the process that loaded it.
    """

    __slots__ = ("_key_id", "_private_key")

    def __init__(self, key_id: str, private_key: PrivateKey) -> None:
        if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
            raise ValueError("the API key id must be 1 to 256 printable ASCII characters without spaces")
        if not isinstance(private_key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
            raise TypeError("the private key must be an RSA or Ed25519 key object, see load_private_key")
        self._key_id = key_id
        self._private_key = private_key

    @property
    def key_id(self) -> str:
        """The API key id, which is not secret."""
        return self._key_id

    @property
    def algorithm(self) -> str:
        """The signature in words: ``RSA-PSS-SHA256`` or ``Ed25519``."""
        return "RSA-PSS-SHA256" if isinstance(self._private_key, rsa.RSAPrivateKey) else "Ed25519"

    def headers(self, method: str, path: str, *, timestamp_ms: int) -> dict[str, str]:
        """The three headers that sign one attempt; ask again for every attempt.

        ``method`` is upper case and ``path`` is the path as it goes out, percent-encoding included, from
        ``/trade-api/v2`` on and without its query. ``timestamp_ms`` counts from the Unix epoch on the
        exchange's clock. Raises ValueError for anything that would be sent otherwise than it was signed.
        """
        if not _METHOD.fullmatch(method):
            raise ValueError(f"the method must be in upper-case letters, got {method[:40]!r}")
        if not _PATH.fullmatch(path) or any(part in {".", ".."} for part in path.split("/")):
            raise ValueError(
                "the path to sign must start with a slash and hold neither query, fragment, dot segments nor"
                f" unencoded characters, got {path[:100]!r}"
            )
        if isinstance(timestamp_ms, bool) or not isinstance(timestamp_ms, int) or timestamp_ms <= 0:
            raise ValueError(f"timestamp_ms must be a positive integer, got {timestamp_ms!r}")
        timestamp = str(timestamp_ms)
        signature = self._sign(f"{timestamp}{method}{path}".encode("ascii"))
        return {
            "KALSHI-ACCESS-KEY": self._key_id,
            "KALSHI-ACCESS-SIGNATURE": base64.b64encode(signature).decode("ascii"),
            "KALSHI-ACCESS-TIMESTAMP": timestamp,
        }

    def _sign(self, message: bytes) -> bytes:
        if isinstance(self._private_key, rsa.RSAPrivateKey):
            return self._private_key.sign(message, _PSS, _DIGEST)
        return self._private_key.sign(message)

    def __repr__(self) -> str:
        return f"RequestSigner(key_id={self._key_id!r}, algorithm={self.algorithm!r})"

    def __reduce_ex__(self, protocol: object) -> Never:
        # copy and deepcopy come through here as well
        raise TypeError("a RequestSigner holds a private key and is neither copied nor pickled")


def load_private_key(pem: bytes | str, *, passphrase: bytes | None = None) -> PrivateKey:
    r"""The private key in a PEM text: RSA in PKCS#1 or PKCS#8, Ed25519 in PKCS#8, encrypted or not.

    Newlines that an env file turned into a literal ``\n`` are repaired. A passphrase for a key that is not
    encrypted is refused: who set it believes the key to be protected, and it is not. An empty passphrase
    counts as none. Raises KeyProblem.
    """
    text = _pem_text(pem)
    label, body = _only_block(text)
    if "Proc-Type:" not in body:
        text = _armoured(label, body)
    encrypted = label == "ENCRYPTED PRIVATE KEY" or "Proc-Type: 4,ENCRYPTED" in body
    if encrypted and not passphrase:
        raise KeyProblem(
            "the private key is encrypted and no passphrase was given: set KALSHI_PRIVATE_KEY_PASSPHRASE"
        )
    if passphrase and not encrypted:
        raise KeyProblem("a passphrase was given but the private key is not encrypted: encrypt it or drop it")

    key: object = None
    problem = ""
    try:
        key = serialization.load_pem_private_key(text.encode("ascii"), passphrase if encrypted else None)
    except UnsupportedAlgorithm:
        problem = "the private key uses an algorithm or a cipher that is not supported; " + EXPECTED
    except (ValueError, TypeError):
        problem = (
            "the private key cannot be decrypted: the passphrase is wrong or the text is damaged"
            if encrypted
            else _why_unreadable(label, body)
        )
    if problem:
        # Raised here, outside the handler, so that the library's exception does not even become the context.
        raise KeyProblem(problem)
    return _accepted(key)


def permission_warning(path: str | os.PathLike[str]) -> str | None:
    """A sentence for the operator when others than its owner can read or change the key file, else None."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return None  # loading it says what is wrong
    if not mode & (stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH):
        return None
    return (
        f"private key file {path} can be read or changed by others than its owner"
        f" (mode {stat.S_IMODE(mode):04o}): run chmod 600 on it"
    )


def _pem_text(pem: bytes | str) -> str:
    """The ASCII text of a PEM, its newlines repaired; raises KeyProblem for what is not text at all."""
    raw = pem.encode("utf-8", "surrogateescape") if isinstance(pem, str) else bytes(pem)
    if len(raw) > MAX_KEY_BYTES:
        raise KeyProblem(f"the private key is longer than {MAX_KEY_BYTES // 1024} KiB; {EXPECTED}")
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, left by an editor
    if not raw.strip():
        raise KeyProblem(f"the private key is empty; {EXPECTED}")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise KeyProblem(f"the private key is text in UTF-16; save it as plain ASCII; {EXPECTED}")
    if not raw.isascii() and (line := _odd_line(raw)):
        raise KeyProblem(
            f"the private key has a character in line {line} that PEM text has not, such as a hard space or a"
            " long dash: copy it as plain text"
        )
    if not raw.isascii():
        raise KeyProblem(f"the private key is binary data (perhaps DER), not PEM text; {EXPECTED}")
    text = raw.decode("ascii")
    # PEM has no backslashes, so nothing that was right can be changed by this.
    return re.sub(r"\\+n", "\n", re.sub(r"\\+r", "", text)).strip()


def _odd_line(raw: bytes) -> int | None:
    """The number of the first line with a character that is not ASCII, if this is a PEM text otherwise."""
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return None
    is_pem = any("PRIVATE KEY" in line for line in lines)
    return next((at for at, line in enumerate(lines, 1) if is_pem and not line.isascii()), None)


def _only_block(text: str) -> tuple[str, str]:
    """The label and the body of the text's only PEM block, which is one of those that hold private keys."""
    labels = _BEGIN.findall(text)
    if not labels:
        raise KeyProblem(f"{_without_armour(text)}; {EXPECTED}")
    if labels[0] in _OTHER_BLOCKS:
        raise KeyProblem(f"the private key is {_OTHER_BLOCKS[labels[0]]}; {EXPECTED}")
    if len(labels) > 1:
        raise KeyProblem(f"the private key is {len(labels)} PEM blocks ({', '.join(labels[:5])}); {EXPECTED}")
    if labels[0] not in _ACCEPTED:
        raise KeyProblem(f"the private key is a PEM block of another kind ({labels[0]}); {EXPECTED}")
    block = _BLOCK.search(text)
    if block is None:
        raise KeyProblem(
            f"the private key is cut off or its armour is wrong: no line END {labels[0]} follows its line"
            f" BEGIN {labels[0]}"
        )
    return labels[0], block[2]


def _armoured(label: str, body: str) -> str:
    """The block anew: blank lines, indents and long lines mean nothing, but the library minds them."""
    characters = "".join(body.split())
    lines = [characters[at : at + 64] for at in range(0, len(characters), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""])


def _without_armour(text: str) -> str:
    if text.startswith("PuTTY-User-Key-File"):
        return "the private key is a PuTTY key file"
    if text.startswith(("ssh-", "ecdsa-", "sk-")):
        return "the private key is an OpenSSH public key"
    if "\n" not in text and re.match(r"[~.]{0,2}/|.*\.(?:pem|key|txt)$", text):
        return "the private key looks like the path of a file, not like the key itself"
    if text.startswith("LS0tLS1CRUdJTi"):  # "-----BEGIN"
        return "the private key is a PEM text in base64: decode it once"
    return "the private key is not PEM text (no line BEGIN ... PRIVATE KEY)"


def _why_unreadable(label: str, body: str) -> str:
    """What is wrong with an unencrypted block that the library refuses, as far as can be told."""
    try:
        der = base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error:
        return "the private key's base64 body is damaged or cut off"
    if _is_cut_off(der):
        return "the private key is cut off: it holds less than it announces"
    try:
        serialization.load_der_private_key(der, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    else:
        return (
            f"the private key's armour is wrong: it says BEGIN {label}, but what is inside is another format;"
            " export the key again"
        )
    try:
        serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        return f"the private key's text is damaged: there is no key inside; {EXPECTED}"
    return f"the private key's armour is wrong: it says BEGIN {label}, but inside is a public key; {EXPECTED}"


def _is_cut_off(der: bytes) -> bool:
    """Whether a DER sequence is shorter than its own header says."""
    if len(der) < 2:  # noqa: PLR2004  (a tag and a length, the least there is)
        return True
    first = der[1]
    width = first & 0x7F if first & 0x80 else 0
    length = int.from_bytes(der[2 : 2 + width], "big") if width else first
    return len(der) < 2 + width + length


def _accepted(key: object) -> PrivateKey:
    """The key, if it is of a kind and size that the exchange takes."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < MIN_RSA_BITS:
            raise KeyProblem(f"the RSA key has {key.key_size} bits; at least {MIN_RSA_BITS} are expected")
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyProblem(f"the private key is {_OTHER_BLOCKS['EC PRIVATE KEY']}; {EXPECTED}")
    if isinstance(key, dsa.DSAPrivateKey):
        raise KeyProblem(f"the private key is {_OTHER_BLOCKS['DSA PRIVATE KEY']}; {EXPECTED}")
    kind = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
    raise KeyProblem(
        f"the private key is of another kind ({kind}), which the exchange does not take; {EXPECTED}"
    )
