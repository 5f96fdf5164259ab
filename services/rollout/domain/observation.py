"""What a check-in said of its device, as long as no event holds it.

It becomes part of the next event that follows from the same check-in, or an event of its own when none does.
"""

from __future__ import annotations

from typing import NamedTuple

from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2

from libs.eventlog.model import Public
from services.rollout.domain.draft import Draft
from services.rollout.domain.state import Running


def reported_proto(it: Running) -> registry_pb2.ReportedState:
    """As on the wire."""
    return registry_pb2.ReportedState(
        release=it.release, bundle=it.bundle, version=it.version, security_version=it.security_version
    )


class Observation(NamedTuple):
    """``change`` is what others are told, with what ran ``before``; empty when nothing but a counter is new."""

    payload: events_pb2.DeviceObserved
    before: Running
    change: str = ""

    def public(self) -> tuple[Public, ...]:
        """What others see of it."""
        if not self.change:
            return ()
        payload = self.payload
        record = events_pb2.DeviceReported(
            device=payload.device, running=payload.running, previous=reported_proto(self.before), change=self.change
        )
        return (Public(payload.device, record),)

    def touch(self, draft: Draft) -> None:
        """The rollout that what ran before belongs to may have one more back."""
        owner = draft.state.owners.get(self.before.release) if self.change else ""
        if owner:
            draft.touched[owner] = None

    def emit(self, draft: Draft) -> None:
        """An event of its own."""
        draft.emit(self.payload.device, self.payload, lambda _state: self.public())
        self.touch(draft)
