"""Independent checker: recomputes what must hold from the raw log.

It reads Kafka with a plain consumer and the protos, and imports nothing of ``libs`` or ``services``: a mistake there
cannot hide here. It answers with a list of checks, each true or false with figures:

* every private record continues its organization's audit chain;
* in flight per rollout and stage, recounted at every event, never exceeds the cap then in force, equals the count the
  event itself claims, and reaches each cap it is told to expect;
* no offer in the check-in topic without a ``GRANTED`` event, no ``go`` without ``GO_GIVEN``;
* no forward grant of a named bundle outside the cohorts allowed for it;
* no grant of a security version below what the device has confirmed;
* every acknowledged request id stands in the log as exactly one command;
* an organization named idle has no event after its creation;
* the list of public events that a webhook subscription must have delivered, for comparison with the receiver's.

Run: ``python -m demo.checker --kafka HOST:PORT --env dev --expect expect.json --output result.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from google.protobuf import symbol_database
from google.protobuf.message import Message
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.eventlog.v1 import eventlog_pb2
from groundswell.pki.v1 import events_pb2 as pki_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2
from groundswell.webhooks.v1 import events_pb2 as webhooks_events

SERVICES: Final = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
MODULES: Final = (
    registry_events,
    pki_events,
    artifacts_events,
    releases_events,
    rollout_events,
    webhooks_events,
    eventlog_pb2,
)
S: Final = device_pb2
IN_FLIGHT: Final = frozenset(
    {
        S.ATTEMPT_STATE_GRANTED,
        S.ATTEMPT_STATE_ACCEPTED,
        S.ATTEMPT_STATE_DOWNLOADING,
        S.ATTEMPT_STATE_DOWNLOADED,
        S.ATTEMPT_STATE_INSTALLED,
        S.ATTEMPT_STATE_BOOTED,
    }
)
Slot = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a log with its envelope."""

    topic: str
    partition: int
    position: int
    envelope: eventlog_pb2.Envelope
    raw_envelope: bytes
    value: bytes
    event_type: str

    def message(self) -> Message:
        """The decoded value; an unknown type is an error here, not a shrug."""
        return symbol_database.Default().GetSymbol(self.event_type).FromString(self.value)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold."""

    name: str
    holds: bool
    detail: str


@dataclass(slots=True)
class Logs:
    """Everything read: private and public entries by service, and check-in batches."""

    private: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    public: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    batches: list[device_pb2.CheckInBatch] = field(default_factory=list)


async def read_topic(bootstrap: str, topic: str) -> list[Any]:
    """All committed records of a topic, in order per partition, up to its present end."""
    # Without a group a consumer is given every partition of its topic when it starts.
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        assigned = sorted(consumer.assignment(), key=lambda partition: partition.partition)
        if not assigned:
            raise RuntimeError(f"topic {topic} has no partitions")
        ends = await consumer.end_offsets(assigned)
        records: dict[TopicPartition, list[Any]] = {partition: [] for partition in assigned}
        waiting = {partition for partition in assigned if ends[partition] > 0}
        while waiting:
            for partition, batch in (await consumer.getmany(timeout_ms=500, max_records=5000)).items():
                records[partition].extend(record for record in batch if record.offset < ends[partition])
            waiting = {partition for partition in waiting if await consumer.position(partition) < ends[partition]}
        return [record for partition in assigned for record in records[partition]]
    finally:
        await consumer.stop()


def to_entry(record: Any) -> Entry:
    """A log record with its envelope decoded."""
    headers = dict(record.headers)
    raw = headers["envelope"]
    return Entry(
        record.topic,
        record.partition,
        record.offset,
        eventlog_pb2.Envelope.FromString(raw),
        raw,
        record.value,
        headers["event-type"].decode(),
    )


async def read_logs(bootstrap: str, env: str) -> Logs:
    """Every topic of the installation."""
    logs = Logs()
    for service in SERVICES:
        for kind, target in (("events", logs.private), ("public", logs.public)):
            for record in await read_topic(bootstrap, f"{env}.{service}.{kind}.v1"):
                target[service].append(to_entry(record))
    for record in await read_topic(bootstrap, f"{env}.device.checkins.v1"):
        logs.batches.append(device_pb2.CheckInBatch.FromString(record.value))
    return logs


def check_audit_chain(logs: Logs) -> Check:
    """Each private record names the hash of its organization's record before it."""
    broken: list[str] = []
    count = 0
    for service, entries in logs.private.items():
        heads: dict[str, bytes] = {}
        for entry in entries:
            organization = entry.envelope.organization
            if not organization:
                continue
            count += 1
            if entry.envelope.prev_hash != heads.get(organization, b""):
                broken.append(f"{service}/{entry.partition}@{entry.position}")
            heads[organization] = hashlib.sha256(entry.raw_envelope + entry.value).digest()
    return Check(
        "audit chain unbroken", not broken, f"{count} records" + (f", broken at {broken[:3]}" if broken else "")
    )


