"""One partition of the registry, driven command by command, without a log."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.errors import GroundswellError
from libs.eventlog import Decision, Event, Foreign, Task, Timer, TimerFired
from services.registry import domain as ask
from services.registry.domain import Quotas, Registry, State

ORG = "organizations/acme"
PUMP = f"{ORG}/products/pump"
OWNER = f"{ORG}/apiKeys/first"
PRINT = "ab" * 32
SHA = bytes(range(32))


class World:
    """One partition, driven command by command."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self.registry = Registry(quotas)
        self.state: State = self.registry.initial_state(0)
        self.versions: dict[str, int] = {}
        self.now_ms = 1_000_000
        self.organization = "acme"
        self.principal = OWNER
        self.events = 0
        self.commands = 0
        self.published: list[Any] = []
        self.tasks: dict[str, Task] = {}
        self.timers: dict[str, Timer] = {}

    def version(self, resource: str) -> int:
        return self.versions.get(resource, 0)

    def parked(self, resource: str) -> bool:
        return False

    def new_uuid(self, purpose: str = "") -> str:
        # As the runtime does: the same purpose in one command gives the same id.
        return str(uuid.uuid5(uuid.UUID(int=self.commands), purpose))

    def do(self, command: object, principal: str = OWNER) -> Any:
        self.principal = principal
        self.commands += 1
        decision: Decision = self.registry.decide(self.state, command, self)
        for new in decision.events:
            self.versions[new.resource] = self.version(new.resource) + 1
            version = self.versions[new.resource]
            event = Event(new.organization, new.resource, version, new.payload, self.now_ms, principal)
            self.state = self.registry.evolve(self.state, event)
            self.published += [public.payload for public in new.public]
        for task_id in decision.close_tasks:
            self.tasks.pop(task_id, None)
        self.tasks.update({task.task_id: task for task in decision.open_tasks})
        for timer_id in decision.clear_timers:
            self.timers.pop(timer_id, None)
        self.timers.update({timer.timer_id: timer for timer in decision.set_timers})
        self.events += len(decision.events)
        return decision.result

    def wait(self, ms: int) -> None:
        """Time goes on, and what is due fires."""
        self.now_ms += ms
        for timer in sorted(self.timers.values(), key=lambda one: one.at_ms):
            if timer.at_ms <= self.now_ms:
                del self.timers[timer.timer_id]
                self.do(TimerFired(timer.timer_id, timer.kind, timer.payload), "timer")

    def work(self) -> None:
        """Run the open tasks until none is left."""
        while self.tasks:
            for task in list(self.tasks.values()):
                self.do(ask.AdvanceDeviceImport(task.payload.decode()), "task")

    def attempt(self, device: str, number: int, state: int, **more: Any) -> None:
        """Rollout says how an attempt ended."""
        name = f"{device}/attempts/{number}"
        image = rollout_pb2.Attempt(name=name, device=device, state=state, **more)  # type: ignore[arg-type]
        payload = rollout_events.AttemptChanged(attempt=image, change="device.update_failed")
        self.do(Foreign("rollout", "t", 0, number, number, "acme", name, payload, self.now_ms), "inbox")

    def changes(self) -> list[str]:
        """What was published, by its change."""
        return [record.change for record in self.published]

    def refused(self, kind: type[GroundswellError], reason: str, command: object, principal: str = OWNER) -> Any:
        before = self.state
        with pytest.raises(kind) as error:
            self.do(command, principal)
        assert error.value.reason == reason
        assert self.state is before
        return error.value

    def refused_view(self, read: Callable[[], object]) -> GroundswellError:
        """Of a read that is refused."""
        with pytest.raises(GroundswellError) as error:
            read()
        return error.value

    def key(self, key_id: str, role: str, scopes: tuple[str, ...] = ("*",), principal: str = OWNER) -> str:
        """A key of a new member with that role."""
        member = self.do(ask.CreateMember(ORG, f"m-{key_id}", pb.Member(role=role)), principal)
        made = pb.ApiKey(member=member.name, scopes=scopes, secret_sha256=SHA)
        return str(self.do(ask.CreateApiKey(ORG, key_id, made), principal).name)


def furnished() -> World:
    """With an organization, two products and a cohort in each."""
    made = World()
    made.do(ask.CreateOrganization("acme", "Acme", "first", SHA), "organizations/platform/apiKeys/bootstrap")
    made.do(ask.CreateProduct(ORG, "pump", pb.Product(display_name="Pump")))
    made.do(ask.CreateProduct(ORG, "valve", pb.Product()))
    made.do(ask.CreateCohort(PUMP, "canary", pb.Cohort()))
    made.do(ask.CreateCohort(f"{ORG}/products/valve", "other", pb.Cohort()))
    return made


FAILED = device_pb2.ATTEMPT_STATE_FAILED
REVERTED = device_pb2.ATTEMPT_STATE_REVERTED
CONFIRMED = device_pb2.ATTEMPT_STATE_CONFIRMED
