"""A simulated installation around the pure decider: releases, gateway, stream, worker and devices, all deterministic.

Every event is checked as it is appended (I1, I2, I3, I4, I7, rates, windows, retry budgets), and the state is compared
with the fold of the log (I6).
"""

from __future__ import annotations

import random
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from libs.eventlog.model import Decision, Event, Foreign, Task, TimerFired
from services.rollout.domain import (
    AuthorizeSwitch,
    ClaimOffers,
    Control,
    CreateRollout,
    RecordObservations,
    RolloutDomain,
    StageReleaseMade,
    State,
)
from services.rollout.domain import stages as stage_rules
from services.rollout.domain.state import DUE_BUCKET_MS, FORWARD, NO_BUCKET
from services.rollout.domain.summary import burst_of
from services.rollout.domain.windows import closed_for_ms

PRODUCT = "organizations/acme/products/thermostat"
GATEWAY = "organizations/platform/gateways/g1"
START_MS = 1_700_000_000_000
Rollout = rollout_pb2.Rollout
Status = rollout_pb2.StageStatus
FAILURES = (device_pb2.ATTEMPT_STATE_FAILED, device_pb2.ATTEMPT_STATE_REVERTED)
GOES_BACK = (Rollout.STATE_ROLLING_BACK, Rollout.STATE_ROLLED_BACK)


def cohort(name: str) -> str:
    return f"{PRODUCT}/cohorts/{name}"


def bundle_name(version: str) -> str:
    return f"{PRODUCT}/bundles/{version}"


def device_name(serial: str) -> str:
    return f"{PRODUCT}/devices/{serial}"


