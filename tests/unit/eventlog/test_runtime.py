"""The runtime where only its own logic matters: clocks, supervision, lag, deadlines."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from libs.errors import GroundswellError, UnavailableError
from libs.eventlog import Command, Deadline, Runtime, RuntimeConfig, failpoints, partition_of
from libs.eventlog.chores import Failures, back_off
from libs.eventlog.inbox import LagMeter
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import LogError, NewRecord, TopicPartition
from libs.eventlog.runtime import ConfigurationError
from tests.contract.eventlog.support import HOME, ORGANIZATION, KeyValue, Put, State, World, eventually, soon
from tests.simulation.eventlog.virtual import VirtualLoop, run


@pytest.fixture
async def world(env_prefix: str) -> AsyncIterator[World]:
    log = MemoryLog()
    found = World(env_prefix, lambda: log)
    yield found
    await found.close()


def test_organizations_have_one_place() -> None:
    assert [partition_of(name, 4) for name in ("acme", "globex", "wonka", "")] == [2, 2, 3, 0]


async def test_a_leader_with_a_wrong_clock_does_not_serve(world: World) -> None:
    replica = await world.start(wall_clock_ms=lambda: 1_000_000_000_000)
    replica.log.election.assign(HOME)
    await eventually(lambda: any("clock" in problem for problem in replica.runtime.health().problems))
    with pytest.raises(UnavailableError):
        await replica.put("a", "1")


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_the_death_of_a_background_task_fails_liveness(world: World, error: type[BaseException]) -> None:
    """Also by a cancellation that nobody here asked for: a client library's, let out by mistake."""
    replica = await world.start()

    async def broken() -> frozenset[int]:
        raise error

    assert replica.runtime.health().live
    replica.log.election.changed = broken  # type: ignore[method-assign]
    replica.log.election.assign(HOME)
    await eventually(lambda: not replica.runtime.health().live)
    assert any("election died" in problem for problem in replica.runtime.health().problems)


