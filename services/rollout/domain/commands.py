"""Commands of the rollout leader."""

from __future__ import annotations

from dataclasses import dataclass

from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.rollout.v1 import rollout_pb2


@dataclass(frozen=True, slots=True)
class ClaimOffers:
    """Devices ask; ``inbox_lag_ms`` is how far the leader's own view of facts from elsewhere was behind."""

    request: rollout_pb2.ClaimOffersRequest
    inbox_lag_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AuthorizeSwitch:
    """A device asks for ``go``."""

    request: rollout_pb2.AuthorizeSwitchRequest
    inbox_lag_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class AuthorizeSwitches:
    """Devices ask for ``go``, each for itself."""

    request: rollout_pb2.BatchAuthorizeSwitchRequest
    inbox_lag_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class RecordObservations:
    """Records of the check-in stream; ``routing_key`` is any key of the leader's partition."""

    request: rollout_pb2.RecordObservationsRequest
    routing_key: str


@dataclass(frozen=True, slots=True)
class CreateRollout:
    """A draft. The bundle was read from its owner, the dry run of all cohorts was good."""

    name: str
    rollout: rollout_pb2.Rollout
    bundle: artifacts_pb2.Bundle


@dataclass(frozen=True, slots=True)
class Control:
    """An operator's word on a rollout: start, pause, resume, abort, roll_back, advance, retry or kill."""

    verb: str
    name: str
    etag: str = ""
    reason: str = ""
    devices: tuple[str, ...] = ()
    """Of a retry: only these; empty means all that failed."""


@dataclass(frozen=True, slots=True)
class RetryAttempt:
    """An operator's word on a failed attempt: its device may try again."""

    name: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StageReleaseMade:
    """A task made the release of a stage."""

    task_id: str
    release: str


@dataclass(frozen=True, slots=True)
class StageReleaseRefused:
    """The release of a stage cannot be made, ever."""

    task_id: str
    code: str
