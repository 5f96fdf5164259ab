"""The bodies of the device API as typed values (`docs/device-api.md`).

Parsing is strict about what is used and ignores what is unknown, as the contract says; an answer kind that is not
known is an error, because acting on half of it would be a guess.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from clients.device.errors import TransportError

ANSWERS = ("none", "offer", "go", "wait", "cancel")
MAX_REPORTS = 64
MAX_DETAIL = 512
_MAX_POLL_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Running:
    """What a slot holds. Factory firmware has no release and no bundle."""

    version: str
    slot: str
    security_version: int = 0
    release: str = ""
    bundle: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "bundle": self.bundle,
            "version": self.version,
            "slot": self.slot,
            "security_version": self.security_version,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Running:
        get = _Fields(body)
        return Running(
            get.text("version"),
            get.text("slot"),
            get.whole("security_version"),
            get.text("release", ""),
            get.text("bundle", ""),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A step of an attempt; resent unchanged until it is acknowledged."""

    counter: int
    attempt: str
    state: str
    code: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "counter": self.counter,
            "attempt": self.attempt,
            "state": self.state,
            "code": self.code,
            "detail": self.detail,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Report:
        get = _Fields(body)
        return Report(
            get.whole("counter"), get.text("attempt"), get.text("state"), get.text("code", ""), get.text("detail", "")
        )


@dataclass(frozen=True, slots=True)
class CheckIn:
    """A check-in request."""

    instance: str
    boot_id: str
    counter: int
    running: Running
    attempt: str = ""
    ask_go: bool = False
    reports: tuple[Report, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "agent": {"instance": self.instance, "boot_id": self.boot_id, "counter": self.counter},
            "running": self.running.to_json(),
            "reports": [report.to_json() for report in self.reports],
        }
        if self.attempt:
            body["attempt"] = {"name": self.attempt, **({"ask": "go"} if self.ask_go else {})}
        if self.attributes:
            body["attributes"] = dict(self.attributes)
        if self.metrics:
            body["metrics"] = dict(self.metrics)
        return body


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature over the statement, by the key of that id."""

    key_id: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Binary:
    """An entry of an offer. ``metadata`` is the canonical JSON text whose digest the statement names."""

    digest: str
    size: int
    target: str
    metadata: str
    metadata_digest: str
    url: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A manifest, not yet believed."""

    attempt: str
    kind: str
    release: str
    bundle: str
    version: str
    security_version: int
    statement: bytes
    signatures: tuple[Signature, ...]
    binaries: tuple[Binary, ...]
    lease_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt,
            "kind": self.kind,
            "release": self.release,
            "bundle": self.bundle,
            "version": self.version,
            "security_version": self.security_version,
            "statement": base64.b64encode(self.statement).decode(),
            "signatures": [{"key_id": one.key_id, "signature": one.signature.hex()} for one in self.signatures],
            "binaries": [
                {
                    "digest": one.digest,
                    "size": one.size,
                    "target": one.target,
                    "metadata": one.metadata,
                    "metadata_digest": one.metadata_digest,
                    "url": one.url,
                }
                for one in self.binaries
            ],
            "lease_s": self.lease_s,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Offer:
        get = _Fields(body)
        kind = get.text("kind")
        if kind not in {"forward", "rollback"}:
            raise _malformed(f"kind {kind[:32]!r} is not known")
        return Offer(
            attempt=get.text("attempt"),
            kind=kind,
            release=get.text("release"),
            bundle=get.text("bundle"),
            version=get.text("version"),
            security_version=get.whole("security_version"),
            statement=_base64(get.text("statement"), "statement"),
            signatures=tuple(_signature(one) for one in get.objects("signatures")),
            binaries=tuple(_binary(one) for one in get.objects("binaries")),
            lease_s=get.number("lease_s", 0.0),
        )


@dataclass(frozen=True, slots=True)
class Go:
    """Leave to switch slots, for so long on the monotonic clock."""

    attempt: str
    valid_for_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a check-in; ``kind`` is one of :data:`ANSWERS` and says which of the others is set."""

    kind: str
    poll_after_s: float
    reports_accepted_through: int
    reasons: tuple[str, ...] = ()
    offer: Offer | None = None
    go: Go | None = None
    attempt: str = ""
    """The attempt of ``wait`` and ``cancel``."""
    server_time: float | None = None
    """Seconds since the epoch by the gateway's clock, when it said so."""

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Answer:
        get = _Fields(body)
        kind = get.text("answer")
        if kind not in ANSWERS:
            raise _malformed(f"answer {kind[:32]!r} is not known")
        poll = get.number("poll_after_s")
        if not 0 <= poll <= _MAX_POLL_S:
            raise _malformed("poll_after_s is out of range")
        offer = Offer.from_json(get.nested("offer").body) if kind == "offer" else None
        go = None
        if kind == "go":
            part = get.nested("go")
            go = Go(part.text("attempt"), part.number("valid_for_s"))
        return Answer(
            kind=kind,
            poll_after_s=poll,
            reports_accepted_through=get.whole("reports_accepted_through", 0),
            reasons=tuple(_Fields(one).text("code", "") for one in get.objects("reasons", optional=True)),
            offer=offer,
            go=go,
            attempt=get.nested(kind).text("attempt") if kind in {"wait", "cancel"} else "",
            server_time=_instant(get.text("server_time", "")),
        )


def _instant(text: str) -> float | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found.timestamp() if found.tzinfo is not None else None


def _malformed(message: str) -> TransportError:
    return TransportError("MALFORMED_ANSWER", message)


class _Fields:
    """Typed access to an untrusted JSON object."""

    __slots__ = ("body",)

    def __init__(self, body: object) -> None:
        if not isinstance(body, Mapping):
            raise _malformed("an object was expected")
        self.body: Mapping[str, Any] = body

    def _get(self, key: str, default: object) -> object:
        value: object = self.body.get(key)
        if value is None:
            if default is None:
                raise _malformed(f"{key} is missing")
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise _malformed(f"{key} is not a string")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
            raise _malformed(f"{key} is not a whole number of at most 64 bits")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise _malformed(f"{key} is not a number that is zero or more")
        return float(value)

    def nested(self, key: str) -> _Fields:
        return _Fields(self._get(key, None))

    def objects(self, key: str, *, optional: bool = False) -> list[object]:
        value = self._get(key, [] if optional else None)
        if not isinstance(value, list):
            raise _malformed(f"{key} is not a list")
        return value


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(f"{what} is not base64") from None


def _signature(body: object) -> Signature:
    get = _Fields(body)
    text = get.text("signature")
    # 64 bytes are 128 hex digits or 88 characters of base64: their lengths tell them apart.
    try:
        raw = bytes.fromhex(text) if len(text) == 128 else _base64(text, "signature")
    except ValueError:
        raise _malformed("signature is not hex") from None
    return Signature(get.text("key_id"), raw)


def _binary(body: object) -> Binary:
    get = _Fields(body)
    metadata = get.body.get("metadata", "{}")
    if isinstance(metadata, Mapping):
        # Sent as an object instead of its text: the digest decides whether this is what was signed.
        metadata = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    if not isinstance(metadata, str):
        raise _malformed("metadata is neither a JSON text nor an object")
    return Binary(
        get.text("digest"),
        get.whole("size"),
        get.text("target"),
        metadata,
        get.text("metadata_digest"),
        get.text("url"),
    )