async def test_a_log_that_fails_for_a_while_is_no_death(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    failed = 0

    async def fail(step: str) -> None:
        nonlocal failed
        if step.startswith("fetched") and failed < 3:
            failed += 1
            raise LogError("connection lost")

    replica.log.hooks.append(fail)
    await replica.put("a", "1")
    assert failed == 3
    assert replica.runtime.health().live


async def test_start_refuses_another_partition_count() -> None:
    runtime = Runtime(KeyValue(), MemoryLog(partitions=8), RuntimeConfig(env="e", partitions=4))
    with pytest.raises(ConfigurationError, match="8 partitions"):
        await runtime.start()


async def test_before_the_election_nothing_is_ready(world: World) -> None:
    replica = await world.start()
    with pytest.raises(UnavailableError, match="NOT_READY"):
        await replica.put("a", "1")
    health = replica.runtime.health()
    assert health.ready
    assert health.live


async def test_who_answers_commands_also_answers_reads(world: World) -> None:
    """The tail may stand before a marker that was the end when it started: the leader's own claim came after it."""
    log = MemoryLog()
    measured = log.end_positions

    async def further(places: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return {place: end + 1000 for place, end in (await measured(places)).items()}

    log.end_positions = further  # type: ignore[method-assign]

    async def nothing(_step: str) -> None:
        """With a hook, a start does not wait until everything is read."""

    found = World(f"{world.env}x", lambda: log)
    replica = await found.start(hooks=[nothing])
    with pytest.raises(UnavailableError, match="NOT_READY"):
        replica.runtime.snapshot(ORGANIZATION)
    await replica.lead()
    await replica.put("a", "1")
    assert replica.values()["a"] == "1"
    await found.close()


async def test_an_expired_deadline_starts_nothing(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
        await replica.runtime.submit(Command(ORGANIZATION, Put("a", "1")), Deadline.after(-1))
    assert not replica.values()


async def test_a_full_queue_says_so(world: World) -> None:
    replica = await world.start(max_queue=5)
    await replica.lead()
    outcomes = await asyncio.gather(*(replica.put("a", str(n)) for n in range(20)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, GroundswellError)]
    assert {error.reason for error in refused} == {"OVERLOADED"}
    assert 0 < len(refused) <= 15


async def test_only_leaders_do_what_leaders_do(world: World) -> None:
    replica = await world.start()
    with pytest.raises(UnavailableError):
        await replica.runtime.barrier(ORGANIZATION, soon())


def test_an_idle_leader_shows_life() -> None:
    async def idle(loop: VirtualLoop) -> list[str]:
        log = MemoryLog(clock_ms=lambda: int(loop.time() * 1000))
        world = World("e", lambda: log)
        replica = await world.start(wall_clock_ms=lambda: int(loop.time() * 1000), beat_every_s=60.0)
        await replica.lead()
        await asyncio.sleep(200)
        await world.close()
        return [kind for kind, *_ in await world.events()]

    assert run(idle) == ["LeaderClaimed", "LogBeat", "LogBeat", "LogBeat"]


async def test_request_ids_expire_with_event_time() -> None:
    now_ms = 1_000_000_000
    log = MemoryLog(clock_ms=lambda: now_ms)
    world = World("e", lambda: log)
    replica = await world.start(wall_clock_ms=lambda: now_ms)
    await replica.lead()
    found = []
    for hours in (0, 23, 2, 46, 2):
        now_ms += hours * 3_600_000
        try:
            done = await replica.put("a", "1", request_id="r", principal="p")
            found.append("again" if done.replayed else "done")
        except GroundswellError as error:
            found.append(error.reason)
    await world.close()
    assert found == ["done", "again", "REQUEST_ID_EXPIRED", "REQUEST_ID_EXPIRED", "done"]


def test_what_was_left_open_times_out() -> None:
    async def story(loop: VirtualLoop) -> None:
        del loop
        log = MemoryLog()
        place = TopicPartition("t", 0)
        lost = await log.open_appender("lost")
        await lost.stage([NewRecord("t", 0, b"", b"never", [])])
        other = await log.open_appender("other")
        await other.stage([NewRecord("t", 0, b"", b"kept", [])])
        await other.commit()
        tail = await log.open_tail({place: 0})
        assert await tail.fetch(5) == []
        assert [record.value for record in await tail.fetch(10)] == [b"kept"]
        with pytest.raises(LogError):
            await lost.commit()

    run(story)


async def test_lag_pursues_one_end_at_a_time() -> None:
    place = TopicPartition("t", 0)
    meter = LagMeter([place])
    assert meter.lag() == float("inf")
    now = asyncio.get_running_loop().time()
    meter.measured(now - 5, {place: 10})
    meter.measured(now, {place: 20})  # the first end is still pursued
    meter.reached(place, 9)
    assert meter.lag() == float("inf")
    meter.reached(place, 10)
    assert 5 <= meter.lag(place) < 6
    assert LagMeter([]).lag() == 0.0


def test_back_off_grows_and_stays_bounded() -> None:
    assert 0.05 <= back_off(0.1, 30, 0) <= 0.1
    assert 15 <= back_off(0.1, 30, 50) <= 30


async def test_a_success_ends_the_row_of_failures() -> None:
    failures = Failures(0.0, 0.0)
    for count in (1, 2, 3):
        await failures.pause()
        assert failures.count == count
    failures.end()
    await failures.pause()
    assert failures.count == 1


def test_fail_points_count_down_and_disarm() -> None:
    hits: list[str] = []
    failpoints.arm("before-send:2, during-commit", lambda: hits.append("x"))
    try:
        failpoints.hit("before-send")
        failpoints.hit("other")
        assert hits == []
        failpoints.hit("before-send")
        failpoints.hit("before-send")
        assert hits == ["x"]
    finally:
        failpoints.arm("")
    failpoints.hit("during-commit")
    assert hits == ["x"]


def test_a_file_arms_a_running_process_once_and_only_its_service(tmp_path: Path) -> None:
    hits: list[str] = []
    failpoints.arm("", lambda: hits.append("x"))
    failpoints.watch_directory(str(tmp_path))
    try:
        failpoints.hit("before-send", "registry")
        armed = tmp_path / "registry.before-send"
        armed.touch()
        failpoints.hit("before-send", "rollout")
        failpoints.hit("after-send", "registry")
        assert (hits, armed.exists()) == ([], True)
        failpoints.hit("before-send", "registry")
        failpoints.hit("before-send", "registry")
        assert (hits, armed.exists()) == (["x"], False)
        failpoints.watch_directory("")
        armed.touch()
        failpoints.hit("before-send", "registry")
        assert hits == ["x"]
    finally:
        failpoints.watch_directory("")
        failpoints.arm("")


async def test_the_request_point_passes_beats_by(world: World) -> None:
    hits: list[str] = []
    replica = await world.start()
    await replica.lead()
    failpoints.arm(failpoints.AFTER_COMMIT_BEFORE_ANSWER_REQUEST, lambda: hits.append("x"))
    try:
        await replica.put("a", "1")
        assert hits == []
        await replica.put("a", "2", request_id=str(uuid.uuid4()))
        assert hits == ["x"]
    finally:
        failpoints.arm("")


async def test_deadlines() -> None:
    deadline = Deadline.after(10)
    assert 9 < deadline.remaining() <= 10
    assert deadline.earlier(1).remaining() <= 1
    assert deadline.earlier(99) == deadline
    assert Deadline.after(-1).expired
    assert Deadline.after(-1).remaining() == 0.0


async def test_snapshots_do_not_move(world: World) -> None:
    replica = await world.start()
    await replica.lead()
    await replica.put("a", "1")
    before = replica.runtime.snapshot(ORGANIZATION)
    await replica.put("a", "2")
    state: State = before.state  # type: ignore[assignment]
    assert (state["a"], before.versions["a"]) == ("1", 1)
    assert replica.runtime.snapshot(ORGANIZATION).versions["a"] == 2
