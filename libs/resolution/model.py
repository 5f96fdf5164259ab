"""What resolution looks at and what it answers. All values are frozen; graphs precompute their indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType

import msgspec

from libs.resolution.requirement import satisfies
from libs.resolution.semver import Version, version_or_none

_NONE: Mapping[str, str] = MappingProxyType({})
_MAX_ENTRIES = 1024


class Code(StrEnum):
    """Closed list of what a step may say. The values are part of the API."""

    DEVICE_RETIRED = "DEVICE_RETIRED"
    QUARANTINED = "QUARANTINED"
    OVERRIDE_ACTIVE = "OVERRIDE_ACTIVE"
    OVERRIDE_ALREADY_INSTALLED = "OVERRIDE_ALREADY_INSTALLED"
    NO_COHORT = "NO_COHORT"
    NO_RELEASES = "NO_RELEASES"
    CURRENT_BY_RELEASE = "CURRENT_BY_RELEASE"
    CURRENT_BY_BUNDLE = "CURRENT_BY_BUNDLE"
    MATCHED_BY_VERSION = "MATCHED_BY_VERSION"
    NOTHING_REPORTED = "NOTHING_REPORTED"
    NO_MATCH = "NO_MATCH"
    UP_TO_DATE = "UP_TO_DATE"
    STEP_BACK_TO_ORIGIN = "STEP_BACK_TO_ORIGIN"
    REQUIRED_STOP = "REQUIRED_STOP"
    RELEASE_DISABLED = "RELEASE_DISABLED"
    RELEASE_RETRACTED = "RELEASE_RETRACTED"
    VERSION_NOT_SATISFIED = "VERSION_NOT_SATISFIED"
    NOT_YET_SCHEDULED = "NOT_YET_SCHEDULED"
    TAGS_NOT_MATCHED = "TAGS_NOT_MATCHED"
    NOT_IN_SHARE = "NOT_IN_SHARE"
    BUNDLE_NOT_OFFERABLE = "BUNDLE_NOT_OFFERABLE"
    BUNDLE_UNKNOWN = "BUNDLE_UNKNOWN"
    TARGET_NOT_SUPPORTED = "TARGET_NOT_SUPPORTED"
    SECURITY_VERSION_BELOW_FLOOR = "SECURITY_VERSION_BELOW_FLOOR"
    STAGE_NOT_OPEN = "STAGE_NOT_OPEN"
    ROLLOUT_NOT_STARTED = "ROLLOUT_NOT_STARTED"
    ROLLOUT_PAUSED = "ROLLOUT_PAUSED"
    ROLLOUT_HALTED = "ROLLOUT_HALTED"
    ROLLOUT_ROLLING_BACK = "ROLLOUT_ROLLING_BACK"
    ROLLOUT_ROLLED_BACK = "ROLLOUT_ROLLED_BACK"
    ROLLOUT_ABORTED = "ROLLOUT_ABORTED"
    ROLLOUT_KILLED = "ROLLOUT_KILLED"
    ROLLOUT_SUPERSEDED = "ROLLOUT_SUPERSEDED"
    CANDIDATE = "CANDIDATE"


class Step(msgspec.Struct, frozen=True):
    """One step of a resolution, with what would have to change when it blocks."""

    code: Code
    message: str
    subject: str = ""
    blocking: bool = False
    metadata: Mapping[str, str] = _NONE


class Candidate(msgspec.Struct, frozen=True):
    """One thing to offer. A step back names only the release that is left."""

    release: str = ""
    bundle: str = ""
    rollback_of: str = ""
    bundle_override: str = ""


class Resolution(msgspec.Struct, frozen=True):
    """Candidates in the order of preference, and the steps that led to them."""

    candidates: tuple[Candidate, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device and what it reports to run."""

    name: str
    uid: bytes
    cohort: str = ""
    tags: frozenset[str] = frozenset()
    target: str = ""
    quarantined: bool = False
    release: str = ""
    bundle: str = ""
    version: str = ""
    security_floor: int = 0
    """Highest security version known to be confirmed; the leader judges by its own."""
    retired: bool = False


