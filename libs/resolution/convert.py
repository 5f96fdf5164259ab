"""From the public records of services to the facts resolution looks at: the only place that knows both."""

from __future__ import annotations

from collections.abc import Iterable
from sys import intern

from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2
from groundswell.rollout.v1 import rollout_pb2

from libs.resolution.buckets import uid_bytes
from libs.resolution.model import (
    BundleFacts,
    Candidate,
    CohortGraph,
    DeviceFacts,
    OverrideFacts,
    PlanFacts,
    PlanStage,
    ReleaseNode,
    Step,
)

_OPEN = frozenset(
    {
        rollout_pb2.StageStatus.STATE_OPEN,
        rollout_pb2.StageStatus.STATE_PASSED,
        rollout_pb2.StageStatus.STATE_FAILED,
        rollout_pb2.StageStatus.STATE_STALLED,
        rollout_pb2.StageStatus.STATE_AWAITING_APPROVAL,
    }
)


def device_facts(
    device: registry_pb2.Device, running: registry_pb2.ReportedState | None = None, floor: int = 0
) -> DeviceFacts:
    """A device with what it runs: as reported just now, or as the registry knows.

    Texts that a whole fleet shares are kept once.
    """
    reported = running if running is not None else device.reported
    return DeviceFacts(
        name=device.name,
        uid=uid_bytes(device.uid),
        cohort=intern(device.cohort),
        tags=frozenset(map(intern, device.tags)),
        target=intern(device.target),
        quarantined=device.quarantined,
        release=intern(reported.release),
        bundle=intern(reported.bundle),
        version=intern(reported.version),
        security_floor=floor,
        retired=device.state == registry_pb2.Device.STATE_RETIRED,
    )


def release_node(release: releases_pb2.Release) -> ReleaseNode:
    """A release of a graph."""
    phase = release.phase if release.HasField("phase") else None
    return ReleaseNode(
        name=release.name,
        bundle=release.bundle,
        salt=uid_bytes(release.uid) if release.uid else b"",
        version=release.version,
        requirement=release.version_requirement,
        security_version=release.security_version,
        required=release.required,
        disabled=release.disabled,
        retracted=release.retracted,
        schedule_ms=release.schedule_time.ToMilliseconds() if release.HasField("schedule_time") else 0,
        next=release.next,
        share_ppm=phase.share_ppm if phase is not None and phase.share_ppm else None,
        tags=frozenset(phase.tags) if phase is not None else frozenset(),
        rollout=release.rollout,
        created_ms=release.create_time.ToMilliseconds(),
    )


def cohort_graph(cohort: str, releases: Iterable[releases_pb2.Release]) -> CohortGraph:
    """A cohort's graph."""
    return CohortGraph(cohort, {release.name: release_node(release) for release in releases})


def bundle_facts(bundle: artifacts_pb2.Bundle) -> BundleFacts:
    """Offerability and hardware of a bundle."""
    return BundleFacts(
        name=bundle.name,
        offerable=bundle.offerable,
        targets=frozenset(entry.target for entry in bundle.entries),
        reason=bundle.not_offerable_reason,
        version=bundle.version,
        security_version=bundle.security_version,
    )


def override_facts(override: releases_pb2.BundleOverride) -> OverrideFacts:
    """An override."""
    return OverrideFacts(
        name=override.name,
        bundle=override.bundle,
        start_ms=override.start_time.ToMilliseconds(),
        end_ms=override.end_time.ToMilliseconds() if override.HasField("end_time") else 0,
        created_ms=override.create_time.ToMilliseconds(),
    )


def plan_facts(rollout: rollout_pb2.Rollout) -> PlanFacts:
    """A rollout as far as explanations need it."""
    statuses = list(rollout.stage_statuses)
    stages = tuple(
        PlanStage(
            display_name=stage.display_name,
            cohort=stage.cohort,
            open=index < len(statuses) and statuses[index].state in _OPEN,
            release=statuses[index].release if index < len(statuses) else "",
        )
        for index, stage in enumerate(rollout.stages)
    )
    return PlanFacts(
        rollout=rollout.name,
        version=rollout.version,
        state=rollout_pb2.Rollout.State.Name(rollout.state).removeprefix("STATE_"),
        current_stage=rollout.current_stage,
        stages=stages,
        state_reason=rollout.state_reason,
        created_ms=rollout.create_time.ToMilliseconds(),
    )


def reason_of(step: Step) -> device_pb2.Reason:
    """A step as it is stored and shown."""
    return device_pb2.Reason(
        code=str(step.code),
        message=step.message,
        subject=step.subject,
        blocking=step.blocking,
        metadata=dict(step.metadata),
    )


def candidate_of(candidate: Candidate) -> releases_pb2.Candidate:
    """A candidate as it is sent to the rollout leader."""
    return releases_pb2.Candidate(
        release=candidate.release,
        bundle=candidate.bundle,
        rollback_of=candidate.rollback_of,
        bundle_override=candidate.bundle_override,
    )
