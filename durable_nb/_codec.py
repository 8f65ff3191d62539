"""Values and records as bytes, and the signature that says they are ours.

A value is JSON where JSON gives back exactly what went in, else pickle. A row of the journal is signed: an HMAC over its
key and its bytes, under a signing key that stays outside the store, verified before anything is decoded. So a store that
somebody else prepared is never unpickled, and a row can't be moved to another key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pickle
import secrets
import traceback
from math import isfinite
from pathlib import Path
from typing import Any

from durable_nb import _pickling, _readback
from durable_nb._files import write_new
from durable_nb._packed import packed, unpacked
from durable_nb._readback import DriftError
from durable_nb.errors import CorruptStoreError, StepFailed, StoreError, UntrustedStoreError

JSON, PICKLE, PACKED = "json", "pickle", "packed"

_MAGIC = b"dnb1"
_ID_BYTES, _MAC_BYTES, _KEY_BYTES = 4, 16, 32
_HEADER = len(_MAGIC) + _ID_BYTES + _MAC_BYTES
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_MAX_DEPTH = 50
_MAX_INT_BITS = 4096


def encode(value: object) -> tuple[str, bytes]:
    """(`json`, `pickle` or `packed`, bytes). Raises whatever the value's own pickling raises, and PicklingError where it would
    come back as another value."""  # fmt: skip
    if not _pickling.is_bulk(value) and _json_exact(value, set(), 0):
        return JSON, _compact(value).encode()
    try:
        done = _readback.pickled(value, apart=True)
    except DriftError as error:
        raise pickle.PicklingError(f"a {error} does not come back whole from its own pickle") from error
    return (PACKED, packed(done.stream, done.buffers)) if done.buffers else (PICKLE, done.stream)


def decode(form: str, data: bytes) -> Any:
    """What `encode` was given. `data` must have been authenticated."""
    if form == PACKED:
        stream, buffers = unpacked(data)
        return _pickling.Unpickler(stream, buffers=buffers).load()
    return json.loads(data.decode()) if form == JSON else _pickling.loads(data)


def _json_exact(value: Any, seen: set[int], depth: int) -> bool:
    """Would JSON give back this very value: same types, NaN and big ints included, and no object in two places?"""
    kind = type(value)
    if value is None or kind is bool:
        return True
    if kind is int:
        return int(value).bit_length() <= _MAX_INT_BITS  # Python refuses to print longer ones
    if kind is str:
        return str.isascii(value) or not any("\ud800" <= c <= "\udfff" for c in value)
    if kind is float:
        return isfinite(value)
    if kind is not list and kind is not dict:
        return False
    if id(value) in seen or depth > _MAX_DEPTH:
        return False
    seen.add(id(value))
    if kind is list:
        return all(_json_exact(v, seen, depth + 1) for v in value)
    return all(type(k) is str and _json_exact(k, seen, depth) and _json_exact(v, seen, depth + 1) for k, v in value.items())


def encode_error(error: BaseException) -> tuple[str, bytes, BaseException]:
    """An exception as (form, bytes, what decoding them gives): itself, or StepFailed where pickle would lose it."""
    try:
        data = _pickling.dumps(error)
        same = _pickling.loads(data)
        if _is_alike(same, error):
            return PICKLE, data, error
    except Exception:  # noqa: S110  whatever is wrong with it, the stand-in below says what is left of it
        pass
    trace = "".join(traceback.format_exception(error))
    stand_in = StepFailed(type(error).__qualname__, text_of(error), trace)
    for note in getattr(error, "__notes__", ()):
        stand_in.add_note(note)
    return PICKLE, _pickling.dumps(stand_in), stand_in


def _is_alike(same: Any, original: Any) -> bool:
    """Has pickle kept what an exception says? Those that it holds, in a group for instance, are equal to no copy of theirs."""
    if type(same) is not type(original):
        return False
    if isinstance(original, BaseException):
        return str(same) == str(original) and _is_alike(same.args, original.args)
    if type(original) in (list, tuple):
        return len(same) == len(original) and all(map(_is_alike, same, original))
    equality: Any = type(original).__eq__
    return equality is object.__eq__ or bool(same == original)


def text_of(error: BaseException) -> str:
    """What the exception says, whatever its `__str__` does."""
    try:
        return str(error)
    except Exception as failed:
        return f"<its __str__ raised {type(failed).__name__}>"


def digest_of(*parts: str) -> str:
    """32 hex characters that no other sequence of texts gives."""
    texts = [part.encode() if part.isascii() else part.encode("utf-8", "surrogatepass") for part in parts]
    # each with its length: one may hold any character
    return hashlib.blake2b(b"".join([b"%d:%b" % (len(text), text) for text in texts]), digest_size=16).hexdigest()


class Signer:
    """Signs and verifies rows under one signing key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=_MAC_BYTES)
        self._prefix = _MAGIC + hashlib.blake2b(key, digest_size=_ID_BYTES, person=b"durable_nb key").digest()

    def mac(self, *parts: bytes) -> bytes:
        """16 bytes that only the holder of the key can compute over these parts, boundaries included."""
        digest = self._keyed.copy()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def sign(self, name: str, body: bytes) -> bytes:
        """`body` signed as the row `name`."""
        return self._prefix + self.mac(name.encode(), body) + body

    def verify(self, name: str, row: bytes) -> bytes:
        """The body of a signed row, verified.

        UntrustedStoreError where another key signed it, CorruptStoreError where the bytes are not what was signed.
        """
        if row[: len(_MAGIC)] != _MAGIC or len(row) < _HEADER:
            raise CorruptStoreError(f"the record {name!r} is damaged: it is not a signed row")
        if row[: len(self._prefix)] != self._prefix:
            raise UntrustedStoreError(
                f"the record {name!r} was signed with another key, so nothing of it was read. If the store is yours, set "
                "DURABLE_NB_KEY_FILE to the key file it was written with, or sign it anew with 'durable-nb trust'; else use a "
                "store of your own (DURABLE_NB_DIR)"
            )
        body = row[_HEADER:]
        if not hmac.compare_digest(self.mac(name.encode(), body), row[len(self._prefix) : _HEADER]):
            raise CorruptStoreError(f"the record {name!r} is damaged: its bytes are not what was signed")
        return body

    def is_own(self, row: bytes) -> bool:
        """Does the row say that this key signed it?"""
        return row.startswith(self._prefix)

    def sign_anew(self, name: str, row: bytes) -> bytes:
        """A row that another key signed, signed with this one: whoever wrote it is trusted from here on."""
        if row[: len(_MAGIC)] != _MAGIC or len(row) < _HEADER:
            raise CorruptStoreError(f"the record {name!r} is damaged: it is not a signed row")
        return self.sign(name, row[_HEADER:])