@dataclass(frozen=True)
class ReleaseNode:
    """A release of a graph."""

    name: str
    bundle: str
    salt: bytes = b""
    version: str = ""
    requirement: str = ""
    security_version: int = 0
    required: bool = False
    disabled: bool = False
    retracted: bool = False
    schedule_ms: int = 0
    """0 means at once."""
    next: str = ""
    share_ppm: int | None = None
    tags: frozenset[str] = frozenset()
    rollout: str = ""
    created_ms: int = 0

    @cached_property
    def parsed_version(self) -> Version | None:
        """The version by precedence, None when it has none."""
        return version_or_none(self.version) if self.version else None

    # What is said of a release at every poll is made once.

    @cached_property
    def candidate(self) -> Candidate:
        """The offer of this release."""
        return Candidate(release=self.name, bundle=self.bundle)

    @cached_property
    def candidate_step(self) -> Step:
        """It passed every check made here."""
        return Step(Code.CANDIDATE, "may be offered", self.name, metadata={"version": self.version})

    @cached_property
    def current_step(self) -> Step:
        """The device says that it runs this release."""
        metadata = {"version": self.version}
        return Step(Code.CURRENT_BY_RELEASE, "the device reports this release", self.name, metadata=metadata)

    @cached_property
    def up_to_date_step(self) -> Step:
        """There is nothing after this release."""
        message = "the device runs the latest release of its cohort: a newer one would have to be created"
        return Step(Code.UP_TO_DATE, message, self.name, blocking=True, metadata={"version": self.version})


@dataclass(frozen=True)
class CohortGraph:
    """All releases of a cohort; each has at most one next, and one has none: the latest."""

    cohort: str
    releases: Mapping[str, ReleaseNode] = field(default_factory=dict)

    @cached_property
    def by_bundle(self) -> Mapping[str, Sequence[ReleaseNode]]:
        """Releases of a bundle, best match for a device that reports only the bundle first."""
        groups: dict[str, list[ReleaseNode]] = {}
        for node in self.releases.values():
            groups.setdefault(node.bundle, []).append(node)
        return {bundle: sorted(nodes, key=_bundle_preference) for bundle, nodes in groups.items()}

    @cached_property
    def by_version(self) -> Sequence[ReleaseNode]:
        """Releases with version and requirement, lowest version first; ties by age, then id."""
        nodes = [node for node in self.releases.values() if node.parsed_version is not None and node.requirement]
        return sorted(nodes, key=lambda node: (node.parsed_version, node.created_ms, node.name))

    def on_bundle(self, bundle: str) -> ReleaseNode | None:
        """The release that a device stands on which reports only this bundle."""
        matching = self.by_bundle.get(bundle) if bundle else None
        return matching[0] if matching else None

    @cached_property
    def _entries(self) -> dict[str, ReleaseNode | None]:
        return {}

    def entry(self, version: str) -> ReleaseNode | None:
        """The release that a device begins with which reports only this version."""
        known = self._entries
        if version not in known:
            if len(known) >= _MAX_ENTRIES:
                known.clear()  # devices report what they like
            known[version] = next((node for node in self.by_version if satisfies(version, node.requirement)), None)
        return known[version]

    @cached_property
    def _paths(self) -> dict[str, tuple[ReleaseNode, ...]]:
        return {}

    def path_from(self, first: ReleaseNode) -> tuple[ReleaseNode, ...]:
        """From a release to the first required one (itself included), else to the latest."""
        known = self._paths.get(first.name)
        if known is not None:
            return known
        path = [first]
        # The owner of the graph keeps it free of cycles and of missing releases; a wrong one must end too.
        while not path[-1].required and len(path) < len(self.releases):
            following = self.releases.get(path[-1].next)
            if following is None:
                break
            path.append(following)
        return self._paths.setdefault(first.name, tuple(path))


def _bundle_preference(node: ReleaseNode) -> tuple[object, ...]:
    if node.parsed_version is None:
        return (1, (), node.created_ms, node.name)
    return (0, node.parsed_version, node.created_ms, node.name)


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """Whether a bundle may be offered, and to which hardware."""

    name: str
    offerable: bool
    targets: frozenset[str]
    reason: str = ""
    version: str = ""
    security_version: int = 0


@dataclass(frozen=True, slots=True)
class OverrideFacts:
    """A bundle override of the device."""

    name: str
    bundle: str
    start_ms: int
    end_ms: int = 0
    """0 means open-ended."""
    created_ms: int = 0


@dataclass(frozen=True, slots=True)
class PlanStage:
    """A stage of a rollout as far as an explanation needs it."""

    display_name: str
    cohort: str
    open: bool
    release: str = ""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """A rollout that targets the device's cohort: why its version is no candidate there."""

    rollout: str
    version: str
    state: str
    """RUNNING, PAUSED, HALTED, ROLLING_BACK, ROLLED_BACK, ABORTED … without the prefix."""
    current_stage: int
    stages: tuple[PlanStage, ...]
    state_reason: str = ""
    created_ms: int = 0
