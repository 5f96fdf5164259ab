"""A site of its own for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import KafkaEnv
from tests.integration.webhooks.site import Receiver, Site, running_site


@pytest.fixture
async def site(kafka_env: KafkaEnv, tmp_path: Path) -> AsyncIterator[Site]:
    async with running_site(kafka_env, tmp_path / "site") as made:
        yield made


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[Receiver]:
    made = Receiver(tmp_path / "receiver")
    await made.start()
    yield made
    await made.stop()
