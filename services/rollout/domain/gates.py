"""Gates: when a stage has passed, and when it has failed. Pure arithmetic on the counters of a stage."""

from __future__ import annotations

from groundswell.rollout.v1 import rollout_pb2

from services.rollout.domain.state import Counts

PPM = 1_000_000


def min_sample(gate: rollout_pb2.Gate) -> int:
    """Finished attempts needed before the stage can pass."""
    return gate.min_sample or 1


def tripped(gate: rollout_pb2.Gate, counts: Counts) -> str:
    """Reason code of the limit that tripped, empty when none did. Failures accepted at a resume count no more."""
    bad = counts.bad - counts.forgiven
    if bad >= (gate.failure_limit or 1):
        return "FAILURE_LIMIT"
    if (
        gate.failure_limit_ppm
        and counts.sample >= min_sample(gate)
        and bad * PPM >= gate.failure_limit_ppm * counts.sample
        and bad > 0
    ):
        return "FAILURE_LIMIT_SHARE"
    return ""


def passes(gate: rollout_pb2.Gate, counts: Counts) -> bool:
    """Enough finished attempts, and enough of them confirmed through their soak."""
    sample = counts.sample
    return sample >= min_sample(gate) and counts.soaked * PPM >= (gate.success_ppm or PPM) * sample


def holds(gate: rollout_pb2.Gate, counts: Counts) -> bool:
    """Whether a stage that passed still stands. Stragglers in soak do not re-open it; lost confirmations do."""
    if counts.advanced:
        return True
    sample = counts.sample
    # A failed device that is tried again is in flight and out of the sample for a while.
    enough = sample + counts.in_flight >= min_sample(gate)
    return enough and counts.confirmed * PPM >= (gate.success_ppm or PPM) * sample
