"""A decision in the making: each event is folded at once, so that the next item of a batch sees it.

This is what makes caps exact inside a batch of claims: the five-hundredth device is judged on the state that the first
four hundred and ninety-nine left behind.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from libs.eventlog.model import Context, Decision, Event, NewEvent, Public, Task, Timer
from services.rollout.domain.evolve import evolve
from services.rollout.domain.state import State

MAX_EVENTS = 500
"""Long work stops near this many events and goes on with a timer, so that other organizations get their turn."""


def organization_of(resource: str) -> str:
    """Organization id of a resource name."""
    return resource.split("/", 2)[1]


class Draft:
    """State as it would be, and everything that leads there."""

    __slots__ = ("_folded", "_versions", "closed", "ctx", "events", "state", "tasks", "timers", "touched")

    def __init__(self, state: State, ctx: Context) -> None:
        self.state = state
        self.ctx = ctx
        self.events: list[NewEvent] = []
        self.tasks: list[Task] = []
        self.closed: list[str] = []
        self.timers: list[Timer] = []
        self.touched: dict[str, None] = {}
        """Rollouts whose gates must be looked at again."""
        self._folded: list[State] = []
        self._versions: dict[str, int] = {}

    @property
    def full(self) -> bool:
        """Whether long work must stop here and go on later."""
        return len(self.events) >= MAX_EVENTS

    def next_version(self, resource: str) -> int:
        """Version the aggregate will have after its next event."""
        return self.ctx.version(resource) + self._versions.get(resource, 0) + 1

    def emit(
        self,
        resource: str,
        payload: Message,
        public: Callable[[State], tuple[Public, ...]] | None = None,
        *,
        organization: str = "",
    ) -> None:
        """Append an event and fold it; ``public`` is asked for the after-images on the folded state."""
        organization = organization or organization_of(resource)
        own = self._versions[resource] = self._versions.get(resource, 0) + 1
        version = self.ctx.version(resource) + own
        event = Event(organization, resource, version, payload, self.ctx.now_ms, self.ctx.principal)
        self.state = evolve(self.state, event)
        self._folded.append(self.state)
        records = public(self.state) if public is not None else ()
        self.events.append(NewEvent(organization, resource, payload, records))

    def decision(self, result: Message | None = None) -> Decision:
        """What the runtime commits."""
        return Decision(
            events=tuple(self.events),
            result=result,
            open_tasks=tuple(self.tasks),
            close_tasks=tuple(self.closed),
            set_timers=tuple(self.timers),
            folded=tuple(self._folded),
        )
