"""``ListAuditRecords`` for every service: an organization's private records with their hash chain, from the log."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.audit.v1 import audit_pb2, audit_pb2_grpc
from groundswell.eventlog.v1 import eventlog_pb2

from libs.errors import InvalidArgumentError
from libs.eventlog import partition_of
from libs.eventlog.codec import ENVELOPE, EVENT_TYPE, header, record_hash
from libs.eventlog.config import events_topic
from libs.eventlog.ports import EventLog, Record, TopicPartition
from libs.names import organization_of
from libs.settings import Settings

PAGE: Final = 1000
SCAN: Final = 20_000
"""Records of all organizations of the partition that one call reads at most; the page token goes on from there."""


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Reads the partition from where the page token says, up to the log's end at the time of the call."""

    def __init__(self, log: EventLog, settings: Settings, service: str) -> None:
        self._log = log
        self._settings = settings
        self._topic = events_topic(settings.env, service)

    async def ListAuditRecords(self, request: Any, context: Any) -> audit_pb2.ListAuditRecordsResponse:
        organization = organization_of(request.parent)
        size = min(request.page_size or 100, PAGE)
        start = _position(request.page_token)
        at = TopicPartition(self._topic, partition_of(organization, self._settings.partitions))
        records: list[audit_pb2.AuditRecord] = []
        token = ""
        scanned = 0
        async with aclosing(_read(self._log, at, start)) as reading:
            async for record in reading:
                if len(records) == size or scanned == SCAN:
                    token = str(record.position)
                    break
                scanned += 1
                envelope_bytes = header(record, ENVELOPE)
                envelope = eventlog_pb2.Envelope.FromString(envelope_bytes)
                if envelope.organization == organization and envelope.resource:
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


async def _read(log: EventLog, at: TopicPartition, start: int) -> AsyncGenerator[Record, None]:
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
        event_type=header(record, EVENT_TYPE).decode(),
        resource=envelope.resource,
        principal=envelope.principal,
        occur_time=time,
        hash=record_hash(raw, record.value).hex(),
        previous_hash=envelope.prev_hash.hex(),
    )
