"""The device API's bodies: strict where a mistake would matter, deaf to fields it does not know.

Shapes are those of docs/device-api.md. ``parse`` either returns a frozen :class:`CheckInBody` or raises a
``DomainError`` with a reason; it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

import msgspec
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2

from libs.errors import InvalidArgumentError

MAX_BODY: Final = 16 * 1024
MAX_REPORTS: Final = 64
MAX_PAIRS: Final = 32
MAX_TEXT: Final = 512
MAX_COUNTER: Final = 2**63 - 1

ReportedStateName = Literal[
    "ACCEPTED", "DOWNLOADING", "DOWNLOADED", "INSTALLED", "BOOTED", "CONFIRMED", "FAILED", "REVERTED"
]


class Agent(msgspec.Struct, frozen=True):
    """Which run of which agent speaks, and the counter of this check-in."""

    instance: str
    boot_id: str
    counter: int


class Running(msgspec.Struct, frozen=True):
    """What runs, as one atomic state."""

    version: str = ""
    release: str = ""
    bundle: str = ""
    slot: str = ""
    security_version: int = 0


class AttemptAsk(msgspec.Struct, frozen=True):
    """The attempt worked on; ``ask`` is ``go`` when the device wants to switch slots."""

    name: str
    ask: Literal["", "go"] = ""


class ReportBody(msgspec.Struct, frozen=True):
    """One step of an attempt."""

    counter: int
    attempt: str
    state: ReportedStateName
    code: str = ""
    detail: str = ""


class CheckInBody(msgspec.Struct, frozen=True):
    """A whole check-in."""

    agent: Agent
    running: Running
    attempt: AttemptAsk | None = None
    reports: tuple[ReportBody, ...] = ()
    attributes: dict[str, str] = msgspec.field(default_factory=dict)
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    device: str = ""
    """Never used as identity; a value that is not the certificate's is refused."""


_decoder = msgspec.json.Decoder(CheckInBody)
_encoder = msgspec.json.Encoder()
_UUID: Final = re.compile(r"[0-9a-fA-F-]{8,64}\Z")
_CODE: Final = re.compile(r"[A-Z0-9_]{0,64}\Z")


def parse(raw: bytes) -> CheckInBody:
    """Decode and check a body. Raises MALFORMED_BODY or INVALID_FIELD."""
    try:
        body = _decoder.decode(raw)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgumentError("MALFORMED_BODY", f"the body is not a check-in: {error}") from None
    _check(body)
    return body


def _check(body: CheckInBody) -> None:
    for field, value in (("agent.instance", body.agent.instance), ("agent.boot_id", body.agent.boot_id)):
        if not _UUID.match(value):
            raise _invalid(field, "must be a UUID")
    if not 0 < body.agent.counter <= MAX_COUNTER:
        raise _invalid("agent.counter", "must be between 1 and 2^63 - 1")
    if not 0 <= body.running.security_version <= MAX_COUNTER:
        raise _invalid("running.security_version", "must be between 0 and 2^63 - 1")
    if len(body.reports) > MAX_REPORTS:
        raise _invalid("reports", f"at most {MAX_REPORTS}")
    previous = 0
    for report in body.reports:
        if not 0 < report.counter <= MAX_COUNTER or report.counter <= previous:
            raise _invalid("reports.counter", "counters of reports must rise")
        previous = report.counter
        if not report.attempt or len(report.attempt) > MAX_TEXT or len(report.detail) > MAX_TEXT:
            raise _invalid("reports", f"attempt is required; texts hold at most {MAX_TEXT} characters")
        if not _CODE.match(report.code):
            raise _invalid("reports.code", "must be UPPER_SNAKE, at most 64 characters")
    if body.attempt and len(body.attempt.name) > MAX_TEXT:
        raise _invalid("attempt.name", f"at most {MAX_TEXT} characters")
    for field, size in (("attributes", len(body.attributes)), ("metrics", len(body.metrics))):
        if size > MAX_PAIRS:
            raise _invalid(field, f"at most {MAX_PAIRS}")


def _invalid(field: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_FIELD", f"{field}: {why}", field=field)


def running_state(running: Running) -> registry_pb2.ReportedState:
    """The running state as the log keeps it."""
    return registry_pb2.ReportedState(
        release=running.release[:MAX_TEXT],
        bundle=running.bundle[:MAX_TEXT],
        version=running.version[:128],
        security_version=running.security_version,
    )


def reports(body: CheckInBody) -> list[device_pb2.Report]:
    """Reports as the log keeps them."""
    return [
        device_pb2.Report(
            counter=report.counter,
            attempt=report.attempt,
            state=device_pb2.AttemptState.Value(f"ATTEMPT_STATE_{report.state}"),
            code=report.code,
            detail=report.detail,
        )
        for report in body.reports
    ]


def reasons_json(reasons: Iterable[device_pb2.Reason]) -> bytes:
    """Reasons as the device API writes them."""
    return _encoder.encode([{"code": one.code, "message": one.message, "subject": one.subject} for one in reasons])
