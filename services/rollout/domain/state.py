"""State of one partition of rollout: frozen values on persistent maps.

Names used throughout: a *claim* is a device's slot in a target (a release, an override, or the way back from a
retracted release); an *attempt* is one try of a claim; a *plan* is what limits grants: a stage of a rollout, a plain
release, or an override. *Stream time* is the partition's own clock (protocols.md section 5): it is the only clock of
leases, soaks and silence.
"""

from __future__ import annotations

from typing import Final

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2, rollout_pb2
from immutables import Map

from services.rollout.domain.summary import NO_PACE, Pace, Summary
from services.rollout.domain.windows import Window

DUE_BUCKET_MS: Final = 500
NO_BUCKET: Final = -1
DEFAULT_POLL_MS: Final = 66_000
"""60 s and a tenth of jitter."""

# States in the order of progress (device.v1.AttemptState).
GRANTED: Final = device_pb2.ATTEMPT_STATE_GRANTED
ACCEPTED: Final = device_pb2.ATTEMPT_STATE_ACCEPTED
INSTALLED: Final = device_pb2.ATTEMPT_STATE_INSTALLED
BOOTED: Final = device_pb2.ATTEMPT_STATE_BOOTED
CONFIRMED: Final = device_pb2.ATTEMPT_STATE_CONFIRMED
FAILED: Final = device_pb2.ATTEMPT_STATE_FAILED
REVERTED: Final = device_pb2.ATTEMPT_STATE_REVERTED
EXPIRED: Final = device_pb2.ATTEMPT_STATE_EXPIRED
CANCELLED: Final = device_pb2.ATTEMPT_STATE_CANCELLED
WENT_DARK: Final = device_pb2.ATTEMPT_STATE_WENT_DARK

FORWARD: Final = rollout_pb2.Attempt.KIND_FORWARD
ROLLBACK: Final = rollout_pb2.Attempt.KIND_ROLLBACK


class Policy(msgspec.Struct, frozen=True, gc=False):
    """Deadlines of the attempts of one plan, stream milliseconds."""

    lease_ms: int = 900_000
    max_lease_ms: int = 6 * 3_600_000
    go_valid_ms: int = 60_000
    soak_ms: int = 300_000
    dark_after_ms: int = 900_000
    stall_after_ms: int = 7 * 86_400_000


PLAIN_POLICY: Final = Policy()
EXPEDITED_SOAK_MS: Final = 60_000
"""Soak of an expedited rollout whose gate names none."""


def duration_ms(holder: Message, name: str, default: int) -> int:
    """A duration field in milliseconds; the default only when it is not set at all."""
    if not holder.HasField(name):
        return default
    value: Duration = getattr(holder, name)
    return value.seconds * 1000 + value.nanos // 1_000_000


def policy_of(rollout: rollout_pb2.Rollout, stage: rollout_pb2.Stage) -> Policy:
    """Deadlines of one stage."""
    attempt, gate = rollout.attempt_policy, stage.gate
    return Policy(
        lease_ms=duration_ms(attempt, "lease", PLAIN_POLICY.lease_ms),
        max_lease_ms=duration_ms(attempt, "max_lease", PLAIN_POLICY.max_lease_ms),
        go_valid_ms=duration_ms(attempt, "go_valid", PLAIN_POLICY.go_valid_ms),
        soak_ms=duration_ms(gate, "soak", EXPEDITED_SOAK_MS if rollout.expedited else PLAIN_POLICY.soak_ms),
        dark_after_ms=duration_ms(gate, "dark_after", PLAIN_POLICY.dark_after_ms),
        stall_after_ms=duration_ms(gate, "stall_after", PLAIN_POLICY.stall_after_ms),
    )


class Running(msgspec.Struct, frozen=True, gc=False):
    """What a device says it runs; one atomic state."""

    release: str = ""
    bundle: str = ""
    version: str = ""
    security_version: int = 0

    def __bool__(self) -> bool:
        return bool(self.release or self.bundle or self.version)


class DeviceFacts(msgspec.Struct, frozen=True, gc=False):
    """What the registry says of a device, as far as grants depend on it."""

    name: str
    uid: str
    cohort: str
    tags: frozenset[str]
    target: str
    quarantined: bool
    retired: bool

    @property
    def product(self) -> str:
        return self.name.partition("/devices/")[0]