def uid_of(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


@dataclass
class Clock:
    """Context of one decision."""

    now_ms: int
    organization: str
    leader: Leader
    salt: int
    principal: str = "test"

    def new_uuid(self, purpose: str = "") -> str:
        return uid_of(f"{self.salt}/{purpose}")

    def version(self, resource: str) -> int:
        return self.leader.versions.get(resource, 0)

    def parked(self, resource: str) -> bool:
        return resource in self.leader.parked


class Leader:
    """Log and fold, with the invariants asserted at every append."""

    def __init__(self) -> None:
        self.domain = RolloutDomain()
        self.state: State = self.domain.initial_state(0)
        self.log: list[Event] = []
        self.versions: dict[str, int] = {}
        self.parked: set[str] = set()
        self.now_ms = START_MS
        self.tasks: dict[str, Task] = {}
        self.timers: dict[str, object] = {}
        self.public: list[tuple[str, Message]] = []
        self.confirmed_floor: dict[str, int] = {}
        self.failures: Counter[tuple[str, str]] = Counter()
        """By device and rollout, recounted from the log."""
        self.allowed: Counter[tuple[str, str]] = Counter()
        """Tries that were given to one device."""
        self.granted_ms: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        """Moments of forward grants, by rollout and stage."""
        self.sizes: list[int] = []

    def do(self, command: object, organization: str = "acme") -> Message | None:
        """Decide, append, fold, run what timers are due."""
        result = self._decide(command, organization)
        while self.timers:
            timer = self.timers.pop(next(iter(self.timers)))
            self._decide(TimerFired(timer.timer_id, timer.kind, timer.payload), organization)  # type: ignore[attr-defined]
        return result

    def _decide(self, command: object, organization: str) -> Message | None:
        decision: Decision = self.domain.decide(
            self.state, command, Clock(self.now_ms, organization, self, len(self.log))
        )
        self.sizes.append(len(decision.events))
        for new, folded in zip(decision.events, decision.folded, strict=True):
            version = self.versions.get(new.resource, 0) + 1
            self.versions[new.resource] = version
            event = Event(
                new.organization,
                new.resource,
                version,
                new.payload,
                self.now_ms,
                "test",
            )
            before = self.state
            self.state = self.domain.evolve(self.state, event)
            assert self.state == folded, "what the decision folded is what the log folds to"
            self.log.append(event)
            self.public.extend((record.resource, record.payload) for record in new.public)
            self._check(before, event)
        for task in decision.open_tasks:
            self.tasks.setdefault(task.task_id, task)
        for closed in decision.close_tasks:
            self.tasks.pop(closed, None)
        for timer in decision.set_timers:
            self.timers[timer.timer_id] = timer
        return decision.result

    def _check(self, before: State, event: Event) -> None:
        it = event.payload
        if isinstance(it, events_pb2.AttemptMoved) and it.state == device_pb2.ATTEMPT_STATE_CONFIRMED:
            attempt = self.state.attempts[it.attempt]
            self.confirmed_floor[attempt.device] = max(
                self.confirmed_floor.get(attempt.device, 0), attempt.security_version
            )
        if isinstance(it, events_pb2.AttemptMoved) and it.state != it.previous and it.state in FAILURES:
            moved = self.state.attempts[it.attempt]
            if moved.kind == FORWARD:
                self.failures[moved.device, moved.rollout] += 1
        if isinstance(it, events_pb2.RetryAllowed):
            self.allowed[it.device, it.rollout] += 1
        if isinstance(it, events_pb2.GoGiven):
            self._check_go(before, it)
        if not isinstance(it, events_pb2.AttemptGranted):
            return
        attempt = it.attempt
        assert it.reasons, "I7: a grant carries its reasons"
        assert attempt.security_version >= self.confirmed_floor.get(attempt.device, 0), "I4"
        if attempt.rollout:
            plan = before.rollouts[attempt.rollout]
            stage = plan.control.stages[attempt.stage]
            assert plan.counts[attempt.stage].in_flight < (stage.max_in_flight or 100), "I1"
            assert it.in_flight_after <= (stage.max_in_flight or 100), "I1"
            if attempt.kind == FORWARD:
                assert attempt.stage <= plan.control.current_stage, "I2"
                assert plan.control.state == Rollout.STATE_RUNNING, "I3"
                tries = plan.control.retries + self.allowed[attempt.device, attempt.rollout]
                assert self.failures[attempt.device, attempt.rollout] <= tries, "T79"
                self._check_rate(attempt, stage.max_grants_per_minute)
            else:
                assert plan.control.state in GOES_BACK, "I3"
        self._check_window(before, attempt.device, attempt.rollout)

    def _check_go(self, before: State, it: events_pb2.GoGiven) -> None:
        attempt = before.attempts[it.attempt]
        if attempt.rollout:
            state = before.rollouts[attempt.rollout].control.state
            assert state == Rollout.STATE_RUNNING if attempt.kind == FORWARD else state in GOES_BACK, "I3"
        self._check_window(before, attempt.device, attempt.rollout)

    def _check_window(self, before: State, device: str, rollout: str) -> None:
        product = before.products.get(device.partition("/devices/")[0])
        expedited = bool(rollout) and before.rollouts[rollout].control.expedited
        assert expedited or product is None or not closed_for_ms(product.window, self.now_ms), "outside the window"

    def _check_rate(self, attempt: rollout_pb2.Attempt, rate: int) -> None:
        moments = self.granted_ms[attempt.rollout, attempt.stage]
        moments.append(self.now_ms)
        within = [at for at in moments if at > self.now_ms - 60_000]
        assert not rate or len(within) <= rate + burst_of(rate), "more grants than the rate"

    def replay(self) -> None:
        """Drop the state and fold the log again, as a new leader does (I6)."""
        state = self.domain.initial_state(0)
        for event in self.log:
            state = self.domain.evolve(state, event)
        assert state == self.state, "I6"
        self.state = state
        self._check_deadlines()

    def _check_deadlines(self) -> None:
        """Each attempt that has a deadline is in one bucket, not later than that; nothing else is in any."""
        state = self.state
        held = [(name, bucket) for bucket, names in state.due.items() for name in names]
        meant = {name: attempt for name, attempt in state.attempts.items() if attempt.due_ms >= 0}
        assert sorted(held) == sorted((name, attempt.bucket) for name, attempt in meant.items())
        assert all(attempt.bucket <= attempt.due_ms // DUE_BUCKET_MS for attempt in meant.values())
        assert all(attempt.bucket == NO_BUCKET for attempt in state.attempts.values() if attempt.due_ms < 0)
        assert set(state.watched) == set(meant)
        assert all(bucket >= state.due_floor for bucket in state.due)

    def plan(self, name: str) -> Rollout:
        return stage_rules.view(self.state.rollouts[f"{PRODUCT}/rollouts/{name}"])


class Releases:
    """The releases service, as far as rollouts see it."""

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        self.graphs: dict[str, list[releases_pb2.Release]] = {}
        self._seq = 0

    def add(self, release: releases_pb2.Release) -> None:
        graph = self.graphs.setdefault(release.name.partition("/releases/")[0], [])
        if all(each.name != release.name for each in graph):
            image = releases_pb2.Release()
            image.CopyFrom(release)
            image.uid = uid_of(release.name)
            graph.append(image)
        self.publish(release.name.partition("/releases/")[0])

    def publish(self, name: str) -> None:
        changed = releases_events.GraphChanged(cohort=name, releases=self.graphs[name])
        self.leader.do(fact("releases", name, changed))

    def run_tasks(self) -> None:
        for task in list(self.leader.tasks.values()):
            if task.kind == stage_rules.TASK_CREATE:
                request = releases_pb2.CreateManagedReleaseRequest.FromString(task.payload)
                self.add(request.release)
                self.leader.do(StageReleaseMade(task.task_id, request.release.name))
                continue
            asked = releases_pb2.RetractReleaseRequest.FromString(task.payload)
            for graph in self.graphs.values():
                for release in graph:
                    if release.name != asked.name:
                        continue
                    if task.kind == stage_rules.TASK_RETRACT:
                        release.retracted = release.disabled = True
                    elif task.kind == stage_rules.TASK_DISABLE:
                        release.disabled = True
                    else:
                        release.rollout = ""
            self.publish(asked.name.partition("/releases/")[0])
            self.leader.tasks.pop(task.task_id, None)

    def candidates(self, device: Device) -> list[releases_pb2.Candidate]:
        """A resolution good enough for a simulation: back from what was retracted, else forward to the newest."""
        graph = self.graphs.get(device.cohort, [])
        for release in graph:
            if release.name == device.running.release and release.retracted:
                return [releases_pb2.Candidate(rollback_of=release.name)]
        return [
            releases_pb2.Candidate(release=release.name, bundle=release.bundle)
            for release in reversed(graph)
            if not release.disabled and release.version > device.running.version
        ]


def fact(service: str, resource: str, payload: Message) -> Foreign:
    return Foreign(service, f"t.{service}.public.v1", 0, 0, 0, "acme", resource, payload, START_MS)


@dataclass
class Device:
    """An agent: it asks, installs, asks for go, boots, confirms, as its ``fate`` for a version says."""

    name: str
    cohort: str
    running: registry_pb2.ReportedState
    fate: dict[str, str] = field(default_factory=dict)
    counter: int = 0
    attempt: str = ""
    step: int = 0
    offer: rollout_pb2.Offer | None = None
    reports: list[device_pb2.Report] = field(default_factory=list)
    old: registry_pb2.ReportedState | None = None
    ended: set[str] = field(default_factory=set)
    sick_in: int = -1
    dead: bool = False
    instance: str = "one"

    def item(self) -> device_pb2.CheckInItem:
        self.counter += 1
        item = device_pb2.CheckInItem(
            device=self.name,
            device_uid=uid_of(self.name),
            instance=self.instance,
            counter=self.counter,
            running=self.running,
            attempt=self.attempt,
            reports=self.reports,
        )
        item.body_sha256 = uuid.uuid5(uuid.NAMESPACE_URL, item.SerializeToString(deterministic=True).hex()).bytes * 2
        item.receipt.steps.add(code="RESOLVED", message="simulated")
        return item

    def report(self, state: int, code: str = "", attempt: str = "") -> None:
        self.counter += 1
        self.reports.append(
            device_pb2.Report(counter=self.counter, attempt=attempt or self.attempt, state=state, code=code)
        )  # type: ignore[arg-type]

    def take(self, offer: rollout_pb2.Offer) -> None:
        if offer.attempt in self.ended or offer.attempt == self.attempt:
            return
        self.attempt, self.offer, self.step = offer.attempt, offer, 0
        self.report(device_pb2.ATTEMPT_STATE_ACCEPTED)

    def end(self) -> None:
        self.ended.add(self.attempt)
        self.attempt, self.offer, self.step = "", None, 0

    def work(self) -> bool:
        """One step of the attempt; True when it asks for go."""
        if self.sick_in > 0:
            self.sick_in -= 1
            if self.sick_in == 0:
                self.report(device_pb2.ATTEMPT_STATE_FAILED, "UNHEALTHY", self._confirmed)
        if not self.attempt or self.offer is None:
            return False
        self.step += 1
        if self.step == 1:
            self.report(device_pb2.ATTEMPT_STATE_DOWNLOADING)
        elif self.step == 2:
            self.report(device_pb2.ATTEMPT_STATE_DOWNLOADED)
            self.report(device_pb2.ATTEMPT_STATE_INSTALLED)
        return self.step >= 3

    _confirmed: str = ""

    def switch(self) -> None:
        """Leave was given: boot the new slot, and meet the fate of its version."""
        assert self.offer is not None
        self.report(device_pb2.ATTEMPT_STATE_BOOTED)
        fate = self.fate.get(self.offer.version, "good")
        if fate == "revert":
            self.report(device_pb2.ATTEMPT_STATE_REVERTED, "BOOT_FAILED")
        elif fate == "dead":
            self.dead = True
        else:
            self.running = registry_pb2.ReportedState(
                release=self.offer.release,
                bundle=self.offer.bundle,
                version=self.offer.version,
                security_version=self.offer.security_version,
            )
            self.report(device_pb2.ATTEMPT_STATE_CONFIRMED)
            self._confirmed = self.attempt
            if fate == "sick":
                self.sick_in = 2
        self.end()


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1_000_000_000))


