"""What the gateway knows: the public logs of five services, folded in memory, but for devices and their certificates.

Products, CAs, bundles, graphs, plans and live attempts are few and are held. Devices and certificates are many: their
records only pass by here, to rule the caches of :mod:`services.gateway.directory`. Every value can be built again from
the logs. Facts for ``resolve()`` are made when a record arrives, so that a check-in only reads. Callbacks run in the
order of each partition; nothing here waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from google.protobuf.message import Message
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.device.v1 import device_pb2
from groundswell.pki.v1 import events_pb2 as pki_events
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as releases_events
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import Foreign, partition_of
from libs.eventlog.deadline import monotonic
from libs.eventlog.follower import ParkedRecord, PublicFollower
from libs.eventlog.ports import EventLog
from libs.names import organization_of
from libs.resolution import BundleFacts, CohortGraph, DeviceFacts, OverrideFacts, PlanFacts, Resolution, resolve
from libs.resolution.convert import (
    bundle_facts,
    candidate_of,
    cohort_graph,
    override_facts,
    plan_facts,
    reason_of,
)
from libs.rpc.directory import REGISTRY_RECORDS
from services.gateway.body import Running, reasons_json, running_state
from services.gateway.directory import CertificateEntry, DeviceEntry, StateKey, certificate_key, state_key

SOURCES: Final[Mapping[str, tuple[type[Message], ...]]] = {
    "registry": REGISTRY_RECORDS,
    "pki": (pki_events.CaCertificateChanged, pki_events.DeviceCertificateChanged, pki_events.IssuingCaChanged),
    "artifacts": (artifacts_events.SigningKeyChanged, artifacts_events.BundleChanged),
    "releases": (releases_events.GraphChanged, releases_events.BundleOverrideChanged),
    "rollout": (rollout_events.RolloutChanged, rollout_events.AttemptChanged, rollout_events.DeviceReported),
}
"""Every public record type of each service that is followed."""

_LIVE: Final = frozenset(
    {
        device_pb2.ATTEMPT_STATE_GRANTED,
        device_pb2.ATTEMPT_STATE_ACCEPTED,
        device_pb2.ATTEMPT_STATE_DOWNLOADING,
        device_pb2.ATTEMPT_STATE_DOWNLOADED,
        device_pb2.ATTEMPT_STATE_INSTALLED,
        device_pb2.ATTEMPT_STATE_BOOTED,
    }
)
FRESHNESS_S: Final = 2.0
"""A view that is further behind gives no offers (protocols.md section 3)."""
_LOOK_S: Final = 0.02
"""Lags are looked at this often, not for every check-in."""
_DECISIVE: Final = frozenset(
    {
        artifacts_events.BundleChanged,
        releases_events.GraphChanged,
        releases_events.BundleOverrideChanged,
        rollout_events.RolloutChanged,
    }
)
"""What a resolution looks at, beside the device."""
_ENDED: Final = frozenset({rollout_pb2.Rollout.STATE_COMPLETED})
_MAX_PLANS: Final = 8
"""Rollouts of a cohort that an explanation goes into: the newest."""


_SHARED: Final = 4096
"""Decisions kept for whole classes of devices, in each partition."""
_SHARED_MS: Final = 1000
"""For so long at most: a decision names the time that is left until a schedule."""
_SHARED_TEXT: Final = 1024
_DEFAULT_POLL_S: Final = 60.0
_DEFAULT_POLLING: Final = (_DEFAULT_POLL_S, _DEFAULT_POLL_S / 10)
_NO_CAS: Final[dict[str, pki_pb2.CaCertificate]] = {}


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device as a request sees it."""

    organization: str
    entry: DeviceEntry
    certificate: CertificateEntry

    @property
    def device(self) -> registry_pb2.Device:
        """The registry's record."""
        return self.entry.device

    @property
    def fingerprint(self) -> str:
        """Of the certificate of this connection."""
        return self.certificate.certificate.fingerprint

    @property
    def retired(self) -> bool:
        """Decommissioned for good."""
        return self.entry.facts.retired


