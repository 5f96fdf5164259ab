"""Following public records without leading."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, StringValue

from libs.errors import FailedPreconditionError, UnavailableError
from libs.eventlog import Foreign, Token
from libs.eventlog.follower import ParkedRecord, PublicFollower
from tests.contract.eventlog.support import HOME, Put, World, eventually, soon


async def test_follows_all_partitions_in_order(world: World) -> None:
    source = await world.start()
    await source.lead()
    seen: list[tuple[str, int]] = []
    parked: list[ParkedRecord] = []

    def take(record: Foreign) -> None:
        assert isinstance(record.payload, StringValue)
        seen.append((record.payload.value, record.public_seq))

    await source.put("a", "1")
    follower = PublicFollower(
        world.log(),
        "registry",
        4,
        take,
        env=world.env,
        types=(StringValue,),
        on_parked=parked.append,
        lag_every_s=0.1,
    )
    await follower.start()
    await follower.caught_up(soon())
    assert seen == [("1", 1)]
    await source.submit(Put("b", "2", public=BytesValue(value=b"?")))
    done = await source.put("c", "3")
    await follower.wait_for(done.token, soon())
    assert seen == [("1", 1), ("3", 3)]
    assert [(item.resource, item.event_type) for item in parked] == [("b", "google.protobuf.BytesValue")]
    assert follower.parked_count == 1
    assert follower.public_seq(HOME) == 3
    await eventually(lambda: follower.lag_s() < 0.5)
    token = done.token
    with pytest.raises(FailedPreconditionError, match="LOG_RESET"):
        await follower.wait_for(Token("registry", HOME, "other", 1, token.public_seq), soon())
    with pytest.raises(FailedPreconditionError, match="LOG_RESET"):
        await follower.wait_for(Token("registry", HOME, token.log_id, 1, token.public_seq + 9), soon())
    await follower.stop()


async def test_what_is_ignored_is_followed_and_not_read(world: World) -> None:
    source = await world.start()
    await source.lead()
    seen: list[str] = []
    parked: list[ParkedRecord] = []
    follower = PublicFollower(
        world.log(),
        "registry",
        4,
        lambda record: seen.append(record.resource),
        env=world.env,
        types=(StringValue,),
        ignored=(BytesValue,),
        on_parked=parked.append,
        lag_every_s=0.1,
    )
    await follower.start()
    await follower.caught_up(soon())
    await source.put("a", "1")
    done = await source.submit(Put("b", "2", public=BytesValue(value=b"?")))
    await follower.wait_for(done.token, soon())
    assert follower.public_seq(HOME) == done.token.public_seq == 2
    assert follower.token(HOME).log_id == done.token.log_id
    done = await source.put("c", "3")
    await follower.wait_for(done.token, soon())
    assert (seen, parked) == (["a", "c"], [])
    await follower.stop()


async def test_a_failing_callback_stops_it_and_everybody_learns(world: World) -> None:
    source = await world.start()
    await source.lead()

    def broken(record: Foreign) -> None:
        raise ValueError(record.resource)

    follower = PublicFollower(world.log(), "registry", 4, broken, env=world.env, types=(StringValue,), lag_every_s=0.1)
    await follower.start()
    await follower.caught_up(soon())
    done = await source.put("a", "1")
    with pytest.raises(UnavailableError):
        await follower.wait_for(done.token, soon())
    assert not follower.live
    assert "ValueError" in follower.problem
    lag = follower.lag_s()
    await asyncio.sleep(0.05)
    assert follower.lag_s() > lag
    await follower.stop()
