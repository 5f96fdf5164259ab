"""Emergencies, retries, rates and windows under duplicates, loss, reordering and new leaders; the leader checks itself.

What must hold at every event is asserted where it is appended: see ``world.Leader``.
"""

from __future__ import annotations

import pytest
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import events_pb2

from tests.simulation.rollout.world import PRODUCT, Device, Rollout, World, cohort, fact, seconds

SIZES = {"canary": 5, "beta": 12, "production": 24}
DISTURBED = {"duplicates": 0.3, "loss": 0.15, "replays": 0.1, "lag": 6}
NAME = f"{PRODUCT}/rollouts"


def fleet(seed: int, **disturbances: float) -> World:
    world = World(seed, **disturbances)  # type: ignore[arg-type]
    world.add_bundle("1.0.0")
    for name, size in SIZES.items():
        release = world.add_release(name, "1.0.0", "1-0-0")
        for index in range(size):
            world.add_device(f"{name}-{index}", name, release=release)
    return world


def plan(*names: str, tags: tuple[str, ...] = (), rate: int = 0, **fields: object) -> Rollout:
    image = Rollout(**fields)  # type: ignore[arg-type]
    for name in names or SIZES:
        stage = image.stages.add(display_name=name, cohort=cohort(name), max_in_flight=6, tags=tags)
        stage.max_grants_per_minute = rate
        stage.gate.min_sample = 2
        stage.gate.success_ppm = 500_000
        stage.gate.failure_limit = 99
        stage.gate.soak.CopyFrom(seconds(6))
        stage.gate.dark_after.CopyFrom(seconds(30))
    image.attempt_policy.lease.CopyFrom(seconds(60))
    image.attempt_policy.go_valid.CopyFrom(seconds(5))
    return image


def state_of(world: World, name: str) -> int:
    return world.leader.plan(name).state


def begin(world: World, name: str, version: str, image: Rollout) -> None:
    world.add_bundle(version)
    world.create(name, version, image)
    world.control("start", name)


def ticks(world: World, count: int) -> None:
    for _ in range(count):
        world.tick()


def expose(world: World) -> list[Device]:
    """Some devices carry the tag that the emergency means; at least two of each cohort."""
    by_cohort = [[one for one in world.devices if one.cohort == cohort(name)] for name in SIZES]
    exposed = [one for devices in by_cohort for one in world.random.sample(devices, max(2, len(devices) // 4))]
    for device in exposed:
        world.device_fact(device, tags=["exposed"])
    return exposed


@pytest.mark.parametrize("seed", range(6))
def test_t80_t81_an_emergency_overtakes_and_the_older_rollout_goes_on(seed: int) -> None:
    world = fleet(seed, **DISTURBED)
    exposed = expose(world)
    begin(world, "r14", "1.4.0", plan())
    ticks(world, world.random.randrange(1, 60))
    running = state_of(world, "r14") == Rollout.STATE_RUNNING
    begin(world, "fix", "1.5.0", plan(tags=("exposed",), expedited=True))
    older = world.leader.plan("r14")
    assert bool(older.superseded_by) is running

    world.run_until(lambda: state_of(world, "fix") == Rollout.STATE_COMPLETED)
    world.run_until(lambda: state_of(world, "r14") == Rollout.STATE_COMPLETED)
    world.run_until(lambda: {one.running.version for one in exposed} == {"1.5.0"})
    ticks(world, 20)
    for device in world.devices:
        assert device.running.version == ("1.5.0" if device in exposed else "1.4.0"), device.name
    world.leader.replay()


@pytest.mark.parametrize("seed", range(6))
def test_t78_t81_a_kill_at_any_moment_ends_it_and_nothing_is_lost(seed: int) -> None:
    world = fleet(seed, **DISTURBED)
    begin(world, "r20", "2.0.0", plan(failure_action=Rollout.FAILURE_ACTION_ROLL_BACK))
    ticks(world, world.random.randrange(1, 60))
    if world.random.random() < 0.4 and state_of(world, "r20") == Rollout.STATE_RUNNING:
        world.control("roll_back", "r20")
        ticks(world, world.random.randrange(1, 15))
    if state_of(world, "r20") in (Rollout.STATE_COMPLETED, Rollout.STATE_ROLLED_BACK):
        return
    world.control("kill", "r20")
    at = len(world.leader.log)
    ticks(world, 80)
    later = [event.payload for event in world.leader.log[at:]]
    assert not [it for it in later if isinstance(it, events_pb2.AttemptGranted | events_pb2.GoGiven)]
    counts = world.leader.plan("r20").stage_statuses
    assert [status.in_flight for status in counts] == [0, 0, 0], "what had go has ended, the rest was cancelled"
    assert all(not device.attempt for device in world.devices)
    world.leader.replay()


@pytest.mark.parametrize("seed", range(4))
def test_t79_retries_and_moves_between_cohorts(seed: int) -> None:
    world = fleet(seed, **DISTURBED)
    bad = world.random.sample(world.devices, 8)
    for device in bad:
        device.fate["1.4.0"] = "revert"
    begin(world, "r14", "1.4.0", plan())
    for _ in range(4):
        ticks(world, 25)
        mover = world.random.choice(bad)
        mover.cohort = cohort(world.random.choice(list(SIZES)))
        world.device_fact(mover)
        plan_now = world.leader.plan("r14")
        failed = sum(status.failed + status.reverted for status in plan_now.stage_statuses)
        if failed and plan_now.state == Rollout.STATE_RUNNING:
            world.control("retry", "r14")
            for device in world.random.sample(bad, 3):
                device.fate.pop("1.4.0", None)
    spent = world.leader.failures
    assert all(count <= world.leader.plan("r14").retries + 1 for count in spent.values())
    assert spent, "the simulation failed nothing"
    world.leader.replay()


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_holds_and_everybody_gets_through(seed: int) -> None:
    world = fleet(seed, **DISTURBED)
    begin(world, "r14", "1.4.0", plan(rate=24))
    world.run_until(lambda: all(device.running.version == "1.4.0" for device in world.devices), limit=900)
    moments = world.leader.granted_ms[f"{NAME}/r14", 2]
    assert max(moments) - min(moments) > 45_000, "24 devices at 24 a minute take most of a minute"
    assert state_of(world, "r14") in (Rollout.STATE_RUNNING, Rollout.STATE_COMPLETED)


@pytest.mark.parametrize("seed", range(3))
def test_t82_grants_stay_inside_the_window_of_each_day_and_the_rollout_completes(seed: int) -> None:
    world = fleet(seed, **DISTURBED)
    product = registry_pb2.Product(name=PRODUCT)
    product.policy.poll_interval.CopyFrom(seconds(2))
    product.policy.poll_jitter.CopyFrom(seconds(1))
    window = product.policy.maintenance_window
    window.time_zone = "Europe/Vienna"
    window.start_minute = 23 * 60 + 14  # 22:14 in UTC: a minute after the world begins
    window.length.CopyFrom(seconds(40))
    world.leader.do(fact("registry", PRODUCT, registry_events.ProductChanged(product=product)))
    begin(world, "r14", "1.4.0", plan())
    days = 0
    while state_of(world, "r14") != Rollout.STATE_COMPLETED:
        ticks(world, 110)
        world.leader.now_ms += 86_400_000 - 110_000
        days += 1
        assert days < 15
    assert days > 1
    expired = sum(status.expired for status in world.leader.plan("r14").stage_statuses)
    assert expired == 0, "waiting for the window is nobody's failure"
    assert device_pb2.ATTEMPT_STATE_FAILED not in {it.state for it in world.leader.state.attempts.values()}