def load_key() -> bytes:
    """The user's signing key, made on first use: `DURABLE_NB_KEY_FILE`, or `durable_nb/signing.key` in Jupyter's data
    directory; mode 0600, 32 random bytes. StoreError where it can't be read or made."""  # fmt: skip
    named = os.environ.get("DURABLE_NB_KEY_FILE")
    if named:
        path = Path(named)
    else:
        from jupyter_core.paths import jupyter_data_dir

        path = Path(jupyter_data_dir()) / "durable_nb" / "signing.key"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_new(path, secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"the signing key {path} can't be used ({error.strerror}); set DURABLE_NB_KEY_FILE to a file you may write"
        ) from error
    if len(key) != _KEY_BYTES:
        raise StoreError(f"the signing key {path} holds {len(key)} bytes instead of {_KEY_BYTES}; restore it from a backup, "
                         "or move it away: a new one is made, and what the old one signed is no longer read")  # fmt: skip
    return key


def keyed_digest(secret: str) -> str:
    """Stands for a secret in an identity: equal secrets give equal text, and only the key's holder could try guesses."""
    return Signer(load_key()).mac(b"secret", secret.encode("utf-8", "surrogatepass")).hex()


def seal(secret: str) -> str:
    """The text encrypted under the user's key, another one each time: of credentials that have to come back."""
    nonce, data = secrets.token_bytes(16), secret.encode("utf-8", "surrogatepass")
    return base64.b64encode(nonce + _masked(data, nonce)).decode()


def unseal(sealed: str) -> str:
    """The text that `seal` was given; UnicodeDecodeError, nearly always, where that was under another key."""
    raw = base64.b64decode(sealed)
    return _masked(raw[16:], raw[:16]).decode("utf-8", "surrogatepass")


def _masked(data: bytes, nonce: bytes) -> bytes:
    """XOR with a stream that only the key's holder can make: the MACs of a count. Rows are signed, so nobody alters it."""
    signer = Signer(load_key())
    stream = b"".join(signer.mac(b"seal", nonce, b"%d" % n) for n in range(-(-len(data) // _MAC_BYTES)))
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))
