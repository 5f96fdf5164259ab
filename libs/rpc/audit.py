"""``ListAuditRecords`` for every service: an organization's private records with their hash chain, read from the log."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.audit.v1 import audit_pb2, audit_pb2_grpc
from groundswell.eventlog.v1 import eventlog_pb2

from libs.errors import InvalidArgumentError
from libs.eventlog import partition_of
from libs.eventlog.codec import header
from libs.eventlog.config import events_topic
from libs.eventlog.ports import EventLog, Record, TopicPartition
from libs.names import organization_of
from libs.settings import Settings

PAGE: Final = 1000


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Reads the partition from where the page token says, up to the log's end at the time of the call."""

    def __init__(self, log: EventLog, settings: Settings, service: str) -> None:
        self._log = log
        self._settings = settings
        self._topic = events_topic(settings.env, service)

    async def ListAuditRecords(self, request: Any, context: Any) -> audit_pb2.ListAuditRecordsResponse:  # noqa: N802
        organization = organization_of(request.parent)
        size = min(request.page_size or 100, PAGE)
        start = _position(request.page_token)
        at = TopicPartition(self._topic, partition_of(organization, self._settings.partitions))
        records: list[audit_pb2.AuditRecord] = []
        token = ""
        async for record in _read(self._log, at, start):
            envelope_bytes = header(record, "envelope")
            envelope = eventlog_pb2.Envelope.FromString(envelope_bytes)
            if envelope.organization != organization:
                continue
            if len(records) == size:
                token = str(record.position)
                break
            if envelope.resource:
                records.append(_audit_record(record, envelope, envelope_bytes))
        return audit_pb2.ListAuditRecordsResponse(audit_records=records, next_page_token=token)


def _position(token: str) -> int:
    if not token:
        return 0
    if not token.isdigit() or len(token) > 18:
        raise InvalidArgumentError(
            "INVALID_FIELD", "page_token is not one that this server gave out", field="page_token"
        )
    return int(token)


async def _read(log: EventLog, at: TopicPartition, start: int) -> AsyncIterator[Record]:
    end = (await log.end_positions([at]))[at]
    if start >= end:
        return
    tail = await log.open_tail({at: start})
    try:
        while tail.position(at) < end:
            for record in await tail.fetch(1.0):
                if record.position < end:
                    yield record
    finally:
        await tail.close()


def _audit_record(record: Record, envelope: eventlog_pb2.Envelope, raw: bytes) -> audit_pb2.AuditRecord:
    time = Timestamp()
    time.FromMilliseconds(envelope.occurred_at_ms)
    return audit_pb2.AuditRecord(
        event_id=envelope.event_id,
        event_type=header(record, "event-type").decode(),
        resource=envelope.resource,
        principal=envelope.principal,
        occur_time=time,
        hash=hashlib.sha256(raw + record.value).hexdigest(),
        previous_hash=envelope.prev_hash.hex(),
    )