@dataclass(slots=True)
class RolloutRecount:
    """In flight recounted event by event; what was seen on the way."""

    caps: dict[Slot, int] = field(default_factory=dict)
    in_flight: Counter[Slot] = field(default_factory=Counter)
    peak: Counter[Slot] = field(default_factory=Counter)
    attempts: dict[str, rollout_pb2.Attempt] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)
    go: set[str] = field(default_factory=set)
    over_cap: list[str] = field(default_factory=list)
    disagree: list[str] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    floor: dict[str, int] = field(default_factory=dict)

    def apply(self, entry: Entry) -> None:
        """Fold one private event of rollout."""
        message = entry.message()
        if isinstance(message, rollout_events.RolloutSaved):
            for index, stage in enumerate(message.rollout.stages):
                self.caps[(message.rollout.name, index)] = stage.max_in_flight or 100
        elif isinstance(message, rollout_events.AttemptGranted):
            self._grant(entry, message)
        elif isinstance(message, rollout_events.AttemptMoved):
            self._move(entry, message)
        elif isinstance(message, rollout_events.GoGiven):
            self.go.add(message.attempt)

    def _grant(self, entry: Entry, granted: rollout_events.AttemptGranted) -> None:
        attempt = granted.attempt
        slot = (attempt.rollout, attempt.stage)
        if attempt.rollout and self.in_flight[slot] >= self.caps.get(slot, 0):
            self.over_cap.append(f"{slot}@{entry.position}")
        self.attempts[attempt.name] = attempt
        self.state[attempt.name] = S.ATTEMPT_STATE_GRANTED
        self.in_flight[slot] += 1
        self.peak[slot] = max(self.peak[slot], self.in_flight[slot])
        if attempt.rollout and granted.in_flight_after != self.in_flight[slot]:
            self.disagree.append(f"{slot}@{entry.position}: {granted.in_flight_after} != {self.in_flight[slot]}")
        if attempt.security_version < self.floor.get(attempt.device, 0):
            self.lowered.append(f"{attempt.device}@{entry.position}")

    def _move(self, entry: Entry, moved: rollout_events.AttemptMoved) -> None:
        attempt = self.attempts.get(moved.attempt)
        if attempt is None:
            self.disagree.append(f"unknown attempt moved @{entry.position}")
            return
        slot = (attempt.rollout, attempt.stage)
        before, after = self.state[moved.attempt] in IN_FLIGHT, moved.state in IN_FLIGHT
        self.in_flight[slot] += int(after) - int(before)
        self.peak[slot] = max(self.peak[slot], self.in_flight[slot])
        self.state[moved.attempt] = moved.state
        if attempt.rollout and moved.in_flight_after != self.in_flight[slot]:
            self.disagree.append(f"{slot}@{entry.position}: {moved.in_flight_after} != {self.in_flight[slot]}")
        if moved.state == S.ATTEMPT_STATE_CONFIRMED:
            self.floor[attempt.device] = max(self.floor.get(attempt.device, 0), attempt.security_version)


