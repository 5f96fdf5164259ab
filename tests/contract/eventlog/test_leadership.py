"""Claiming, fencing, resigning, handing over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from libs.errors import FailedPreconditionError, GroundswellError, UnavailableError
from libs.eventlog import Command
from libs.eventlog.config import public_topic
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import FencedError, UnknownOutcomeError
from tests.contract.eventlog.scenarios import (
    answers_wait_for_the_tail,
    check_one_writer_between_claims,
    hand_over,
    zombie_wakes_up,
)
from tests.contract.eventlog.support import (
    HOME,
    ORGANIZATION,
    Ask,
    FailOnce,
    Gate,
    Put,
    Refuse,
    Stumble,
    World,
    claims,
    eventually,
    retried,
    soon,
)


@pytest.mark.parametrize("held_at", ["stage", "staged", "commit"])
async def test_a_zombie_is_rejected(world: World, held_at: str) -> None:
    await zombie_wakes_up(world, held_at=held_at)


async def test_answers_wait_for_the_read_back(world: World) -> None:
    await answers_wait_for_the_tail(world)


async def test_the_claim_is_the_first_record_and_what_is_committed_follows_it(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    done = await replica.put("a", "1")
    assert done.result is not None
    assert done.result.value == 1  # type: ignore[attr-defined]
    events = await world.events()
    assert [kind for kind, *_ in events] == ["LeaderClaimed", "StringValue"]
    assert (await world.records())[-1].position == done.token.position


async def test_nothing_is_served_before_the_claim_is_read_back(world: World) -> None:
    tail = Gate("fetched registry")
    replica = await world.start(hooks=[tail])
    replica.log.election.assign(HOME)
    await tail.arrived.wait()
    with pytest.raises(UnavailableError, match="NOT_READY"):
        await replica.put("a", "1")
    assert not replica.runtime.health().leading
    tail.opened.set()
    await replica.runtime.wait_leading(soon(), [HOME])
    await replica.put("a", "1")


async def test_a_new_leader_with_a_slow_tail_sees_everything_before_it_serves(world: World) -> None:
    old = await world.start()
    await old.lead()
    for number in range(20):
        await old.put("a", str(number))
    tail = Gate("fetched registry")
    new = await world.start(hooks=[tail])
    old.retire()
    new.log.election.assign(HOME)
    await tail.arrived.wait()
    with pytest.raises(UnavailableError):
        await new.put("a", "too early")
    tail.opened.set()
    done = await retried(new, Put("a", "late"))
    assert done.result.value == 21  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["open", "stage", "staged", "commit", "committed"])
async def test_a_failed_claim_is_no_leadership(world: World, step: str) -> None:
    fault = FailOnce(step, UnknownOutcomeError("injected"))
    gate = Gate("open")
    replica = await world.start()
    replica.log.hooks.append(fault)
    replica.log.election.assign(HOME)
    await eventually(lambda: not fault.armed)
    replica.log.hooks.append(gate)
    await gate.arrived.wait()
    with pytest.raises(UnavailableError, match="NOT_READY"):
        await replica.put("a", "1")
    gate.opened.set()
    await replica.runtime.wait_leading(soon(), [HOME])
    await replica.put("a", "1")
    await check_one_writer_between_claims(world)


async def test_being_fenced_is_an_ordinary_resignation(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    usurper = await world.log().open_appender(f"{world.env}.registry.{HOME}")
    with pytest.raises(UnavailableError, match="OUTCOME_UNKNOWN"):
        await replica.put("a", "1")
    # Still assigned, so it claims again and goes on; nothing died of it.
    await retried(replica, Put("a", "2"))
    health = replica.runtime.health()
    assert health.live
    assert health.problems == ()
    assert len(claims(await world.events())) == 2
    await usurper.close()


@pytest.mark.parametrize("error", [AssertionError("no broker is known"), asyncio.CancelledError()])
@pytest.mark.parametrize("step", ["open", "stage", "commit"])
async def test_a_claim_that_fails_in_an_unforeseen_way_is_tried_again(
    world: World, step: str, error: BaseException
) -> None:
    """As when a client library asserts what does not hold while a broker comes back, or cancels itself."""
    replica = await world.start(hooks=[FailOnce(step, error)])
    await replica.lead()
    await replica.put("a", "1")
    health = replica.runtime.health()
    assert health.live
    assert health.problems == ()


def lose_one_marker(world: World) -> Callable[[], bool]:
    """From now on, once; answers whether that has happened."""
    log = world.log()
    assert isinstance(log, MemoryLog)
    left = [True]
    log.loses_markers = lambda: bool(left and left.pop())
    return lambda: not left


async def test_a_claim_whose_marker_was_lost_is_made_again(memory_world: World) -> None:
    lost = lose_one_marker(memory_world)
    replica = await memory_world.start(claim_read_back_s=0.1)
    await replica.lead()
    assert lost()
    await replica.put("a", "1")
    assert len(claims(await memory_world.events())) == 2
    assert replica.runtime.health().problems == ()


async def test_why_a_partition_is_not_led_can_be_seen(memory_world: World) -> None:
    log = memory_world.log()
    assert isinstance(log, MemoryLog)
    log.loses_markers = lambda: True
    replica = await memory_world.start(claim_read_back_s=0.05)
    replica.log.election.assign(HOME)
    await eventually(lambda: "a marker in the log is late or lost" in str(replica.runtime.health().partitions[HOME]))
    log.loses_markers = None
    await replica.runtime.wait_leading(soon(), [HOME])


async def test_a_batch_whose_marker_was_lost_is_there_once_after_the_next_claim(memory_world: World) -> None:
    replica = await memory_world.start(read_back_s=0.2, claim_read_back_s=0.1)
    await replica.lead()
    asked = {"request_id": "once", "principal": "p"}
    lost = lose_one_marker(memory_world)
    with pytest.raises(UnavailableError, match="OUTCOME_UNKNOWN"):
        await replica.put("a", "1", **asked)
    assert lost()
    again = await retried(replica, Put("a", "1"), **asked)
    assert again.replayed
    assert [kind for kind, *_ in await memory_world.events()] == ["LeaderClaimed", "StringValue", "LeaderClaimed"]
    await replica.put("a", "2")
    assert len(await memory_world.records(topic=public_topic(memory_world.env, "registry"))) == 2


async def test_who_does_not_lead_says_who_does(world: World) -> None:
    leader = await world.start()
    await leader.lead()
    await leader.put("a", "1")
    follower = await world.start()
    follower.log.election.assign()
    await eventually(lambda: follower.runtime.health().partitions[HOME].applied >= 0)
    with pytest.raises(UnavailableError) as caught:
        await follower.put("a", "2")
    assert caught.value.reason == "NOT_LEADER"
    assert caught.value.metadata["leader"] == "replica-1"
    await eventually(lambda: follower.values().get("a") == "1")


async def test_keeps_leading_through_a_repeated_assignment(world: World) -> None:
    replica = await world.start()
    await replica.lead(0, 1, 2, 3)
    replica.log.election.assign(HOME)
    await eventually(lambda: [row.role for row in replica.runtime.health().partitions].count("leading") == 1)
    await replica.put("a", "1")
    assert len(claims(await world.events())) == 1


async def test_a_graceful_stop_answers_what_was_under_way_and_hands_over(world: World) -> None:
    first = await world.start(real_election=True)
    await first.runtime.wait_leading(soon())
    second = await world.start(real_election=True)
    putting = [asyncio.create_task(retried_anywhere([first, second], f"k{number}")) for number in range(30)]
    await asyncio.sleep(0)
    await first.runtime.stop()
    await second.runtime.wait_leading(soon())
    results = await asyncio.gather(*putting)
    assert len(results) == 30
    await second.runtime.barrier(ORGANIZATION, soon())
    assert {f"k{number}" for number in range(30)} <= set(second.values())
    await check_one_writer_between_claims(world)


async def retried_anywhere(replicas: list, name: str) -> object:  # type: ignore[type-arg]
    limit = soon()
    while True:
        for replica in replicas:
            try:
                return await replica.put(name, "v", request_id=name, principal="p")
            except UnavailableError:
                assert not limit.expired
        await asyncio.sleep(0.02)


async def test_two_environments_side_by_side(world: World) -> None:
    one = await world.start()
    await one.lead()
    log = world.log()
    other = await log.open_appender(f"{world.env}-other.registry.{HOME}")
    await one.put("a", "1")
    assert len(claims(await world.events())) == 1
    await other.close()


async def test_group_commit(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    before = replica.log.steps.count("committed")
    await asyncio.gather(*(replica.put(f"k{number}", "v") for number in range(400)))
    assert replica.log.steps.count("committed") - before <= 40
    assert len(replica.values()) == 400


async def test_refusals_and_bugs_touch_only_their_own_command(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    outcomes = await asyncio.gather(
        replica.put("a", "1"),
        replica.submit(Refuse()),
        replica.submit(Stumble()),
        replica.put("b", "2"),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], FailedPreconditionError)
    assert isinstance(outcomes[2], GroundswellError)
    assert outcomes[2].status == "INTERNAL"
    assert dict(replica.values()) == {"a": "1", "b": "2"}
    before = replica.log.steps.count("stage")
    with pytest.raises(FailedPreconditionError):
        await replica.submit(Refuse())
    assert (await replica.submit(Ask("a"))).result.value == "1"  # type: ignore[union-attr]
    assert replica.log.steps.count("stage") == before


async def test_nothing_uncommitted_is_answered(world: World) -> None:
    """A read that rests on a write of its own batch shares that write's fate."""
    replica = await world.start()
    await replica.lead()
    replica.log.hooks.append(FailOnce("stage", FencedError("injected")))
    outcomes = await asyncio.gather(replica.put("a", "1"), replica.submit(Ask("a")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [UnavailableError, UnavailableError]
    assert (await retried(replica, Ask("a"))).result.value == ""  # type: ignore[union-attr]


async def test_versions_continue_across_leaders(world: World) -> None:
    first, second = await world.start(), await world.start()
    await first.lead()
    await first.put("a", "1")
    await hand_over(first, second)
    assert (await second.put("a", "2")).result.value == 2  # type: ignore[union-attr]
    await hand_over(second, first)
    assert (await first.put("a", "3")).result.value == 3  # type: ignore[union-attr]
    versions = [version for kind, _, resource, version in await world.events() if resource == "a"]
    assert versions == [1, 2, 3]


async def test_a_record_that_cannot_be_applied_halts_only_its_partition(world: World) -> None:
    good = await world.start()
    await good.lead()
    await good.put("a", "1")
    with pytest.raises(GroundswellError) as caught:
        await good.put("a", "poison")
    assert caught.value.status == "INTERNAL"
    await good.put("a", "2")  # evolve was tried before anything was written


async def test_a_strong_read_is_a_committed_record(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    token = await replica.runtime.barrier(ORGANIZATION, soon())
    assert (await world.events())[-1][0] == "LogBeat"
    assert replica.runtime.snapshot(ORGANIZATION).token.position == token.position


async def test_a_command_of_an_unassigned_partition_is_refused(world: World) -> None:
    replica = await world.start()
    await replica.lead((HOME + 1) % 4)
    with pytest.raises(UnavailableError):
        await replica.runtime.submit(Command(ORGANIZATION, Put("a", "1")), soon())
