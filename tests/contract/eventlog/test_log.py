"""The ports themselves: fencing, open transactions, markers, elections."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from libs.eventlog.config import events_topic, public_topic
from libs.eventlog.kafka import KafkaAppender, KafkaTail
from libs.eventlog.memory import MemoryLog
from libs.eventlog.ports import Appender, FencedError, LogError, NewRecord, Record, Tail, TopicPartition
from tests.contract.eventlog.support import World, eventually, soon


def topic_of(world: World) -> str:
    return events_topic(world.env, "registry")


def record(world: World, value: str, partition: int = 0) -> NewRecord:
    return NewRecord(topic_of(world), partition, b"k", value.encode(), [("h", b"1")])


async def append(appender: Appender, *records: NewRecord) -> None:
    await appender.stage(records)
    await appender.commit()


async def read(tail: Tail, count: int) -> list[Record]:
    found: list[Record] = []
    limit = soon()
    while len(found) < count and not limit.expired:
        found.extend(await tail.fetch(0.2))
    return found


def values(records: Sequence[Record]) -> list[str]:
    return [item.value.decode() for item in records]


async def test_an_older_appender_cannot_commit(world: World) -> None:
    log = world.log()
    old = await log.open_appender(f"{world.env}.registry.0")
    await append(old, record(world, "before"))
    new = await log.open_appender(f"{world.env}.registry.0")
    assert new.epoch > old.epoch
    with pytest.raises(FencedError):
        await append(old, record(world, "zombie"))
    await append(new, record(world, "after"))
    tail = await log.open_tail({TopicPartition(topic_of(world), 0): 0})
    assert values(await read(tail, 2)) == ["before", "after"]
    for closing in (old, new, tail):
        await closing.close()


async def test_what_the_predecessor_left_open_is_aborted_and_stepped_over(world: World) -> None:
    log = world.log()
    place = TopicPartition(topic_of(world), 0)
    old = await log.open_appender(f"{world.env}.registry.0")
    await old.stage([record(world, "lost")])
    new = await log.open_appender(f"{world.env}.registry.0")
    with pytest.raises(FencedError):
        await old.commit()
    await append(new, record(world, "kept"))
    tail = await log.open_tail({place: 0})
    assert values(await read(tail, 1)) == ["kept"]
    end = (await log.end_positions([place]))[place]
    limit = soon()
    while tail.position(place) < end:
        assert not limit.expired
        assert await tail.fetch(0.1) == []
    for closing in (old, new, tail):
        await closing.close()


async def test_an_open_transaction_holds_back_everything_behind_it(world: World) -> None:
    log = world.log()
    place = TopicPartition(topic_of(world), 0)
    slow = await log.open_appender(f"{world.env}.registry.0")
    quick = await log.open_appender(f"{world.env}.registry.1")
    await slow.stage([record(world, "first")])
    await append(quick, record(world, "second"))
    assert (await log.end_positions([place]))[place] == 0
    tail = await log.open_tail({place: 0})
    assert await tail.fetch(0.3) == []
    await slow.commit()
    assert values(await read(tail, 2)) == ["first", "second"]
    for closing in (slow, quick, tail):
        await closing.close()


async def test_markers_take_positions(world: World) -> None:
    log = world.log()
    place = TopicPartition(topic_of(world), 0)
    appender = await log.open_appender(f"{world.env}.registry.0")
    for number in range(3):
        await append(appender, record(world, str(number)))
    tail = await log.open_tail({place: 0})
    positions = [item.position for item in await read(tail, 3)]
    assert positions == [0, 2, 4]
    end = (await log.end_positions([place]))[place]
    assert end == 6
    limit = soon()
    while tail.position(place) < end:
        assert not limit.expired
        await tail.fetch(0.1)
    again = await log.open_tail({place: positions[1] + 1})
    assert values(await read(again, 1)) == ["2"]
    for closing in (appender, tail, again):
        await closing.close()


async def test_a_marker_that_was_lost_is_made_up_for_by_the_next_of_the_same_id(memory_world: World) -> None:
    """As Kafka does: a marker ends whatever its producer has open in a place. No broker loses one when it is told."""
    log = memory_world.log()
    assert isinstance(log, MemoryLog)
    places = [TopicPartition(topic(memory_world.env, "registry"), 0) for topic in (events_topic, public_topic)]
    lost = [NewRecord(place.topic, 0, b"k", b"lost", []) for place in places]
    appender = await log.open_appender("registry.0")
    log.loses_markers = lambda: True
    await append(appender, *lost)
    log.loses_markers = None
    behind = await log.open_appender("other.0")
    await append(behind, record(memory_world, "behind"))
    assert await log.end_positions(places) == dict.fromkeys(places, 0)
    successor = await log.open_appender("registry.0")
    assert await log.end_positions(places) == dict.fromkeys(places, 0), "fencing alone ends nothing: it is decided"
    await append(successor, record(memory_world, "claim"))
    tail = await log.open_tail(dict.fromkeys(places, 0))
    assert values(await read(tail, 3)) == ["lost", "behind", "claim"]
    assert await tail.fetch(0.1) == [], "nothing has ended it in the other place"
    await append(successor, NewRecord(places[1].topic, 0, b"k", b"next", []))
    assert values(await read(tail, 2)) == ["lost", "next"]


async def test_records_of_two_topics_are_one_transaction(world: World) -> None:
    log = world.log()
    public = public_topic(world.env, "registry")
    appender = await log.open_appender(f"{world.env}.registry.0")
    both = [record(world, "private"), NewRecord(public, 0, b"k", b"public", [])]
    await appender.stage(both)
    successor = await log.open_appender(f"{world.env}.registry.0")
    await append(successor, *both)
    tail = await log.open_tail({TopicPartition(topic_of(world), 0): 0, TopicPartition(public, 0): 0})
    assert sorted(values(await read(tail, 2))) == ["private", "public"]
    for closing in (appender, successor, tail):
        await closing.close()


async def test_an_appender_whose_stop_hangs_is_closed_whole(
    kafka_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a broker that is away. What sends would go on for ever, on connections of its own."""
    monkeypatch.setattr("libs.eventlog.kafka._CLOSE_WITHIN_S", 0.1)
    appender = await kafka_world.log().open_appender(f"{kafka_world.env}.registry.0")
    assert isinstance(appender, KafkaAppender)
    await append(appender, record(kafka_world, "a"))
    producer = appender._producer
    stop = producer.stop
    monkeypatch.setattr(producer, "stop", asyncio.Event().wait)
    await appender.close()
    await eventually(
        lambda: (
            producer._sender.sender_task.done()
            and producer.client._sync_task is None
            and not any(connection.connected() for connection in producer.client._conns.values())
        )
    )
    await stop()


