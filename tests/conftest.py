"""Fixtures every test may use: real servers, a fresh corner of each."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from deploy.local.specs import s3_client
from deploy.topics import delete_topics, ensure_topics
from tests.servers import Servers, running

_KINDS = ("unit", "contract", "simulation", "integration", "e2e")
_HERE = Path(__file__).resolve().parent
PARTITIONS = 4


@dataclass(frozen=True, slots=True)
class KafkaEnv:
    """A broker and a prefix of topics that nobody else uses."""

    bootstrap: str
    env: str
    partitions: int


@dataclass(frozen=True, slots=True)
class S3:
    """An object store and a bucket that nobody else uses."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's kind is the folder it is in."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            kind = item.path.relative_to(_HERE).parts[0]
            if kind in _KINDS:
                item.add_marker(kind)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How `make test` spreads over its two processes."""
    return ByFile(config, log)


class ByFile(LoadScopeScheduling):
    """All end-to-end tests stay in one process, because they share one installation; of the others a file stays
    together, because its tests may share what is dear to start."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "e2e" if file.startswith("tests/e2e/") else file


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Real Kafka, Redis and S3: from the environment, from containers, or the tests' own local stack."""
    # On a thread of its own: the first test to ask may be an asynchronous one, with an event loop running here.
    with ThreadPoolExecutor(1) as beside:
        stack = running(os.environ)
        found = beside.submit(stack.__enter__).result()
        try:
            yield found
        finally:
            beside.submit(stack.__exit__, None, None, None).result()


@pytest.fixture
def env_prefix() -> str:
    """A prefix (GROUNDSWELL_ENV) that no other test uses."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
async def kafka_env(servers: Servers, env_prefix: str) -> AsyncIterator[KafkaEnv]:
    """A fresh prefix with all topics of an installation; gone afterwards, or a long run ends with a broker that is
    busy with the partitions of tests long past."""
    await ensure_topics(servers.kafka, env_prefix, PARTITIONS)
    yield KafkaEnv(servers.kafka, env_prefix, PARTITIONS)
    await delete_topics(servers.kafka, env_prefix)


@pytest.fixture
def redis_url(servers: Servers) -> str:
    """Redis; shared, so use keys under a prefix of your own (`env_prefix`)."""
    return servers.redis


@pytest.fixture
def s3(servers: Servers, env_prefix: str) -> S3:
    """A fresh bucket."""
    s3_client(servers.s3_endpoint, servers.s3_access_key, servers.s3_secret_key).make_bucket(env_prefix)
    return S3(servers.s3_endpoint, servers.s3_access_key, servers.s3_secret_key, env_prefix)
