"""The topics of an installation: one place that says which exist, with which settings.

Creating them is a deploy step and not something a service does: the partition count decides which leader owns an
aggregate, so a service that quietly created its topic with another count would split histories for good.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

SERVICES = ("registry", "pki", "artifacts", "releases", "rollout", "webhooks")
MAX_MESSAGE_BYTES = 1024 * 1024
_DAY_MS = 24 * 60 * 60 * 1000
CHECKIN_RETENTION_MS = 14 * _DAY_MS
DEAD_RETENTION_MS = 30 * _DAY_MS
FOREVER = -1
_REPLICAS = 3
_VISIBLE_WITHIN_SECONDS = 30.0


class TopicMismatchError(Exception):
    """An existing topic does not have the partition count of the installation."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as it must exist."""

    name: str
    partitions: int
    retention_ms: int

    @property
    def settings(self) -> dict[str, str]:
        """Broker-side settings. LogAppendTime: a producer's clock must not decide what retention deletes."""
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_ms),
            "message.timestamp.type": "LogAppendTime",
            "max.message.bytes": str(MAX_MESSAGE_BYTES),
        }


def topics_of(env: str, partitions: int) -> tuple[Topic, ...]:
    """Every topic of one installation."""
    if partitions < 1:
        raise ValueError(f"partitions must be at least 1, not {partitions}")
    logs = tuple(
        Topic(f"{env}.{service}.{kind}.v1", partitions, FOREVER)
        for service in SERVICES
        for kind in ("events", "public")
    )
    return (
        *logs,
        Topic(f"{env}.device.checkins.v1", partitions, CHECKIN_RETENTION_MS),
        Topic(f"{env}.device.checkins.dead.v1", partitions, DEAD_RETENTION_MS),
    )


async def ensure_topics(bootstrap: str, env: str, partitions: int) -> tuple[str, ...]:
    """Create the topics that are missing; return their names. Idempotent.

    Raises `TopicMismatchError`, before creating anything, when a topic exists with another partition count. Returns
    only when every topic has a leader for every partition, so the first producer does not meet an unknown topic.
    """
    wanted = topics_of(env, partitions)
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        existing = await _partition_counts(admin, tuple(topic.name for topic in wanted))
        _refuse_mismatch(wanted, existing)
        missing = tuple(topic for topic in wanted if topic.name not in existing)
        if missing:
            await _create(admin, missing)
            async with asyncio.timeout(_VISIBLE_WITHIN_SECONDS):
                while True:
                    seen = await _partition_counts(admin, tuple(topic.name for topic in wanted))
                    _refuse_mismatch(wanted, seen)
                    if len(seen) == len(wanted):
                        break
                    await asyncio.sleep(0.05)
        return tuple(topic.name for topic in missing)
    finally:
        await admin.close()


async def delete_topics(bootstrap: str, env: str) -> None:
    """Delete all topics of an installation, for tests and for those who mean it: this is the data."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        mine = [name for name in await admin.list_topics() if name.startswith(f"{env}.")]
        if mine:
            await admin.delete_topics(mine)
    finally:
        await admin.close()


def _refuse_mismatch(wanted: tuple[Topic, ...], existing: dict[str, int]) -> None:
    for topic in wanted:
        count = existing.get(topic.name, topic.partitions)
        if count != topic.partitions:
            raise TopicMismatchError(
                f"topic {topic.name} has {count} partitions and the installation is set to {topic.partitions}: "
                f"set GROUNDSWELL_PARTITIONS={count}, or use another GROUNDSWELL_ENV"
            )


async def _partition_counts(admin: Any, names: tuple[str, ...]) -> dict[str, int]:
    """Partition counts of those topics that exist and have all their leaders."""
    found: dict[str, int] = {}
    for row in await admin.describe_topics(list(names)):
        leaders = [partition["leader"] for partition in row["partitions"]]
        if row["error_code"] == 0 and leaders and min(leaders) >= 0:
            found[str(row["topic"])] = len(leaders)
    return found


async def _create(admin: Any, topics: tuple[Topic, ...]) -> None:
    # As many copies as the cluster can hold, up to the usual three: the same step serves one node and many.
    replicas = min(_REPLICAS, len((await admin.describe_cluster())["brokers"]))
    response = await admin.create_topics(
        [
            NewTopic(topic.name, topic.partitions, replication_factor=replicas, topic_configs=topic.settings)
            for topic in topics
        ]
    )
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        if code != 0 and error is not TopicAlreadyExistsError:
            raise error(f"creating topic {name}: {rest[0] if rest else error.__name__}")


def main() -> int:
    """Deploy step: `python -m deploy.topics`, with the settings of docs/conventions.md."""
    bootstrap = os.environ.get("GROUNDSWELL_KAFKA", "127.0.0.1:19092")
    env = os.environ.get("GROUNDSWELL_ENV", "dev")
    try:
        created = asyncio.run(ensure_topics(bootstrap, env, int(os.environ.get("GROUNDSWELL_PARTITIONS", "4"))))
    except (TopicMismatchError, KafkaError, TimeoutError, ValueError) as error:
        print(f"topics: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(f"topics of {env}: {len(created)} created" if created else f"topics of {env}: all there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
