"""The raw log, read by a plain consumer that shares no code with the services."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events

from demo import checker
from demo.checker import Entry, Logs
from demo.steps import wait_until
from tests.e2e.stack import Stack

S = device_pb2


def read(stack: Stack) -> Logs:
    """Everything that is committed now."""
    return asyncio.run(checker.read_logs(stack.settings.kafka, stack.settings.env))


def entries(stack: Stack, service: str, organization: str, kind: str = "events") -> list[Entry]:
    """Records of one service and organization."""
    topic = f"{stack.settings.env}.{service}.{kind}.v1"
    records = asyncio.run(checker.read_topic(stack.settings.kafka, topic))
    found = [checker.to_entry(record) for record in records]
    return [entry for entry in found if entry.envelope.organization == organization]


def of_organization(logs: Logs, organization: str) -> dict[str, list[tuple[int, str]]]:
    """Position and type of each of its records, private and public, by service."""
    return {
        f"{service}.{kind}": [
            (entry.position, entry.event_type) for entry in found if entry.envelope.organization == organization
        ]
        for kind, log in (("events", logs.private), ("public", logs.public))
        for service, found in log.items()
    }


@contextlib.contextmanager
def unchanged(stack: Stack, *organizations: str) -> Iterator[None]:
    """What happens inside leaves no trace in any log of these organizations."""
    before = settled(stack, *organizations)
    yield
    after = settled(stack, *organizations)
    new = [
        (log, entry)
        for then, now in zip(before, after, strict=True)
        for log, entries_now in now.items()
        for entry in entries_now[len(then[log]) :]
    ]
    assert not new, new


def settled(stack: Stack, *organizations: str) -> list[dict[str, list[tuple[int, str]]]]:
    """What the logs hold of these organizations once nothing more comes: services go on telling each other of what
    was done before, and each reading of all logs takes longer than they do."""

    def now() -> list[dict[str, list[tuple[int, str]]]]:
        logs = read(stack)
        return [of_organization(logs, organization) for organization in organizations]

    seen = [now()]
    wait_until("the logs to be still", 30, lambda: (seen.append(now()) or seen[-3:]) == [seen[-1]] * 3, 0.1)
    return seen[-1]


def check(stack: Stack, organization: str, request_ids: Sequence[str], **expect: Any) -> None:
    """Every check of the independent checker holds."""
    asked = {"organization": organization, "request_ids": list(request_ids), **expect}
    result = asyncio.run(checker.run(stack.settings.kafka, stack.settings.env, asked))
    wrong = [found for found in result["checks"] if not found["holds"]]
    assert not wrong, wrong


def check_commands(stack: Stack, request_ids: Sequence[str]) -> None:
    """Each acknowledged request id is exactly one command of the log."""
    found = checker.check_commands(read(stack), request_ids)
    assert found.holds, found.detail


def confirmations(stack: Stack, organization: str, rollout: str) -> Counter[str]:
    """How often the log says, of each device, that it confirmed the rollout's bundle."""
    attempts: dict[str, str] = {}
    confirmed: Counter[str] = Counter()
    for entry in entries(stack, "rollout", organization):
        message = entry.message()
        if isinstance(message, rollout_events.AttemptGranted) and message.attempt.rollout == rollout:
            attempts[message.attempt.name] = message.attempt.device
        elif isinstance(message, rollout_events.AttemptMoved) and message.attempt in attempts:
            confirmed[attempts[message.attempt]] += message.state == S.ATTEMPT_STATE_CONFIRMED
    return confirmed
