"""With a safeguard taken out, the real broker must show the violation that the safeguard prevents."""

from __future__ import annotations

import pytest

from tests.contract.eventlog.mutants import Forgetful, Hasty, Unfenced
from tests.contract.eventlog.scenarios import (
    ViolationError,
    answers_wait_for_the_tail,
    inbox_takes_each_record_once,
    zombie_wakes_up,
)
from tests.contract.eventlog.support import World


async def test_without_the_fence_a_zombie_writes_into_the_next_leadership(kafka_world: World) -> None:
    kafka_world.runtime_type = Unfenced
    with pytest.raises(ViolationError, match="had claimed"):
        await zombie_wakes_up(kafka_world, held_at="stage")


async def test_without_the_read_back_answers_outrun_the_view(kafka_world: World) -> None:
    kafka_world.runtime_type = Hasty
    with pytest.raises(ViolationError, match="before the view held it"):
        await answers_wait_for_the_tail(kafka_world)


async def test_without_the_watermark_foreign_records_are_taken_in_twice(kafka_world: World) -> None:
    kafka_world.runtime_type = Forgetful
    with pytest.raises(ViolationError, match="taken in"):
        await inbox_takes_each_record_once(kafka_world)
