"""The demo's two rollouts on sixty devices over the pure decider, with every disturbance a fleet has."""

from __future__ import annotations

import pytest
from groundswell.rollout.v1 import events_pb2, rollout_pb2

from tests.simulation.rollout.world import PRODUCT, Rollout, Status, World, cohort, seconds

SIZES = {"canary": 5, "beta": 15, "production": 40}
CAPS = {"canary": 5, "beta": 10, "production": 20}


def rollout_of(failure_limit: int = 3) -> Rollout:
    image = Rollout(failure_action=Rollout.FAILURE_ACTION_ROLL_BACK)
    for name, size in SIZES.items():
        stage = image.stages.add(display_name=name, cohort=cohort(name), max_in_flight=CAPS[name])
        stage.gate.min_sample = size
        stage.gate.success_ppm = 600_000
        stage.gate.failure_limit = failure_limit
        stage.gate.soak.CopyFrom(seconds(8))
        stage.gate.dark_after.CopyFrom(seconds(20))
    image.attempt_policy.lease.CopyFrom(seconds(60))
    image.attempt_policy.go_valid.CopyFrom(seconds(5))
    return image


def fleet(seed: int, **disturbances: float) -> World:
    world = World(seed, **disturbances)  # type: ignore[arg-type]
    world.add_bundle("1.0.0")
    for name, size in SIZES.items():
        release = world.add_release(name, "1.0.0", "1-0-0")
        for index in range(size):
            world.add_device(f"{name}-{index}", name, release=release)
    return world


def state_of(world: World, name: str) -> rollout_pb2.Rollout.State:
    return world.leader.plan(name).state


def good_rollout(world: World) -> None:
    world.add_bundle("1.4.0", 1)
    world.create("r14", "1.4.0", rollout_of())
    world.control("start", "r14")
    world.run_until(lambda: state_of(world, "r14") == Rollout.STATE_COMPLETED)
    plan = world.leader.plan("r14")
    for (name, size), status in zip(SIZES.items(), plan.stage_statuses, strict=True):
        assert (status.confirmed, status.failed, status.claimed, status.in_flight) == (size, 0, size, 0), name
        assert status.peak_in_flight <= CAPS[name]
    assert {device.running.version for device in world.devices} == {"1.4.0"}


def bad_rollout(world: World) -> None:
    fates = ["revert", "good", "sick", "sick", "good"]
    for device, fate in zip(world.devices[:5], fates, strict=True):
        device.fate["2.0.0"] = fate
    world.add_bundle("2.0.0", 1)
    world.create("r20", "2.0.0", rollout_of())
    world.control("start", "r20")
    world.run_until(lambda: state_of(world, "r20") == Rollout.STATE_ROLLED_BACK)
    plan = world.leader.plan("r20")
    canary, beta, production = plan.stage_statuses
    assert plan.state_reason == "FAILURE_LIMIT"
    assert (canary.reverted, canary.withdrawn, canary.claimed) == (1, 2, 5)
    assert canary.rolled_back == canary.confirmed + canary.withdrawn, "all that ran it are back"
    # A healthy device that had not switched when the gate tripped is cancelled, or told to forget a go it never got.
    assert canary.confirmed == 2 or world.loss
    assert canary.held == canary.rollback_failed == 0
    assert beta.claimed == production.claimed == 0
    assert beta.state == production.state == Status.STATE_PENDING
    assert {device.running.version for device in world.devices} == {"1.4.0"}
    world.leader.replay()
    granted = [event.payload for event in world.leader.log if isinstance(event.payload, events_pb2.AttemptGranted)]
    for it in granted:
        if it.attempt.rollout.endswith("/r20"):
            assert "canary" in it.attempt.device, "beta and production were never offered"


def changes(world: World, rollout: str) -> list[str]:
    return [
        it.change
        for name, it in world.leader.public
        if name.endswith(f"/rollouts/{rollout}") and isinstance(it, events_pb2.RolloutChanged)
    ]


def test_the_demo_walks_through_the_cohorts_and_the_bad_release_comes_back() -> None:
    world = fleet(1)
    good_rollout(world)
    assert [world.leader.plan("r14").stage_statuses[i].peak_in_flight for i in range(3)] == [5, 10, 20], "caps are used"
    opened = [change for change in changes(world, "r14") if change != "rollout.stage_opened"]
    assert opened == ["rollout.created", "rollout.started", *["rollout.stage_passed"] * 3, "rollout.completed"]
    bad_rollout(world)
    tail = changes(world, "r20")[-3:]
    assert tail == ["rollout.halted", "rollout.rolling_back", "rollout.rolled_back"]


@pytest.mark.parametrize("seed", range(12))
def test_duplicates_loss_reordering_and_new_leaders_change_no_outcome(seed: int) -> None:
    world = fleet(seed, duplicates=0.3, loss=0.15, replays=0.1, lag=6)
    good_rollout(world)
    bad_rollout(world)


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_dies_at_boot_goes_dark_and_counts(seed: int) -> None:
    world = fleet(seed, lag=3)
    world.devices[0].fate["1.4.0"] = "dead"
    world.add_bundle("1.4.0")
    world.create("r14", "1.4.0", rollout_of())
    world.control("start", "r14")
    world.run_until(lambda: state_of(world, "r14") == Rollout.STATE_COMPLETED)
    canary = world.leader.plan("r14").stage_statuses[0]
    assert (canary.confirmed, canary.dark, canary.in_flight) == (4, 1, 0)
    name = f"{PRODUCT}/rollouts/r14"
    assert world.leader.state.rollouts[name].to_return == 59
