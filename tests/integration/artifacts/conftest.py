"""Sites for a test: one, and a second installation beside it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local.specs import s3_client
from deploy.topics import delete_topics, ensure_topics
from tests.conftest import S3, KafkaEnv
from tests.integration.artifacts.site import Site, running_site, settings_of


@pytest.fixture
async def site(request: pytest.FixtureRequest, kafka_env: KafkaEnv, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    """Its parameter is the grace time of content, in seconds."""
    grace_s = getattr(request, "param", 86_400)
    async with running_site(settings_of(kafka_env, s3, tmp_path / "local", grace_s)) as made:
        yield made


@pytest.fixture
async def other_site(kafka_env: KafkaEnv, s3: S3, tmp_path: Path) -> AsyncIterator[Site]:
    """Another installation, with an organization of the same name."""
    prefix = f"t{secrets.token_hex(6)}"
    await ensure_topics(kafka_env.bootstrap, prefix, kafka_env.partitions)
    s3_client(s3.endpoint, s3.access_key, s3.secret_key).make_bucket(prefix)
    settings = settings_of(replace(kafka_env, env=prefix), replace(s3, bucket=prefix), tmp_path / "other")
    async with running_site(settings) as made:
        yield made
    await delete_topics(kafka_env.bootstrap, prefix)
