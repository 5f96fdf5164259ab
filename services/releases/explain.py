"""Why one device would be offered what it would be offered, and what would have to change.

Every blocking code of resolution has a remedy: a sentence (that of the step) and, where a call of the API changes it,
which one, on which resource, with which fields. An empty value is up to the operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2 as pb

from libs.names import product_of
from libs.resolution import Code
from services.releases.domain import State
from services.releases.views import Derived, device_of, resolve_devices

_REGISTRY: Final = "groundswell.registry.v1.RegistryService"
_RELEASES: Final = "groundswell.releases.v1.ReleasesService"
_ARTIFACTS: Final = "groundswell.artifacts.v1.ArtifactsService"
_ROLLOUT: Final = "groundswell.rollout.v1.RolloutService"

_NO_FIELDS: Final[Mapping[str, str]] = MappingProxyType({})
_Of = Callable[[device_pb2.Reason, str], pb.Remedy]


def _call(method: str, fields: Mapping[str, str] = _NO_FIELDS, *, on: str = "subject") -> _Of:
    """A call on the step's subject, on the device, or on a metadata value; ``new`` makes a resource."""

    def remedy(step: device_pb2.Reason, device: str) -> pb.Remedy:
        place = {"subject": step.subject, "device": device, "new": ""}.get(on, step.metadata.get(on, ""))
        return pb.Remedy(sentence=step.message, method=method, resource=place, fields=fields)

    return remedy


def _nothing(step: device_pb2.Reason, _device: str) -> pb.Remedy:
    """No call changes it: the device itself must, or time."""
    return pb.Remedy(sentence=step.message)


def _wanted_tags(step: device_pb2.Reason, device: str) -> pb.Remedy:
    fields = {"device.tags": step.metadata.get("tags", "")}
    return pb.Remedy(sentence=step.message, method=f"{_REGISTRY}/UpdateDevice", resource=device, fields=fields)


REMEDIES: Final[Mapping[Code, _Of]] = {
    Code.DEVICE_RETIRED: _nothing,
    Code.QUARANTINED: _call(f"{_REGISTRY}/UpdateDevice", {"device.quarantined": "false"}, on="device"),
    Code.OVERRIDE_ALREADY_INSTALLED: _call(f"{_RELEASES}/UpdateBundleOverride", {"bundle_override.end_time": ""}),
    Code.NO_COHORT: _call(f"{_REGISTRY}/UpdateDevice", {"device.cohort": ""}, on="device"),
    Code.NO_RELEASES: _call(f"{_RELEASES}/CreateRelease", {"release.bundle": ""}, on="new"),
    Code.NOTHING_REPORTED: _nothing,
    Code.NO_MATCH: _call(f"{_RELEASES}/UpdateRelease", {"release.version_requirement": ""}, on="new"),
    Code.UP_TO_DATE: _call(f"{_RELEASES}/CreateRelease", {"release.bundle": ""}, on="new"),
    Code.RELEASE_DISABLED: _call(f"{_RELEASES}/UpdateRelease", {"release.disabled": "false"}),
    Code.RELEASE_RETRACTED: _call(f"{_RELEASES}/CreateRelease", {"release.bundle": ""}, on="new"),
    Code.VERSION_NOT_SATISFIED: _call(f"{_RELEASES}/UpdateRelease", {"release.version_requirement": ""}),
    Code.NOT_YET_SCHEDULED: _call(f"{_RELEASES}/UpdateRelease", {"release.schedule_time": ""}),
    Code.TAGS_NOT_MATCHED: _wanted_tags,
    Code.BUNDLE_NOT_OFFERABLE: _call(f"{_ARTIFACTS}/SignBundle", {"signature": ""}, on="bundle"),
    Code.BUNDLE_UNKNOWN: _nothing,
    Code.TARGET_NOT_SUPPORTED: _call(f"{_ARTIFACTS}/CreateBundle", {"entries": ""}, on="new"),
    Code.SECURITY_VERSION_BELOW_FLOOR: _call(f"{_ARTIFACTS}/CreateBundle", {"security_version": ""}, on="new"),
    Code.STAGE_NOT_OPEN: _call(f"{_ROLLOUT}/AdvanceStage"),
    Code.ROLLOUT_NOT_STARTED: _call(f"{_ROLLOUT}/StartRollout"),
    Code.ROLLOUT_PAUSED: _call(f"{_ROLLOUT}/ResumeRollout"),
    Code.ROLLOUT_HALTED: _call(f"{_ROLLOUT}/ResumeRollout"),
    Code.ROLLOUT_ROLLING_BACK: _call(f"{_ROLLOUT}/CreateRollout", on="new"),
    Code.ROLLOUT_ROLLED_BACK: _call(f"{_ROLLOUT}/CreateRollout", on="new"),
    Code.ROLLOUT_KILLED: _call(f"{_ROLLOUT}/CreateRollout", on="new"),
    Code.ROLLOUT_SUPERSEDED: _nothing,
    Code.ROLLOUT_ABORTED: _call(f"{_ROLLOUT}/CreateRollout", on="new"),
}
"""Every code that can block."""


def explanation(
    state: State,
    name: str,
    running: registry_pb2.ReportedState | None,
    now_ms: int,
    derived: Derived | None = None,
) -> pb.ExplainDeviceResponse:
    """The dry run of one device, with the first reason that blocks and its remedy."""
    product = product_of(name)
    supposed = pb.SupposedDevice(device=name, running=running)
    facts = device_of(state, product, name, "name")
    (found,) = resolve_devices(state, product, (), (supposed,), now_ms, derived)
    reported = registry_pb2.ReportedState(
        release=facts.release, bundle=facts.bundle, version=facts.version, security_version=facts.security_floor
    )
    answer = pb.ExplainDeviceResponse(
        device=name,
        cohort=facts.cohort,
        running=running if running is not None else reported,
        candidates=found.candidates,
        steps=found.steps,
    )
    blocking = next((step for step in found.steps if step.blocking), None)
    if blocking is not None:
        answer.first_blocking.CopyFrom(blocking)
        answer.remedy.CopyFrom(REMEDIES[Code(blocking.code)](blocking, name))
    return answer
