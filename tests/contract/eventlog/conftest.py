"""The same tests on both adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest

from libs.eventlog.kafka import KafkaLog
from libs.eventlog.memory import MemoryLog
from tests.conftest import KafkaEnv
from tests.contract.eventlog.support import PARTITIONS, World


@pytest.fixture
async def memory_world(env_prefix: str) -> AsyncIterator[World]:
    """An installation in memory."""
    log = MemoryLog(partitions=PARTITIONS)
    found = World(env_prefix, lambda: log)
    yield found
    await found.close()


@pytest.fixture
async def kafka_world(kafka_env: KafkaEnv) -> AsyncIterator[World]:
    """An installation on the real broker."""
    found = World(kafka_env.env, partial(KafkaLog, kafka_env.bootstrap))
    yield found
    await found.close()


@pytest.fixture(params=["memory", "kafka"])
def world(request: pytest.FixtureRequest) -> World:
    """An installation of its own on each kind of log."""
    found: World = request.getfixturevalue(f"{request.param}_world")
    return found
