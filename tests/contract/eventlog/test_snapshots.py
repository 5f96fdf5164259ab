"""Snapshots are a cache of a fold: with one, without one, with a damaged one, the state is that of the log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, StringValue

from libs.eventlog import Task, TaskContext
from libs.eventlog.memory import MemorySnapshotStore
from tests.contract.eventlog.support import (
    HOME,
    Ask,
    CloseTask,
    KeyValue,
    OpenTask,
    Put,
    Replica,
    SetTimer,
    Taker,
    World,
    eventually,
    soon,
)

REQUEST = {"request_id": "11111111-1111-4111-8111-111111111111", "request_digest": b"d" * 32, "principal": "ci"}


def image(replica: Replica) -> list[Any]:
    return replica.runtime._replicas[HOME].state.image()


def loaded_at(replica: Replica) -> int | None:
    snapshots = replica.runtime._snapshots
    assert snapshots is not None
    return snapshots.loaded.get(HOME)


async def caught_up(replica: Replica, with_: Replica) -> None:
    await eventually(
        lambda: replica.runtime._replicas[HOME].state.applied == with_.runtime._replicas[HOME].state.applied
    )


async def never(task: Task, ctx: TaskContext) -> None:
    raise ConnectionError("not yet")


async def busy(world: World, store: MemorySnapshotStore, **config: Any) -> Replica:
    """A leader with something of everything in its state."""
    replica = await world.start(handlers={"work": never}, snapshots=store, **config)
    await replica.lead()
    await replica.put("first", "1", **REQUEST)
    await asyncio.gather(*(replica.put(f"n{number % 90}", str(number)) for number in range(150)))
    await replica.submit(OpenTask("open"))
    await replica.submit(SetTimer("later", 3_600_000))
    return replica


async def test_a_start_from_a_snapshot_is_a_start_from_the_log(world: World) -> None:
    store = MemorySnapshotStore()
    leader = await busy(world, store)
    position = await leader.runtime.write_snapshot(HOME)
    await leader.put("n1", "after")
    await leader.submit(OpenTask("second"))
    with_it = await world.start(snapshots=store)
    without = await world.start()
    for other in (with_it, without):
        await caught_up(other, leader)
    assert loaded_at(with_it) == position
    assert image(with_it) == image(without) == image(leader)
    assert with_it.runtime.snapshot_of_partition(HOME).versions["n1"] == 3


async def test_the_next_leader_goes_on_as_if_it_had_read_everything(world: World) -> None:
    store = MemorySnapshotStore()
    leader = await busy(world, store)
    first = await leader.put("second", "2", request_id="2" * 36, request_digest=b"e" * 32)
    await leader.runtime.write_snapshot(HOME)
    done: list[str] = []

    async def work(task: Task, ctx: TaskContext) -> Any:
        done.append(task.task_id)
        return None

    heir = await world.start(handlers={"work": work}, snapshots=store)
    leader.retire()
    await heir.lead()
    again = await heir.put("second", "2", request_id="2" * 36, request_digest=b"e" * 32)
    assert again.replayed
    assert again.result == first.result
    assert (await heir.put("first", "1", **REQUEST)).replayed
    await eventually(lambda: done == ["open"])
    assert "later" in heir.runtime._replicas[HOME].state.timers
    await heir.submit(CloseTask("open"))
    versions = [version for _, _, resource, version in await world.events() if resource == "second"]
    assert versions == [1], "the repeated request wrote nothing"


async def test_the_inbox_goes_on_where_it_was_and_what_is_parked_stays_parked(world: World) -> None:
    store = MemorySnapshotStore()
    source = await world.start()
    await source.lead()
    taker = await world.start(Taker(), snapshots=store)
    await taker.lead()
    await source.put("understood", "1")
    odd = await source.submit(Put("odd", "x", public=BytesValue(value=b"?")))
    await taker.runtime.wait_for([odd.token], soon())
    await taker.runtime.write_snapshot(HOME)
    heir = await world.start(Taker(), snapshots=store)
    assert loaded_at(heir) is not None
    taker.retire()
    await heir.lead()
    last = await source.put("understood", "2")
    await heir.runtime.wait_for([last.token], soon())
    result = (await heir.submit(Ask("odd"))).result
    assert isinstance(result, StringValue)
    assert result.value == "parked"
    taken = [resource for kind, _, resource, _ in await world.events("pki") if kind == "StringValue"]
    assert taken == ["understood", "understood"], "each once"


def newest(store: MemorySnapshotStore) -> str:
    return max(name for name in store.objects if f"/{HOME}/" in name)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "garbage"])
async def test_a_damaged_snapshot_gives_way_to_the_one_before(memory_world: World, damage: str) -> None:
    world, store = memory_world, MemorySnapshotStore()
    leader = await busy(world, store)
    older = await leader.runtime.write_snapshot(HOME)
    await leader.put("n1", "after")
    assert await leader.runtime.write_snapshot(HOME) > older
    whole = store.objects[newest(store)]
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    broken = {"flip": flipped, "cut": whole[:-1], "empty": b"", "garbage": b"x" * 100}[damage]
    store.objects[newest(store)] = broken
    second = await world.start(snapshots=store)
    await caught_up(second, leader)
    assert loaded_at(second) == older
    assert image(second) == image(leader)
    for name in store.objects:
        store.objects[name] = broken
    third = await world.start(snapshots=store)
    await caught_up(third, leader)
    assert loaded_at(third) is None
    assert image(third) == image(leader)


class Numbered(KeyValue):
    snapshot_schema = 2


async def test_another_schema_is_ignored_and_left_alone(memory_world: World) -> None:
    world, store = memory_world, MemorySnapshotStore()
    leader = await busy(world, store)
    await leader.runtime.write_snapshot(HOME)
    before = dict(store.objects)
    later_build = await world.start(Numbered(), snapshots=store)
    await caught_up(later_build, leader)
    assert loaded_at(later_build) is None
    assert image(later_build) == image(leader)
    await later_build.runtime.write_snapshot(HOME)
    assert before.items() <= store.objects.items(), "a build that is rolled back finds its own"


async def test_a_snapshot_of_another_log_is_refused(memory_world: World, caplog: pytest.LogCaptureFixture) -> None:
    world, store = memory_world, MemorySnapshotStore()
    leader = await busy(world, store)
    await leader.runtime.write_snapshot(HOME)
    # The topics are made anew under the same name; what the store holds is of the old ones.
    moved = {name.replace(world.env, "anew"): data for name, data in store.objects.items()}
    store.objects.update(moved)
    shorter = await world.start(env="anew", snapshots=store)
    assert loaded_at(shorter) is None
    assert "LOG_RESET: it was taken at" in caplog.text
    await shorter.lead()
    await asyncio.gather(*(shorter.put(f"other{number}", "x") for number in range(400)))
    longer = await world.start(env="anew", snapshots=store)
    await caught_up(longer, shorter)
    assert loaded_at(longer) is None
    assert "LOG_RESET: the log holds another event" in caplog.text
    assert image(longer) == image(shorter)


async def test_leaders_store_snapshots_by_themselves_and_keep_two(memory_world: World) -> None:
    world, store = memory_world, MemorySnapshotStore()
    leader = await busy(world, store, snapshot_every_events=120)
    mine = lambda: sorted(name for name in store.objects if f"/{HOME}/" in name)  # noqa: E731
    await eventually(lambda: len(mine()) == 1)
    seen = {mine()[0]}
    while len(seen) < 3:
        await asyncio.gather(*(leader.put(f"m{number}", str(number)) for number in range(60)))
        seen.update(mine())
    assert len(mine()) <= 2
    follower = await world.start(snapshots=store)
    await caught_up(follower, leader)
    assert loaded_at(follower) is not None
    assert image(follower) == image(leader)


class Broken(MemorySnapshotStore):
    """A store that is down."""

    async def names(self, prefix: str) -> Sequence[str]:
        raise ConnectionError("down")

    async def write(self, name: str, data: bytes) -> None:
        raise ConnectionError("down")


async def test_a_store_that_is_down_stops_nothing(memory_world: World) -> None:
    leader = await busy(memory_world, Broken(), snapshot_every_events=1)
    second = await memory_world.start(snapshots=Broken())
    await caught_up(second, leader)
    await leader.put("still", "there")
    assert leader.runtime.health().live
    assert second.runtime.health().ready


class Unstorable(KeyValue):
    """Its state holds what the codec does not know; a bug of its author."""

    def evolve(self, state: Any, event: Any) -> Any:
        return state.set(event.resource, {event.resource})


async def test_a_state_that_cannot_be_stored_stops_nothing(
    memory_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    leader = await memory_world.start(Unstorable(), snapshots=MemorySnapshotStore(), snapshot_every_events=1)
    await leader.lead()
    await leader.put("a", "1")
    await eventually(lambda: "is not registered" in caplog.text)
    await leader.put("b", "2")
    assert leader.runtime.health().live
