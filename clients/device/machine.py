"""The update of one device as a pure state machine: ``step(rules, state, input) -> (state, effects)``.

The caller persists the new state (with the reports queued by the effects, in one write) *before* it performs the
effects, and feeds what came of them back as inputs. So a kill at any point resumes by ``Started``:

* The switch **is** the durable write of ``active``, together with ``previous`` and a pending trial. It follows
  only from ``SwitchAllowed``, which the caller gives within the time of a ``go``; no ``go`` is ever in the state.
* A trial is one boot. Pending and not begun, it is begun; begun and not confirmed, it is taken back, also when it was
  a kill that ended it. Every other state has a slot that was confirmed before.
* The floor rises only by confirming a bundle whose statement was verified, and never falls.
* An attempt that has ended is remembered and never begun again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from clients.device.errors import RefusedError, StateError
from clients.device.model import MAX_DETAIL, Answer, Offer, Running
from clients.device.offers import Rules, verify
from clients.device.slots import other

ENDED_KEPT = 128


class Phase(StrEnum):
    """How far the attempt has come before the switch."""

    ACCEPTED = "ACCEPTED"
    DOWNLOADED = "DOWNLOADED"
    INSTALLED = "INSTALLED"


class Trial(StrEnum):
    """How far the one trial boot has come after the switch."""

    PENDING = "PENDING"
    BEGUN = "BEGUN"
    BOOTED = "BOOTED"


@dataclass(frozen=True, slots=True)
class Work:
    """The live attempt. Its offer was verified when it was accepted."""

    offer: Offer
    phase: Phase


@dataclass(frozen=True, slots=True)
class State:
    """All that must survive a power cut."""

    instance: str
    slots: Mapping[str, Running | None]
    active: str = "a"
    previous: str = ""
    """The slot to go back to; set exactly while ``trial`` is."""
    trial: Trial | None = None
    floor: int = 0
    work: Work | None = None
    ended: tuple[str, ...] = ()
    confirmed: str = ""
    """The attempt that confirmed the active slot, until it is reported as failed."""

    def running(self) -> Running:
        slot = self.active if self.trial in {None, Trial.BOOTED} else self.previous
        running = self.slots[slot]
        if running is None:
            raise StateError("STATE_CORRUPT", f"slot {slot} is active and holds nothing")
        return running

    def asks_go(self) -> bool:
        return self.work is not None and self.trial is None and self.work.phase is Phase.INSTALLED

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance,
            "slots": {slot: running.to_json() if running else None for slot, running in self.slots.items()},
            "active": self.active,
            "previous": self.previous,
            "trial": self.trial.value if self.trial else None,
            "floor": self.floor,
            "work": {"offer": self.work.offer.to_json(), "phase": self.work.phase.value} if self.work else None,
            "ended": list(self.ended),
            "confirmed": self.confirmed,
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> State:
        try:
            work = body["work"]
            return State(
                instance=body["instance"],
                slots={slot: Running.from_json(one) if one else None for slot, one in body["slots"].items()},
                active=body["active"],
                previous=body["previous"],
                trial=Trial(body["trial"]) if body["trial"] else None,
                floor=body["floor"],
                work=Work(Offer.from_json(work["offer"]), Phase(work["phase"])) if work else None,
                ended=tuple(body["ended"]),
                confirmed=body["confirmed"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError("STATE_CORRUPT", f"the state file does not hold a state: {error!r}") from error


def factory(instance: str, version: str, security_version: int) -> State:
    """The state of a device as it leaves the factory. Its own firmware is the first floor."""
    running = Running(version=version, slot="a", security_version=security_version)
    return State(instance=instance, slots={"a": running, "b": None}, floor=security_version)


# Inputs: what happened.


@dataclass(frozen=True, slots=True)
class Started:
    """The agent's process begins."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The gateway answered a check-in."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Downloaded:
    """Every binary is staged and has its digest."""


@dataclass(frozen=True, slots=True)
class Installed:
    """The inactive slot is complete."""


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Downloading or installing cannot succeed."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class SwitchAllowed:
    """The ``go`` of that attempt still holds, right now."""

    attempt: str


@dataclass(frozen=True, slots=True)
class TrialBegins:
    """The next thing that happens is the trial boot."""


@dataclass(frozen=True, slots=True)
class BootEnded:
    """The program of the active slot booted, or did not (``code``)."""

    code: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class HealthJudged:
    """The running firmware judged itself."""

    healthy: bool
    code: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TrialExpired:
    """The watchdog: the new firmware did not check in and confirm in time."""


Input = (
    Started
    | Answered
    | Downloaded
    | Installed
    | WorkFailed
    | SwitchAllowed
    | TrialBegins
    | BootEnded
    | HealthJudged
    | TrialExpired
)


