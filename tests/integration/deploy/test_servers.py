"""The fixtures themselves, on the real servers."""

from __future__ import annotations

import io

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from redis.asyncio import Redis

from deploy.local.specs import s3_client
from deploy.topics import TopicMismatchError, ensure_topics, topics_of
from tests.conftest import S3, KafkaEnv
from tests.servers import Servers


async def test_topics_have_the_settings_asked_for(kafka_env: KafkaEnv) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_env.bootstrap)
    await admin.start()
    try:
        for topic in topics_of(kafka_env.env, kafka_env.partitions):
            [row] = await admin.describe_topics([topic.name])
            assert len(row["partitions"]) == kafka_env.partitions
            [answer] = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic.name)])
            found = {name: value for name, value, *_ in answer.resources[0][4]}
            assert topic.settings.items() <= found.items()
    finally:
        await admin.close()


async def test_ensuring_topics_again_creates_none(kafka_env: KafkaEnv) -> None:
    assert await ensure_topics(kafka_env.bootstrap, kafka_env.env, kafka_env.partitions) == ()


async def test_another_partition_count_is_refused_and_nothing_is_created(servers: Servers, env_prefix: str) -> None:
    assert len(await ensure_topics(servers.kafka, env_prefix, 2)) == 14
    with pytest.raises(TopicMismatchError, match="has 2 partitions and the installation is set to 3"):
        await ensure_topics(servers.kafka, env_prefix, 3)
    assert await ensure_topics(servers.kafka, env_prefix, 2) == ()


async def test_a_transaction_is_read_back(kafka_env: KafkaEnv) -> None:
    topic = f"{kafka_env.env}.registry.events.v1"
    producer = AIOKafkaProducer(bootstrap_servers=kafka_env.bootstrap, transactional_id=f"{kafka_env.env}.probe")
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka_env.bootstrap,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await producer.start()
    await consumer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(topic, b"value", key=b"key", partition=3)
        record = await consumer.getone()
        assert (record.key, record.value, record.partition) == (b"key", b"value", 3)
        assert record.timestamp_type == 1  # LogAppendTime
    finally:
        await consumer.stop()
        await producer.stop()


async def test_redis_answers(redis_url: str, env_prefix: str) -> None:
    client: Redis = Redis.from_url(redis_url)
    try:
        await client.set(env_prefix, b"x", ex=60)
        assert await client.get(env_prefix) == b"x"
    finally:
        await client.aclose()


def test_s3_stores_in_a_fresh_bucket(s3: S3) -> None:
    client = s3_client(s3.endpoint, s3.access_key, s3.secret_key)
    assert list(client.list_objects(s3.bucket)) == []
    client.put_object(s3.bucket, "some/key", io.BytesIO(b"content"), 7)
    response = client.get_object(s3.bucket, "some/key")
    try:
        assert response.read() == b"content"
    finally:
        response.close()
        response.release_conn()