@dataclass(frozen=True, slots=True)
class Decided:
    """A resolution with what every answer of its kind repeats. Shared by all devices of which the same is true."""

    resolution: Resolution
    running: registry_pb2.ReportedState
    state: StateKey
    """The same, to be compared."""
    candidates: tuple[releases_pb2.Candidate, ...]
    plans: tuple[str, ...]
    """What limits grants of each candidate."""
    said: bytes
    """Running state and steps of the receipt, as the item in the check-in topic has them."""
    reasons: bytes
    """JSON of the last two reasons, for an answer of `none`."""
    until_ms: int


class CacheOf(Protocol):
    """What the followed records of many things rule."""

    def changed(self, partition: int, position: int, key: str, value: Any) -> None: ...


class GatewayViews:
    """Folds public records; answers what a check-in asks."""

    def __init__(
        self,
        log: EventLog,
        env: str,
        partitions: int,
        on_anchors: Callable[[str, tuple[bytes, ...]], None],
        on_plan: Callable[[str], None],
        devices: CacheOf,
        certificates: CacheOf,
    ) -> None:
        self._partitions = partitions
        self._devices = devices
        self._certificates = certificates
        self._on_anchors = on_anchors
        self._on_plan = on_plan
        self._policies: dict[str, registry_pb2.ConfigurationPolicy] = {}
        self._polls: dict[str, tuple[float, float]] = {}
        self._gateway_seq: dict[str, int] = {}
        self._cas: dict[str, dict[str, pki_pb2.CaCertificate]] = {}
        self._issuing: dict[str, dict[str, pki_pb2.IssuingCa]] = {}
        self._bundles: dict[str, BundleFacts] = {}
        self._blobs: dict[tuple[str, str], str] = {}
        self._graphs: dict[str, CohortGraph] = {}
        self._managed: dict[str, str] = {}
        self._overrides: dict[str, dict[str, OverrideFacts]] = {}
        self._override_devices: dict[str, frozenset[str]] = {}
        self._rollouts: dict[str, rollout_pb2.Rollout] = {}
        self._plans: dict[str, tuple[PlanFacts, ...]] = {}
        self._live_attempts: dict[str, str] = {}
        self._parked: dict[str, set[str]] = {}
        """Resources of which a record is not understood, with the services that wrote it."""
        self._no_policy = registry_pb2.ConfigurationPolicy()
        self._shared: list[dict[tuple[object, ...], Decided]] = [{} for _ in range(partitions)]
        self._positions: list[tuple[int, bytes] | None] = [None] * partitions
        self._fresh_until = [0.0] * partitions
        self._moves = 0
        self._phased: set[str] = set()
        self.followers = {
            service: PublicFollower(
                log, service, partitions, self._apply, env=env, types=types, on_parked=self._on_parked
            )
            for service, types in SOURCES.items()
        }
        self._folds: dict[type[Message], Callable[[Foreign], None]] = {
            registry_events.DeviceChanged: self._device_changed,
            registry_events.ProductChanged: self._product_changed,
            registry_events.GatewayChanged: self._gateway_changed,
            pki_events.CaCertificateChanged: self._ca_changed,
            pki_events.DeviceCertificateChanged: self._certificate_changed,
            pki_events.IssuingCaChanged: self._issuing_ca_changed,
            artifacts_events.BundleChanged: self._bundle_changed,
            releases_events.GraphChanged: self._graph_changed,
            releases_events.BundleOverrideChanged: self._override_changed,
            rollout_events.RolloutChanged: self._rollout_changed,
            rollout_events.AttemptChanged: self._attempt_changed,
        }

    # Folding.

    def _apply(self, record: Foreign) -> None:
        self._moves += 1
        if record.service in self._parked.get(record.resource, ()):
            self._parked[record.resource].discard(record.service)
            if not self._parked[record.resource]:
                del self._parked[record.resource]
            self._shared[record.partition].clear()
        kind = type(record.payload)
        if kind in _DECISIVE:
            self._shared[record.partition].clear()
        fold = self._folds.get(kind)
        if fold is not None:
            fold(record)

    def _on_parked(self, record: ParkedRecord) -> None:
        """What is not understood is not guessed: its resource is offered to nobody until it is understood again."""
        self._moves += 1
        self._parked.setdefault(record.resource, set()).add(record.service)
        self._shared[record.partition].clear()
        if record.service == "registry":
            self._devices.changed(record.partition, record.position, record.resource, None)
        elif record.service == "pki":
            key = f"{record.organization}/{record.resource.rpartition('/')[2]}"
            self._certificates.changed(record.partition, record.position, key, None)

    def _device_changed(self, record: Foreign) -> None:
        device: registry_pb2.Device = record.payload.device  # type: ignore[attr-defined]
        self._devices.changed(record.partition, record.position, device.name, lambda: DeviceEntry.of(device))

    def _product_changed(self, record: Foreign) -> None:
        product: registry_pb2.Product = record.payload.product  # type: ignore[attr-defined]
        self._policies[product.name] = product.policy
        interval = product.policy.poll_interval.ToTimedelta().total_seconds() or _DEFAULT_POLL_S
        jitter = product.policy.poll_jitter.ToTimedelta().total_seconds() or interval / 10
        self._polls[product.name] = (interval, jitter)

    def _gateway_changed(self, record: Foreign) -> None:
        self._gateway_seq[record.resource] = record.public_seq

    def _ca_changed(self, record: Foreign) -> None:
        ca: pki_pb2.CaCertificate = record.payload.ca_certificate  # type: ignore[attr-defined]
        organization = organization_of(ca.name)
        self._cas.setdefault(organization, {})[ca.name] = ca
        self._anchors_changed(organization)

    def _issuing_ca_changed(self, record: Foreign) -> None:
        issuing: pki_pb2.IssuingCa = record.payload.issuing_ca  # type: ignore[attr-defined]
        organization = organization_of(issuing.name)
        self._issuing.setdefault(organization, {})[issuing.name] = issuing
        self._anchors_changed(organization)

    def _anchors_changed(self, organization: str) -> None:
        """Customers' CAs in force, and every issuing CA: what a replaced or expired one signed is judged by request."""
        customers = self._cas.get(organization, {}).values()
        active = {one.der for one in customers if one.state == pki_pb2.CaCertificate.STATE_ACTIVE}
        active.update(self.issuing_cas(organization))
        self._on_anchors(organization, tuple(sorted(active)))

    def _certificate_changed(self, record: Foreign) -> None:
        certificate: pki_pb2.DeviceCertificate = record.payload.device_certificate  # type: ignore[attr-defined]
        key = certificate_key(organization_of(certificate.name), certificate.fingerprint)
        self._certificates.changed(record.partition, record.position, key, lambda: CertificateEntry.of(certificate))

    def _bundle_changed(self, record: Foreign) -> None:
        changed: artifacts_events.BundleChanged = record.payload  # type: ignore[assignment]
        bundle: artifacts_pb2.Bundle = changed.bundle
        self._bundles[bundle.name] = bundle_facts(bundle)
        organization = organization_of(bundle.name)
        for entry, key in zip(bundle.entries, changed.blob_keys, strict=False):
            self._blobs[(organization, entry.sha256)] = key

    def _graph_changed(self, record: Foreign) -> None:
        changed: releases_events.GraphChanged = record.payload  # type: ignore[assignment]
        before = self._graphs.get(changed.cohort)
        for name in before.releases if before is not None else ():
            self._managed.pop(name, None)
        self._graphs[changed.cohort] = cohort_graph(changed.cohort, changed.releases)
        self._managed |= {release.name: release.rollout for release in changed.releases if release.rollout}
        if any(node.share_ppm is not None for node in self._graphs[changed.cohort].releases.values()):
            self._phased.add(changed.cohort)
        else:
            self._phased.discard(changed.cohort)

    def _override_changed(self, record: Foreign) -> None:
        changed: releases_events.BundleOverrideChanged = record.payload  # type: ignore[assignment]
        override = changed.bundle_override
        for device in self._override_devices.pop(override.name, frozenset()):
            self._overrides[device].pop(override.name, None)
        if changed.deleted:
            return
        facts = override_facts(override)
        self._override_devices[override.name] = frozenset(override.devices)
        for device in override.devices:
            self._overrides.setdefault(device, {})[override.name] = facts

    def _rollout_changed(self, record: Foreign) -> None:
        rollout: rollout_pb2.Rollout = record.payload.rollout  # type: ignore[attr-defined]
        self._rollouts[rollout.name] = rollout
        self._on_plan(rollout.name)
        for cohort in {stage.cohort for stage in rollout.stages}:
            meant = [
                other
                for other in self._rollouts.values()
                if other.state not in _ENDED and any(stage.cohort == cohort for stage in other.stages)
            ]
            meant.sort(key=lambda one: one.create_time.ToNanoseconds(), reverse=True)
            self._plans[cohort] = tuple(plan_facts(one) for one in meant[:_MAX_PLANS])

    def _attempt_changed(self, record: Foreign) -> None:
        attempt: rollout_pb2.Attempt = record.payload.attempt  # type: ignore[attr-defined]
        if attempt.state in _LIVE:
            self._live_attempts[attempt.device] = attempt.name
        elif self._live_attempts.get(attempt.device) == attempt.name:
            del self._live_attempts[attempt.device]
        if attempt.state not in _LIVE:
            self._on_plan(attempt.rollout or attempt.release)

    # Asking.

    def partition(self, organization: str) -> int:
        """Partition of an organization."""
        return partition_of(organization, self._partitions)

    def stale_services(self, partition: int) -> Sequence[str]:
        """Services whose view of the partition is over ``FRESHNESS_S`` behind. A lag grows no faster than time."""
        now = monotonic()
        if now < self._fresh_until[partition]:
            return ()
        lags = [(follower.lag_s(partition, now), name) for name, follower in self.followers.items()]
        worst = max(lags)[0]
        self._fresh_until[partition] = now + min(_LOOK_S, FRESHNESS_S - worst)
        return [name for lag, name in lags if lag > FRESHNESS_S] if worst > FRESHNESS_S else ()

    def positions(self, organization: str) -> list[device_pb2.ViewPosition]:
        """Where each view stands."""
        partition = self.partition(organization)
        tokens = (follower.token(partition) for follower in self.followers.values())
        return [
            device_pb2.ViewPosition(
                service=token.service, partition=partition, public_seq=token.public_seq, log_id=token.log_id
            )
            for token in tokens
        ]

    def said_positions(self, organization: str, partition: int) -> bytes:
        """The same as the item in the check-in topic has them, made once for all that is said between two records."""
        found = self._positions[partition]
        if found is None or found[0] != self._moves:
            receipt = device_pb2.Receipt(views=self.positions(organization))
            found = (self._moves, device_pb2.CheckInItem(receipt=receipt).SerializeToString())
            self._positions[partition] = found
        return found[1]

    def ca_state(self, organization: str, name: str) -> pki_pb2.CaCertificate.State.ValueType:
        """State of a customer's CA; unspecified for one of our own."""
        ca = self._cas.get(organization, _NO_CAS).get(name)
        return pki_pb2.CaCertificate.STATE_UNSPECIFIED if ca is None else ca.state

    def issuing_cas(self, organization: str) -> tuple[bytes, ...]:
        """DER of the organization's issuing CAs, replaced ones too."""
        return tuple(one.der for one in self._issuing.get(organization, {}).values())

    def is_parked(self, name: str) -> bool:
        """Whether the last record of a resource is not understood here."""
        return name in self._parked

    def policy(self, product: str) -> registry_pb2.ConfigurationPolicy:
        """Configuration policy of a product."""
        return self._policies.get(product, self._no_policy)

    def polling(self, product: str) -> tuple[float, float]:
        """Poll interval and jitter of a product, in seconds."""
        return self._polls.get(product, _DEFAULT_POLLING)

    def decide(self, view: DeviceView, partition: int, said: Running, now_ms: int) -> Decided:
        """Candidates for what the device says it runs, and the steps that led to them.

        Most of a fleet is alike: what depends on nothing of the single device is decided once for all of its class, and
        again after any record that could change it.
        """
        facts = view.entry.facts
        key = (facts.cohort, facts.target, facts.tags, said.release, said.bundle, said.version, said.security_version)
        name = facts.name
        alone = (
            facts.quarantined
            or facts.retired
            or not facts.cohort
            or facts.cohort in self._phased
            or bool(self._overrides.get(name))
        )
        if alone:
            return self._decided(facts, said, now_ms)
        shared = self._shared[partition]
        found = shared.get(key)
        if found is None or now_ms >= found.until_ms or now_ms < found.until_ms - _SHARED_MS:
            found = self._decided(facts, said, now_ms)
            if len(said.release) + len(said.bundle) + len(said.version) <= _SHARED_TEXT:
                if len(shared) >= _SHARED:
                    shared.clear()
                shared[key] = found
        return found

    def _decided(self, facts: DeviceFacts, said: Running, now_ms: int) -> Decided:
        running = running_state(said)
        cohort = facts.cohort
        overrides = self._overrides.get(facts.name)
        graph = None if cohort in self._parked else self._graphs.get(cohort)
        resolution = resolve(
            replace(facts, release=running.release, bundle=running.bundle, version=running.version),
            graph,
            tuple(overrides.values()) if overrides else (),
            self._bundles,
            self._plans.get(cohort, ()),
            now_ms,
        )
        candidates = tuple(candidate_of(one) for one in resolution.candidates)
        steps = [reason_of(step) for step in resolution.steps]
        item = device_pb2.CheckInItem(running=running, receipt=device_pb2.Receipt(steps=steps))
        schedules = (node.schedule_ms for node in graph.releases.values()) if graph is not None else ()
        until_ms = min((at for at in schedules if at > now_ms), default=now_ms + _SHARED_MS)
        return Decided(
            resolution,
            running,
            state_key(running),
            candidates,
            tuple(self.plan_of(candidate) for candidate in candidates),
            item.SerializeToString(),
            reasons_json(steps[-2:]),
            min(until_ms, now_ms + _SHARED_MS),
        )

    def plan_of(self, candidate: releases_pb2.Candidate) -> str:
        """What limits grants of a candidate: its rollout, else the release or override itself."""
        release = candidate.release or candidate.rollback_of
        return self._managed.get(release, release) or candidate.bundle_override

    def is_managed(self, release: str) -> bool:
        """Whether a rollout still watches devices on this release."""
        return release in self._managed

    def has_live_attempt(self, device: str) -> bool:
        """Whether an attempt of the device is in flight."""
        return device in self._live_attempts

    def plan_allows_download(self, plan: str, control_epoch: int) -> bool:
        """False once the rollout stopped offers after the link was sealed, or while a plain release is disabled."""
        if not plan:
            return True
        if "/releases/" in plan:
            graph = self._graphs.get(plan.partition("/releases/")[0])
            node = graph.releases.get(plan) if graph is not None else None
            return node is not None and not node.disabled and not node.retracted
        known = self._rollouts.get(plan)
        return known is not None and known.control_epoch <= control_epoch

    def blob_key(self, organization: str, digest: str) -> str | None:
        """Key of a binary in the object store."""
        return self._blobs.get((organization, digest))

    def gateway_seq(self, gateway: str) -> int | None:
        """Public number under which the registry published a gateway's key."""
        return self._gateway_seq.get(gateway)

    def summary(self) -> str:
        """Sizes, for the health answer."""
        sizes = {"rollouts": len(self._rollouts), "live": len(self._live_attempts), "parked": len(self._parked)}
        return json.dumps(sizes)