# Effects: what to do next, in order.


@dataclass(frozen=True, slots=True)
class QueueReport:
    """Number this report and put it into the outbox, in the same write as the state."""

    attempt: str
    state: str
    code: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Download:
    """Stage the binaries; then ``Downloaded`` or ``WorkFailed``."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Install:
    """Fill the slot; then ``Installed`` or ``WorkFailed``."""

    offer: Offer
    slot: str


@dataclass(frozen=True, slots=True)
class Switch:
    """While the ``go`` holds: ``SwitchAllowed``. Else nothing: the next check-in asks again."""

    attempt: str
    valid_for_s: float


@dataclass(frozen=True, slots=True)
class BeginTrial:
    """Give ``TrialBegins``."""


@dataclass(frozen=True, slots=True)
class Boot:
    """Start the program of the slot; then ``BootEnded``."""

    slot: str


@dataclass(frozen=True, slots=True)
class CheckHealth:
    """Ask the program of the slot; then ``HealthJudged``."""

    slot: str


@dataclass(frozen=True, slots=True)
class CheckInNow:
    """Do not wait for the next poll."""


@dataclass(frozen=True, slots=True)
class DropStaging:
    """Nothing staged is needed any more."""


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the log."""

    event: str
    fields: Mapping[str, str] = field(default_factory=dict)


Effect = QueueReport | Download | Install | Switch | BeginTrial | Boot | CheckHealth | CheckInNow | DropStaging | Note
Result = tuple[State, list[Effect]]


def step(rules: Rules, state: State, happened: Input) -> Result:
    """What the device becomes and does. An input that does not fit the state changes nothing."""
    match happened:
        case Started():
            return _started(state)
        case Answered(answer):
            return _answered(rules, state, answer)
        case Downloaded() if _in_phase(state, Phase.ACCEPTED):
            return _downloaded(state)
        case Installed() if _in_phase(state, Phase.DOWNLOADED):
            return _installed(state)
        case WorkFailed(code, detail) if state.work is not None and state.trial is None:
            return _end(state, "FAILED", code, detail)
        case SwitchAllowed(attempt) if state.asks_go() and _attempt(state) == attempt:
            switched = replace(state, active=other(state.active), previous=state.active, trial=Trial.PENDING)
            return switched, [Note("switched", {"slot": switched.active}), BeginTrial()]
        case TrialBegins() if state.trial is Trial.PENDING:
            return replace(state, trial=Trial.BEGUN), [Boot(state.active)]
        case BootEnded(code, detail):
            return _boot_ended(state, code, detail)
        case HealthJudged():
            return _health(state, happened)
        case TrialExpired() if state.trial is not None:
            return _revert(state, "WATCHDOG_EXPIRED", "the new firmware did not check in and confirm in time")
        case _:
            return state, []


def _attempt(state: State) -> str:
    return state.work.offer.attempt if state.work else ""


def _in_phase(state: State, phase: Phase) -> bool:
    return state.work is not None and state.trial is None and state.work.phase is phase


def _started(state: State) -> Result:
    if state.trial is Trial.PENDING:
        return state, [BeginTrial()]
    if state.trial is not None:
        return _revert(state, "TRIAL_INTERRUPTED", "the trial boot ended before it was confirmed")
    effects: list[Effect] = [Boot(state.active)]
    if state.work is None:
        effects.append(DropStaging())
    elif state.work.phase is Phase.ACCEPTED:
        effects.append(Download(state.work.offer))
    elif state.work.phase is Phase.DOWNLOADED:
        effects.append(Install(state.work.offer, other(state.active)))
    return state, effects


def _answered(rules: Rules, state: State, answer: Answer) -> Result:
    if state.trial is not None:
        # The new firmware has checked in, which is half of its proof. Nothing can be offered, given or taken now.
        return (state, [CheckHealth(state.active)]) if state.trial is Trial.BOOTED else (state, [])
    health: list[Effect] = [CheckHealth(state.active)]
    if answer.offer is not None:
        state, effects = _offered(rules, state, answer.offer)
        return state, [*health, *effects]
    if answer.kind == "cancel" and answer.attempt and answer.attempt == _attempt(state):
        ended = replace(state, work=None, ended=_remember(state, answer.attempt))
        return ended, [*health, Note("cancelled", {"attempt": answer.attempt}), DropStaging()]
    if answer.go is not None and state.asks_go() and answer.go.attempt == _attempt(state):
        return state, [*health, Switch(answer.go.attempt, answer.go.valid_for_s)]
    return state, health


