"""The pure core of rollout: state, rules, fold."""

from services.rollout.domain import summary
from services.rollout.domain.commands import (
    AuthorizeSwitch,
    AuthorizeSwitches,
    ClaimOffers,
    Control,
    CreateRollout,
    RecordObservations,
    RetryAttempt,
    StageReleaseMade,
    StageReleaseRefused,
)
from services.rollout.domain.decide import RolloutDomain
from services.rollout.domain.state import State

__all__ = [
    "AuthorizeSwitch",
    "AuthorizeSwitches",
    "ClaimOffers",
    "Control",
    "CreateRollout",
    "RecordObservations",
    "RetryAttempt",
    "RolloutDomain",
    "StageReleaseMade",
    "StageReleaseRefused",
    "State",
    "summary",
]