class ProductFacts(msgspec.Struct, frozen=True, gc=False):
    """What a product's policy says, as far as rollouts depend on it."""

    poll_ms: int = DEFAULT_POLL_MS
    """Expected time between check-ins, jitter included."""
    window: Window | None = None
    failure_action: int = rollout_pb2.Rollout.FAILURE_ACTION_PAUSE


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What the device itself said, and where its attempts stand."""

    running: Running = Running()
    instance: str = ""
    retired_instances: frozenset[str] = frozenset()
    counter: int = 0
    body_sha256: bytes = b""
    floor: int = 0
    """Highest security version it confirmed."""
    cloned: bool = False
    gateway: str = ""
    last_seen_ms: int = 0
    """Stream time of its last fresh check-in, or of its gateway's loss."""
    live: str = ""
    """Attempt in flight."""
    anchor: str = ""
    """Its last attempt that was confirmed or went dark: what silence and other firmware may still withdraw."""
    attempts: tuple[str, ...] = ()
    """All attempts in the order of their grants."""


class Claim(msgspec.Struct, frozen=True, gc=False):
    """A device's slot in a target; permanent."""

    key: str
    device: str
    came_from: Running
    """Written by the first attempt, never overwritten."""
    attempts: tuple[str, ...]
    held: str = ""
    """Why the device must leave this release and cannot: a reason code."""


class Tries(msgspec.Struct, frozen=True, gc=False):
    """What a device has used up of its tries, whatever cohort it asks from: a move resets nothing."""

    failed: int = 0
    """Attempts that failed or reverted."""
    expired: int = 0
    """Leases that ran out since the last failure or confirmation."""
    epoch: int = 0
    """``retries`` of the rollout at the last failure: a later retry of the rollout allows one more try."""
    allowed: bool = False
    """An operator gave this device one more try."""
    code: str = ""


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One try of a claim."""

    name: str
    device: str
    claim: str
    plan: str
    """Whose limits it is under: a rollout, a plain release, or the bundle of an override."""
    rollout: str
    stage: int
    kind: int
    release: str
    bundle: str
    version: str
    security_version: int
    rollback_of: str
    state: int
    policy: Policy
    ordinal: int
    granted_ms: int
    receipt: events_pb2.AttemptGranted
    lease_from_ms: int
    first_lease_ms: int
    go: bool = False
    go_ms: int = 0
    confirmed_ms: int = 0
    soaked: bool = False
    withdrawn: bool = False
    superseded: bool = False
    """A later attempt of the same claim was granted: this one counts no more."""
    code: str = ""
    due_ms: int = -1
    """Stream time of its next deadline; -1 when it has none."""
    bucket: int = NO_BUCKET
    """Where it is in ``State.due``."""

    @property
    def in_flight(self) -> bool:
        return GRANTED <= self.state <= BOOTED

    @property
    def in_soak(self) -> bool:
        return self.state == CONFIRMED and not self.soaked

    def leads_to(self, running: Running) -> bool:
        """Whether that is what the device runs after this attempt."""
        if self.release and running.release:
            return running.release == self.release
        return bool(running.bundle) and running.bundle == self.bundle


class Counts(msgspec.Struct, frozen=True, gc=False):
    """Counters of a plan, folded with each event; the rules on gates and caps read nothing else."""

    in_flight: int = 0
    peak_in_flight: int = 0
    confirmed: int = 0
    soaked: int = 0
    failed: int = 0
    reverted: int = 0
    dark: int = 0
    withdrawn: int = 0
    claimed: int = 0
    rolled_back: int = 0
    held: int = 0
    rollback_failed: int = 0
    expired: int = 0
    cancelled: int = 0
    pace: Pace = NO_PACE
    forgiven: int = 0
    """Failures an operator accepted by going on after a halt."""
    advanced: bool = False
    """Passed by an operator: its share is no longer asked for."""
    open_ms: int = -1
    """Stream time of its opening."""

    @property
    def bad(self) -> int:
        """Failed, reverted and dark; withdrawn confirmations are among them."""
        return self.failed + self.reverted + self.dark

    @property
    def sample(self) -> int:
        return self.confirmed + self.bad


class Plan(msgspec.Struct, frozen=True, gc=False):
    """A rollout as folded. ``control`` is the after-image of its last control change; counts are apart from it."""

    control: rollout_pb2.Rollout
    counts: tuple[Counts, ...]
    policies: tuple[Policy, ...]
    to_return: int = 0
    """Devices that run one of its releases and are neither held, nor dark, nor failed on the way back."""
    count_until_ms: int = -1
    """Stream time after which withdrawals are events only; -1 while it goes on."""
    summaries: tuple[Summary, ...] = ()
    recent: tuple[str, ...] = ()
    """Attempts that ended last, the newest at the end."""
    held: Map[str, events_pb2.DeviceHeld] = msgspec.field(default_factory=Map)
    """Devices that must go back and cannot."""


class BundleFacts(msgspec.Struct, frozen=True, gc=False):
    """A bundle with the content keys of its entries."""

    bundle: artifacts_pb2.Bundle
    blob_keys: tuple[str, ...]


class State(msgspec.Struct, frozen=True, gc=False):
    """Everything one partition knows."""

    partition: int = 0
    stream_ms: int = 0
    append_ms: int = 0
    """LogAppendTime of the newest heartbeat folded."""
    watermarks: Map[int, int] = msgspec.field(default_factory=Map)
    beats: Map[str, int] = msgspec.field(default_factory=Map)
    """Gateways that beat, and the LogAppendTime of their last."""
    lost: Map[str, None] = msgspec.field(default_factory=Map)
    products: Map[str, ProductFacts] = msgspec.field(default_factory=Map)
    devices: Map[str, DeviceFacts] = msgspec.field(default_factory=Map)
    seen: Map[str, Seen] = msgspec.field(default_factory=Map)
    releases: Map[str, releases_pb2.Release] = msgspec.field(default_factory=Map)
    graphs: Map[str, tuple[str, ...]] = msgspec.field(default_factory=Map)
    """Names of the releases of each cohort."""
    bundles: Map[str, BundleFacts] = msgspec.field(default_factory=Map)
    overrides: Map[str, releases_pb2.BundleOverride] = msgspec.field(default_factory=Map)
    rollouts: Map[str, Plan] = msgspec.field(default_factory=Map)
    active: Map[str, None] = msgspec.field(default_factory=Map)
    """Rollouts that started and have not ended."""
    owners: Map[str, str] = msgspec.field(default_factory=Map)
    """Release of a stage → its rollout; kept for ever, since withdrawals and ways back ask for it."""
    plain: Map[str, Counts] = msgspec.field(default_factory=Map)
    """Counters of plain releases and overrides."""
    claims: Map[str, Claim] = msgspec.field(default_factory=Map)
    tries: Map[str, Tries] = msgspec.field(default_factory=Map)
    """By ``tries_key``; only devices that failed or expired have an entry."""
    attempts: Map[str, Attempt] = msgspec.field(default_factory=Map)
    live: Map[str, Map[str, None]] = msgspec.field(default_factory=Map)
    """Attempts in flight by plan."""
    by_rollout: Map[str, Map[str, None]] = msgspec.field(default_factory=Map)
    """All attempts of each rollout."""
    watched: Map[str, None] = msgspec.field(default_factory=Map)
    """Attempts with a deadline."""
    due: Map[int, Map[str, None]] = msgspec.field(default_factory=Map)
    """Attempts in buckets of stream time, none in a later one than its deadline's."""
    due_floor: int = 0
    """No bucket below this one holds anything."""