def _offered(rules: Rules, state: State, offer: Offer) -> Result:
    if offer.attempt in state.ended:
        return state, []
    if state.work is not None and offer.attempt == _attempt(state):
        # The same attempt, offered again before our ACCEPTED was folded: only its links are news.
        if offer.statement != state.work.offer.statement or state.work.phase is not Phase.ACCEPTED:
            return state, []
        try:
            accepted = verify(rules, offer, state.floor)
        except RefusedError:
            return state, []
        return replace(state, work=replace(state.work, offer=accepted)), []
    try:
        accepted = verify(rules, offer, state.floor)
    except RefusedError as error:
        refused = replace(state, ended=_remember(state, offer.attempt))
        return refused, [
            QueueReport(offer.attempt, "FAILED", error.reason, error.message[:MAX_DETAIL]),
            Note("offer-refused", {"attempt": offer.attempt, "reason": error.reason}),
            CheckInNow(),
        ]
    ended = state.ended
    if state.work is not None:
        # A device has one live attempt: a new one means that the server has ended the old.
        ended = _remember(state, _attempt(state))
    return replace(state, work=Work(accepted, Phase.ACCEPTED), ended=ended), [
        QueueReport(offer.attempt, "ACCEPTED"),
        QueueReport(offer.attempt, "DOWNLOADING"),
        Note("offer-accepted", {"attempt": offer.attempt, "version": offer.version, "kind": offer.kind}),
        Download(accepted),
    ]


def _downloaded(state: State) -> Result:
    work = state.work
    if work is None:
        return state, []
    target = other(state.active)
    # The slot is about to be overwritten: what it held is forgotten first.
    following = replace(state, work=replace(work, phase=Phase.DOWNLOADED), slots={**state.slots, target: None})
    return following, [QueueReport(work.offer.attempt, "DOWNLOADED"), Install(work.offer, target)]


def _installed(state: State) -> Result:
    work = state.work
    if work is None:
        return state, []
    target, offer = other(state.active), work.offer
    running = Running(offer.version, target, offer.security_version, offer.release, offer.bundle)
    following = replace(state, work=replace(work, phase=Phase.INSTALLED), slots={**state.slots, target: running})
    return following, [QueueReport(offer.attempt, "INSTALLED"), DropStaging(), CheckInNow()]


def _boot_ended(state: State, code: str, detail: str) -> Result:
    if state.trial is Trial.BEGUN:
        if code:
            return _revert(state, code, detail)
        return replace(state, trial=Trial.BOOTED), [
            QueueReport(_attempt(state), "BOOTED"),
            Note("booted", {"slot": state.active}),
            CheckInNow(),
        ]
    if state.trial is None and code:
        return _withdraw(state, code, detail)
    return state, []


def _health(state: State, judged: HealthJudged) -> Result:
    if state.trial is Trial.BOOTED:
        if not judged.healthy:
            return _revert(state, judged.code, judged.detail)
        attempt = _attempt(state)
        running = state.running()
        confirmed = replace(
            state,
            previous="",
            trial=None,
            work=None,
            floor=max(state.floor, running.security_version),
            ended=_remember(state, attempt),
            confirmed=attempt,
        )
        return confirmed, [
            QueueReport(attempt, "CONFIRMED"),
            Note("confirmed", {"slot": state.active, "version": running.version}),
            CheckInNow(),
        ]
    if state.trial is None and not judged.healthy:
        return _withdraw(state, judged.code, judged.detail)
    return state, []


def _withdraw(state: State, code: str, detail: str) -> Result:
    """A confirmed firmware turned out bad: say so once, and go on running."""
    if not state.confirmed:
        return state, []
    return replace(state, confirmed=""), [
        QueueReport(state.confirmed, "FAILED", code, detail[:MAX_DETAIL]),
        Note("unhealthy", {"attempt": state.confirmed, "reason": code}),
        CheckInNow(),
    ]


def _revert(state: State, code: str, detail: str) -> Result:
    attempt = _attempt(state)
    reverted = replace(
        state, active=state.previous, previous="", trial=None, work=None, ended=_remember(state, attempt)
    )
    return reverted, [
        QueueReport(attempt, "REVERTED", code, detail[:MAX_DETAIL]),
        Note("reverted", {"slot": reverted.active, "reason": code}),
        Boot(reverted.active),
        DropStaging(),
        CheckInNow(),
    ]


def _end(state: State, how: str, code: str, detail: str) -> Result:
    attempt = _attempt(state)
    return replace(state, work=None, ended=_remember(state, attempt)), [
        QueueReport(attempt, how, code, detail[:MAX_DETAIL]),
        Note("attempt-failed", {"attempt": attempt, "reason": code}),
        DropStaging(),
        CheckInNow(),
    ]


def _remember(state: State, attempt: str) -> tuple[str, ...]:
    return (*(one for one in state.ended if one != attempt), attempt)[-ENDED_KEPT:]