class World:
    """Leader, releases, stream and devices in one thread."""

    def __init__(
        self, seed: int = 0, *, duplicates: float = 0.0, loss: float = 0.0, replays: float = 0.0, lag: int = 0
    ) -> None:
        self.random = random.Random(seed)
        self.leader = Leader()
        self.releases = Releases(self.leader)
        self.devices: list[Device] = []
        self.duplicates, self.loss, self.replays, self.lag = duplicates, loss, replays, lag
        self.stream: list[rollout_pb2.ObservedRecord] = []
        self.delivered = 0
        product = registry_pb2.Product(name=PRODUCT)
        product.policy.poll_interval.CopyFrom(seconds(2))
        product.policy.poll_jitter.CopyFrom(seconds(1))
        self.leader.do(fact("registry", PRODUCT, registry_events.ProductChanged(product=product)))

    # Facts.

    def add_bundle(self, version: str, security_version: int = 0, *, offerable: bool = True) -> artifacts_pb2.Bundle:
        bundle = artifacts_pb2.Bundle(
            name=bundle_name(version), version=version, security_version=security_version, offerable=offerable
        )
        bundle.entries.add(target="portable", sha256="0" * 64, size=1)
        changed = artifacts_events.BundleChanged(bundle=bundle, blob_keys=["k"])
        self.leader.do(fact("artifacts", bundle.name, changed))
        return bundle

    def add_release(self, cohort_id: str, version: str, release_id: str = "") -> str:
        name = f"{cohort(cohort_id)}/releases/{release_id or version}"
        self.releases.add(
            releases_pb2.Release(
                name=name, bundle=bundle_name(version), version=version, version_requirement=f"< {version}"
            )
        )
        return name

    def add_device(
        self, serial: str, cohort_id: str, *, release: str = "", version: str = "1.0.0", **facts: object
    ) -> Device:
        name = device_name(serial)
        running = registry_pb2.ReportedState(
            release=release, bundle=bundle_name(version) if release else "", version=version
        )
        device = Device(name, cohort(cohort_id), running)
        self.devices.append(device)
        self.device_fact(device, **facts)
        return device

    def device_fact(self, device: Device, **facts: object) -> None:
        image = registry_pb2.Device(
            name=device.name,
            uid=uid_of(device.name),
            cohort=device.cohort,
            target="t",
            state=registry_pb2.Device.STATE_ACTIVE,
        )
        for key, value in facts.items():
            if key == "tags":
                image.tags.extend(value)  # type: ignore[arg-type]
            else:
                setattr(image, key, value)
        self.leader.do(fact("registry", device.name, registry_events.DeviceChanged(device=image)))

    # Operators.

    def create(self, rollout_id: str, version: str, rollout: Rollout) -> Rollout:
        name = f"{PRODUCT}/rollouts/{rollout_id}"
        bundle = self.leader.state.bundles[bundle_name(version)].bundle
        result = self.leader.do(CreateRollout(name, rollout, bundle))
        assert isinstance(result, Rollout)
        return result

    def control(self, verb: str, rollout_id: str, reason: str = "") -> Rollout:
        result = self.leader.do(Control(verb, f"{PRODUCT}/rollouts/{rollout_id}", reason=reason))
        assert isinstance(result, Rollout)
        self.releases.run_tasks()
        return result

    # Devices.

    def claim(
        self,
        device: Device,
        item: device_pb2.CheckInItem | None = None,
        candidates: list[releases_pb2.Candidate] | None = None,
    ) -> rollout_pb2.ClaimResult:
        """One check-in straight to the leader."""
        return self.claim_many([(device, item or device.item(), candidates)])[0]

    def claim_many(
        self, asked: list[tuple[Device, device_pb2.CheckInItem, list[releases_pb2.Candidate] | None]], lag_ms: float = 0
    ) -> list[rollout_pb2.ClaimResult]:
        request = rollout_pb2.ClaimOffersRequest(organization="acme", gateway=GATEWAY)
        for device, item, candidates in asked:
            request.items.add(
                device=device.name,
                device_uid=uid_of(device.name),
                candidates=self.releases.candidates(device) if candidates is None else candidates,
                check_in=item,
            )
        result = self.leader.do(ClaimOffers(request, lag_ms))
        assert isinstance(result, rollout_pb2.ClaimOffersResponse)
        return list(result.results)

    def ask_go(self, device: Device, attempt: str = "", *, lag_ms: float = 0) -> rollout_pb2.AuthorizeSwitchResponse:
        request = rollout_pb2.AuthorizeSwitchRequest(
            organization="acme", attempt=attempt or device.attempt, device=device.name, check_in=device.item()
        )
        result = self.leader.do(AuthorizeSwitch(request, lag_ms))
        assert isinstance(result, rollout_pb2.AuthorizeSwitchResponse)
        return result

    # Stream.

    def append(self, *items: device_pb2.CheckInItem, gateway: str = GATEWAY, heartbeat: bool = False) -> None:
        self.stream.append(
            rollout_pb2.ObservedRecord(
                position=len(self.stream) * 2,
                append_time_ms=self.leader.now_ms,
                gateway=gateway,
                organization="" if heartbeat else "acme",
                heartbeat=heartbeat,
                items=items,
            )
        )

    def deliver(self, through: int | None = None) -> None:
        """The worker sends what it has; some of it twice."""
        end = len(self.stream) if through is None else through
        start = self.delivered
        if start and self.random.random() < self.duplicates:
            start = max(0, start - self.random.randrange(1, 6))
        records = self.stream[start:end]
        if records:
            request = rollout_pb2.RecordObservationsRequest(
                source_partition=0, records=records, through_position=records[-1].position
            )
            self.leader.do(RecordObservations(request, "~0"), "~0")
        self.delivered = max(self.delivered, end)

    def beat(self, for_s: float, *, gateways: tuple[str, ...] = (GATEWAY,)) -> None:
        """Let stream time pass: heartbeats only, delivered at once."""
        left = int(for_s * 1000)
        while left > 0:
            step = min(1000, left)
            self.leader.now_ms += step
            left -= step
            for gateway in gateways:
                self.append(gateway=gateway, heartbeat=True)
            self.deliver()

    # The whole.

    def tick(self) -> None:
        """A second in the life of the fleet."""
        self.leader.now_ms += 1000
        self.append(gateway=GATEWAY, heartbeat=True)
        asking = [device for device in self.devices if not device.dead and self.random.random() < 0.7]
        self.random.shuffle(asking)
        claims: list[tuple[Device, device_pb2.CheckInItem, list[releases_pb2.Candidate] | None]] = []
        for device in asking:
            wants_go = device.work()
            if wants_go:
                self._switch(device)
            else:
                claims.append((device, device.item(), None))
        if claims:
            for (device, item, _), result in zip(claims, self.claim_many(claims), strict=True):
                self._answered(device, item, result)
        self.releases.run_tasks()
        end = max(self.delivered, len(self.stream) - self.random.randrange(self.lag + 1))
        self.deliver(end)
        self.releases.run_tasks()
        if self.random.random() < self.replays:
            self.leader.replay()

    def _answered(self, device: Device, item: device_pb2.CheckInItem, result: rollout_pb2.ClaimResult) -> None:
        self.append(item)
        if self.random.random() < self.duplicates:
            self.append(item)
        if self.random.random() < self.loss:
            return  # the answer never arrived: reports are sent again
        device.reports.clear()
        if result.cancel_attempt and result.cancel_attempt == device.attempt:
            device.end()
        elif result.HasField("offer"):
            device.take(result.offer)

    def _switch(self, device: Device) -> None:
        answer = self.ask_go(device)
        if self.random.random() < self.loss:
            return
        device.reports.clear()
        if answer.answer == answer.ANSWER_GO:
            device.switch()
        elif answer.answer == answer.ANSWER_CANCEL:
            device.end()

    def run_until(self, condition, limit: int = 400) -> int:  # type: ignore[no-untyped-def]
        for ticks in range(limit):
            if condition():
                return ticks
            self.tick()
        raise AssertionError("the condition never came true")