def claim_key(device: str, target: str) -> str:
    """Key of the claim of a device in a release or override."""
    return f"{device} {target}"


def way_back_key(device: str, retracted: str) -> str:
    """Key of the claim of a device on its way back from a retracted release."""
    return f"{device} from {retracted}"


def tries_key(state: State, device: str, release: str, bundle: str) -> str:
    """Key of a device's tries at what a release brings: its rollout in all cohorts, else the bundle."""
    return f"{device} {state.owners.get(release) or bundle}"


def tries_of(state: State, attempt: Attempt) -> str:
    """Key of the tries that an attempt is one of; ways back and overrides have those of their claim."""
    if attempt.kind == FORWARD and attempt.release:
        return tries_key(state, attempt.device, attempt.release, attempt.bundle)
    return attempt.claim


def product_of(state: State, device: str) -> ProductFacts:
    """What the policy of the device's product says."""
    return state.products.get(device.partition("/devices/")[0], _NO_POLICY)


_NO_POLICY: Final = ProductFacts()


def expected_ms(state: State, device: str) -> int:
    """How long after a check-in the next one is expected at the latest."""
    return product_of(state, device).poll_ms


def cap_of(stage: rollout_pb2.Stage) -> int:
    """Attempts in flight at once."""
    return stage.max_in_flight or 100
