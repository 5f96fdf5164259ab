"""Foreign facts: each once, none dropped, and tokens that wait for them."""

from __future__ import annotations

import math

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, StringValue

from libs.errors import FailedPreconditionError
from libs.eventlog import Token
from libs.eventlog.config import public_topic
from libs.eventlog.ports import LogError, NewRecord
from tests.contract.eventlog.scenarios import hand_over, inbox_takes_each_record_once
from tests.contract.eventlog.support import (
    HOME,
    ORGANIZATION,
    Ask,
    FailOnce,
    KeyValue,
    Put,
    Replica,
    Taker,
    WiserTaker,
    World,
    eventually,
    soon,
)

NEWER = BytesValue(value=b"from a later build")


async def pair(world: World, taker: KeyValue | None = None) -> tuple[Replica, Replica]:
    source, sink = await world.start(), await world.start(taker or Taker())
    await source.lead()
    await sink.lead()
    return source, sink


async def asked(sink: Replica, name: str) -> str:
    result = (await sink.submit(Ask(name))).result
    assert isinstance(result, StringValue)
    return result.value


async def test_each_record_once_across_leaders(world: World) -> None:
    await inbox_takes_each_record_once(world)


async def test_the_watermark_is_written_once_per_batch(world: World) -> None:
    source = await world.start()
    await source.lead()
    for number in range(50):
        await source.put(f"r{number}", "x")
    sink = await world.start(Taker())
    await sink.lead()
    await eventually(lambda: len(sink.values()) == 50)
    assert [kind for kind, *_ in await world.events("pki")].count("InboxAdvanced") <= 5


async def test_a_busy_inbox_rests_unless_somebody_waits(world: World) -> None:
    source = await world.start()
    await source.lead()
    for number in range(20):
        await source.put(f"r{number}", "x")
    sink = await world.start(Taker(), inbox_pace_s=600.0)
    await sink.lead()
    await eventually(lambda: len(sink.values()) == 20)
    for number in range(20):
        done = await source.put(f"s{number}", "x")
    assert len(sink.values()) == 20, "after ten minutes, or when it is asked for"
    await sink.runtime.wait_for([done.token], soon())
    assert len(sink.values()) == 40


async def test_single_records_are_taken_in_at_once(world: World) -> None:
    source, sink = await world.start(), await world.start(Taker(), inbox_pace_s=600.0)
    await source.lead()
    await sink.lead()
    for number in range(5):
        await source.put(f"r{number}", "x")
        await eventually(lambda number=number: len(sink.values()) == number + 1)  # type: ignore[misc]


async def test_troubles_that_were_overcome_do_not_make_the_next_one_longer(world: World) -> None:
    """Had each doubled the pause of the next, the last of these would last for minutes."""
    source, sink = await world.start(), await world.start(Taker(), retry_first_s=0.05, retry_most_s=600.0)
    await source.lead()
    await sink.lead()
    trouble = FailOnce("fetched registry", LogError("the log was away"), armed=False)
    sink.log.hooks.append(trouble)
    for number in range(14):
        trouble.armed = True
        await source.put(f"r{number}", "x")
        await eventually(lambda number=number: len(sink.values()) == number + 1)  # type: ignore[misc]
        assert not trouble.armed


async def test_a_token_waits_for_the_inbox(world: World) -> None:
    source, sink = await pair(world)
    done = await source.put("a", "1")
    await sink.runtime.wait_for([done.token], soon())
    assert sink.values()["a"] == "1"


async def test_a_token_without_a_public_record_does_not_wait(world: World) -> None:
    source, sink = await pair(world)
    done = await source.submit(Put("a", "1", silent=True))
    assert done.token.public_seq == 0
    await sink.runtime.wait_for([done.token], soon())


async def test_tokens_of_another_log_are_refused(world: World) -> None:
    source, sink = await pair(world)
    done = await source.put("a", "1")
    await sink.runtime.wait_for([done.token], soon())
    good = done.token
    for bad in (
        Token("registry", HOME, "another-log", good.position, good.public_seq),
        Token("registry", HOME, good.log_id, good.position + 1000, good.public_seq),
        Token("registry", 77, good.log_id, good.position, good.public_seq),
    ):
        with pytest.raises(FailedPreconditionError, match="LOG_RESET"):
            await source.runtime.wait_for([bad], soon())
    for bad in (
        Token("registry", HOME, "another-log", good.position, good.public_seq),
        Token("registry", HOME, good.log_id, good.position, good.public_seq + 1000),
    ):
        with pytest.raises(FailedPreconditionError, match="LOG_RESET"):
            await sink.runtime.wait_for([bad], soon())
    # A service that is no source of this one cannot be waited for.
    await sink.runtime.wait_for([Token("rollout", HOME, "x", 5, 5)], soon())


async def test_what_is_not_understood_is_parked_and_replaced(world: World) -> None:
    source, sink = await pair(world)
    done = await source.submit(Put("a", "1", public=NEWER))
    await sink.runtime.wait_for([done.token], soon())  # parked counts as reached
    assert await asked(sink, "a") == "parked"
    assert sink.runtime.snapshot(ORGANIZATION).parked == {"a"}
    assert "a" not in sink.values()
    done = await source.put("a", "2")
    await sink.runtime.wait_for([done.token], soon())
    assert await asked(sink, "a") == "clear"
    assert sink.values()["a"] == "2"


async def test_a_later_build_takes_in_what_was_parked(world: World) -> None:
    source, sink = await pair(world)
    done = await source.submit(Put("a", "1", public=NEWER))
    await sink.runtime.wait_for([done.token], soon())
    wiser = await world.start(WiserTaker())
    await hand_over(sink, wiser)
    await eventually(lambda: wiser.values().get("a") == "from a later build")
    assert await asked(wiser, "a") == "clear"
    kinds = [kind for kind, *_ in await world.events("pki")]
    assert kinds.count("InboxParked") == 1
    assert kinds.count("InboxUnparked") == 1


async def test_a_record_that_decide_refuses_is_parked(world: World) -> None:
    source, sink = await pair(world)
    await source.put("a", "refuse me")
    done = await source.put("b", "fine")
    await sink.runtime.wait_for([done.token], soon())
    assert await asked(sink, "a") == "parked"
    assert sink.values()["b"] == "fine"


async def test_bytes_that_are_no_record_are_parked(world: World) -> None:
    source, sink = await pair(world)
    await source.put("a", "1")
    stranger = await world.log().open_appender(f"{world.env}.stranger.0")
    await stranger.stage([NewRecord(public_topic(world.env, "registry"), HOME, b"", b"\xff", [])])
    await stranger.commit()
    await stranger.close()
    done = await source.put("b", "2")
    await sink.runtime.wait_for([done.token], soon())
    assert len(sink.runtime.snapshot(ORGANIZATION).parked) == 1
    assert sink.values()["b"] == "2"


async def test_lag_is_known_only_to_the_leader_and_is_small_at_rest(world: World) -> None:
    source, sink = await pair(world)
    await source.put("a", "1")
    await eventually(lambda: sink.runtime.inbox_lag(HOME) < 1.5)
    assert sink.runtime.inbox_lag((HOME + 1) % 4) == math.inf
    assert source.runtime.inbox_lag(HOME) == 0.0


async def test_own_tokens_wait_for_the_view(world: World) -> None:
    source = await world.start()
    await source.lead()
    other = await world.start()
    done = await source.put("a", "1")
    await other.runtime.wait_for([done.token], soon())
    assert other.values()["a"] == "1"
