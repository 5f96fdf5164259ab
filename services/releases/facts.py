"""What resolution needs from other services, in two forms: trimmed for the own log, compact for the state.

A foreign record becomes an event only when it changes one of these facts, so that a fleet's daily reports of unrelated
fields write nothing here. Trimmed images keep the foreign message types: one conversion serves the gateway and this
service.
"""

from __future__ import annotations

from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2

from libs.resolution import BundleFacts, DeviceFacts, PlanFacts
from libs.resolution.convert import bundle_facts, device_facts, plan_facts


def trimmed_device(device: registry_pb2.Device) -> registry_pb2.Device:
    """Only what decides."""
    return registry_pb2.Device(
        name=device.name,
        uid=device.uid,
        cohort=device.cohort,
        tags=device.tags,
        target=device.target,
        quarantined=device.quarantined,
        state=device.state,
        reported=device.reported,
    )


def facts_of_device(device: registry_pb2.Device) -> DeviceFacts:
    """As a dry run sees it: the security version that it reports is the best floor known here."""
    return device_facts(device, floor=device.reported.security_version)


def trimmed_bundle(bundle: artifacts_pb2.Bundle) -> artifacts_pb2.Bundle:
    """Only what decides; entries keep their target alone."""
    return artifacts_pb2.Bundle(
        name=bundle.name,
        version=bundle.version,
        security_version=bundle.security_version,
        entries=[
            artifacts_pb2.BundleEntry(target=target) for target in sorted({entry.target for entry in bundle.entries})
        ],
        offerable=bundle.offerable,
        not_offerable_reason=bundle.not_offerable_reason,
    )


def facts_of_bundle(bundle: artifacts_pb2.Bundle) -> BundleFacts:
    """As resolution sees it."""
    return bundle_facts(bundle)


def trimmed_rollout(rollout: rollout_pb2.Rollout) -> rollout_pb2.Rollout:
    """Only what an explanation names; counts move all the time and are left out."""
    return rollout_pb2.Rollout(
        name=rollout.name,
        version=rollout.version,
        state=rollout.state,
        state_reason=rollout.state_reason,
        current_stage=rollout.current_stage,
        stages=[rollout_pb2.Stage(display_name=stage.display_name, cohort=stage.cohort) for stage in rollout.stages],
        stage_statuses=[
            rollout_pb2.StageStatus(state=status.state, release=status.release) for status in rollout.stage_statuses
        ],
        create_time=rollout.create_time,
    )


def facts_of_rollout(rollout: rollout_pb2.Rollout) -> PlanFacts:
    """As an explanation sees it."""
    return plan_facts(rollout)
