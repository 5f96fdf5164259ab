"""Who gets what, decided in memory: SemVer, requirements, shares, and ``resolve()``. Pure; time is an input."""

from libs.resolution.buckets import in_share
from libs.resolution.model import (
    BundleFacts,
    Candidate,
    Code,
    CohortGraph,
    DeviceFacts,
    OverrideFacts,
    PlanFacts,
    PlanStage,
    ReleaseNode,
    Resolution,
    Step,
)
from libs.resolution.requirement import RequirementError, check_requirement, satisfies
from libs.resolution.resolve import resolve
from libs.resolution.semver import VersionError, parse_version

__all__ = [
    "BundleFacts",
    "Candidate",
    "Code",
    "CohortGraph",
    "DeviceFacts",
    "OverrideFacts",
    "PlanFacts",
    "PlanStage",
    "ReleaseNode",
    "RequirementError",
    "Resolution",
    "Step",
    "VersionError",
    "check_requirement",
    "in_share",
    "parse_version",
    "resolve",
    "satisfies",
]