async def test_a_tail_is_closed_whole_while_a_fetch_of_it_waits_to_be_tried_again(kafka_world: World) -> None:
    """As after a lost broker. aiokafka lets the cancellation of that fetch out of its own stop, halfway."""
    tail = await kafka_world.log().open_tail({TopicPartition(topic_of(kafka_world), 0): 0})
    assert isinstance(tail, KafkaTail)
    await tail.fetch(0.1)
    consumer = tail._consumer
    trying_again = asyncio.create_task(asyncio.sleep(60))
    consumer._fetcher._pending_tasks.add(trying_again)
    await asyncio.sleep(0)
    await asyncio.create_task(tail.close())
    assert trying_again.cancelled()
    assert not any(connection.connected() for connection in consumer._client._conns.values())
    assert consumer._client._sync_task is None


async def test_closing_is_cancelled_by_whoever_asks_for_it(kafka_world: World) -> None:
    tail = await kafka_world.log().open_tail({TopicPartition(topic_of(kafka_world), 0): 0})
    closing = asyncio.create_task(tail.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await tail.close()


async def test_headers_keys_and_times_survive(world: World) -> None:
    log = world.log()
    appender = await log.open_appender(f"{world.env}.registry.0")
    await append(appender, NewRecord(topic_of(world), 0, b"key", b"value", [("a", b"\x00\xff"), ("b", b"")]))
    tail = await log.open_tail({TopicPartition(topic_of(world), 0): 0})
    (found,) = await read(tail, 1)
    assert (found.key, found.value, found.headers) == (b"key", b"value", (("a", b"\x00\xff"), ("b", b"")))
    assert found.timestamp_ms > 1_600_000_000_000
    for closing in (appender, tail):
        await closing.close()


async def test_large_batches_arrive_whole_and_in_order(world: World) -> None:
    log = world.log()
    appender = await log.open_appender(f"{world.env}.registry.0")
    big = "x" * 4000
    await append(appender, *(record(world, f"{number}{big}") for number in range(500)))
    tail = await log.open_tail({TopicPartition(topic_of(world), 0): 0})
    found = await read(tail, 500)
    assert [int(item.value.decode().rstrip("x")) for item in found] == list(range(500))
    for closing in (appender, tail):
        await closing.close()


async def test_two_environments_do_not_fence_each_other(world: World) -> None:
    log = world.log()
    mine = await log.open_appender(f"{world.env}.registry.0")
    theirs = await log.open_appender(f"{world.env}x.registry.0")
    await append(mine, record(world, "mine"))
    await append(theirs, record(world, "theirs"))
    for closing in (mine, theirs):
        await closing.close()


async def test_partition_counts(world: World) -> None:
    assert await world.log().partition_count(topic_of(world)) == 4


async def test_members_share_partitions_and_a_leaver_hands_over_at_once(world: World) -> None:
    log = world.log()
    group = f"{world.env}.registry.leaders"
    first = await log.open_election(group, topic_of(world))
    async with asyncio.timeout(20):
        assert await first.changed() == {0, 1, 2, 3}
        second = await log.open_election(group, topic_of(world))
        theirs = await second.changed()
        mine = await first.changed()
        assert mine | theirs == {0, 1, 2, 3}
        assert not mine & theirs
        await first.close()
        assert await second.changed() == {0, 1, 2, 3}
    await second.close()


def test_errors_of_the_log_have_one_root() -> None:
    assert issubclass(FencedError, LogError)