def check_rollouts(logs: Logs, expect: dict[str, Any]) -> list[Check]:
    """Caps, grants, go, cohorts and security versions."""
    organization = expect["organization"]
    recount = RolloutRecount()
    for entry in logs.private["rollout"]:
        if entry.envelope.organization == organization:
            recount.apply(entry)
    caps = {tuple(item[:2]): item[2] for item in expect.get("caps_reached", [])}
    missed = [f"{slot}: {recount.peak[slot]} of {cap}" for slot, cap in caps.items() if recount.peak[slot] != cap]
    peaks = ", ".join(
        f"{name.rsplit('/', 1)[-1]}[{stage}]={peak}" for (name, stage), peak in sorted(recount.peak.items())
    )
    items = [item for batch in logs.batches if batch.organization == organization for item in batch.items]
    offers = [item for item in items if item.receipt.answer == "offer"]
    orphans = [item.receipt.attempt for item in offers if item.receipt.attempt not in recount.attempts]
    gos = [item.receipt.attempt for item in items if item.receipt.answer == "go"]
    stray_gos = [name for name in gos if name not in recount.go]
    checks = [
        Check("in flight never above a cap", not recount.over_cap, peaks or "no grants"),
        Check(
            "in flight equals the log's own count",
            not recount.disagree,
            "; ".join(recount.disagree[:3]) or "at every event",
        ),
        Check("every cap was reached", not missed, "; ".join(missed) or f"{len(caps)} stages"),
        Check(
            "no offer without a grant",
            not orphans and bool(offers),
            f"{len(offers)} offers, {len(recount.attempts)} grants",
        ),
        Check("no go without GO_GIVEN", not stray_gos and bool(gos), f"{len(gos)} times go"),
        Check("no security version lowered", not recount.lowered, f"{len(recount.floor)} devices with a floor"),
    ]
    cohort_of = {
        message.device.name: message.device.cohort
        for entry in logs.public["registry"]
        if isinstance(message := entry.message(), registry_events.DeviceChanged)
    }
    for bundle, cohorts in expect.get("bundle_only_in_cohorts", {}).items():
        granted = [
            a for a in recount.attempts.values() if a.bundle == bundle and a.kind == rollout_pb2.Attempt.KIND_FORWARD
        ]
        outside = [a.device for a in granted if cohort_of.get(a.device) not in cohorts]
        label = bundle.rsplit("/", 1)[-1]
        checks.append(Check(f"no offer of {label} outside its cohorts", not outside, f"{len(granted)} grants"))
    running = {attempt.device: (name, recount.state[name]) for name, attempt in recount.attempts.items()}
    checks.append(
        Check(
            "every device with a grant has an outcome",
            not [device for device, (_, state) in running.items() if state in IN_FLIGHT],
            f"{len(running)} devices",
        )
    )
    return checks


def check_commands(logs: Logs, request_ids: Iterable[str]) -> Check:
    """Each acknowledged request id is one command: one result, events side by side."""
    results: Counter[str] = Counter()
    for entries in logs.private.values():
        for entry in entries:
            if entry.envelope.request_id and entry.envelope.result_type:
                results[entry.envelope.request_id] += 1
    wanted = list(request_ids)
    wrong = [request for request in wanted if results[request] != 1]
    doubled = [request for request, count in results.items() if count > 1]
    detail = f"{len(wanted)} acknowledged" + (f", wrong: {wrong[:3]} {doubled[:3]}" if wrong or doubled else "")
    return Check("every acknowledged command exactly once", not wrong and not doubled, detail)


def check_idle(logs: Logs, organization: str, allowed: set[str]) -> Check:
    """An idle organization has only the events of its creation."""
    others = [
        f"{service}:{entry.event_type}@{entry.position}"
        for service, entries in logs.private.items()
        for entry in entries
        if entry.envelope.organization == organization and entry.event_type not in allowed
    ]
    return Check(f"organization {organization} untouched", not others, ", ".join(others[:3]) or "only its creation")


def expected_webhooks(logs: Logs, organization: str, since_ms: int) -> dict[str, str]:
    """Event id → type of all public events of the organization decided after a time, in milliseconds."""
    entries = (
        entry
        for log in logs.public.values()
        for entry in log
        if entry.envelope.organization == organization and entry.envelope.occurred_at_ms >= since_ms
    )
    changes = ((entry.envelope.event_id, getattr(entry.message(), "change", "")) for entry in entries)
    return {event: change for event, change in changes if change and not change.startswith("webhook.")}


async def run(bootstrap: str, env: str, expect: dict[str, Any]) -> dict[str, Any]:
    """All checks as JSON."""
    logs = await read_logs(bootstrap, env)
    checks = [check_audit_chain(logs), *check_rollouts(logs, expect)]
    checks.append(check_commands(logs, expect.get("request_ids", [])))
    allowed = set(expect.get("idle_allowed_events", []))
    checks.extend(check_idle(logs, organization, allowed) for organization in expect.get("idle_organizations", []))
    webhooks = expect.get("webhooks", {})
    return {
        "checks": [{"name": check.name, "holds": check.holds, "detail": check.detail} for check in checks],
        "webhook_events": expected_webhooks(logs, webhooks["organization"], webhooks["since_ms"]) if webhooks else {},
    }


def main() -> int:
    """Command line: exit status 0 only when every check holds."""
    parser = argparse.ArgumentParser(description="Recompute from the raw log what must hold.")
    parser.add_argument("--kafka", required=True, help="bootstrap servers")
    parser.add_argument("--env", required=True, help="topic prefix of the installation")
    parser.add_argument("--expect", type=Path, required=True, help="JSON file that says what to expect")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    expect = json.loads(arguments.expect.read_text())
    result = asyncio.run(run(arguments.kafka, arguments.env, expect))
    arguments.output.write_text(json.dumps(result, indent=1))
    for check in result["checks"]:
        print(f"{'ok  ' if check['holds'] else 'FAIL'} {check['name']}: {check['detail']}")
    return 0 if all(check["holds"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
