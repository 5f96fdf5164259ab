from __future__ import annotations

import pytest

from deploy.topics import topics_of


def test_every_service_has_both_logs_and_they_are_kept_for_ever() -> None:
    topics = {topic.name: topic for topic in topics_of("dev", 4)}
    assert len(topics) == 14
    for service in ("registry", "pki", "artifacts", "releases", "rollout", "webhooks"):
        for kind in ("events", "public"):
            settings = topics[f"dev.{service}.{kind}.v1"].settings
            assert settings == {
                "cleanup.policy": "delete",
                "retention.ms": "-1",
                "message.timestamp.type": "LogAppendTime",
                "max.message.bytes": "1048576",
            }


def test_checkins_are_kept_two_weeks_on_as_many_partitions() -> None:
    checkins = next(topic for topic in topics_of("dev", 7) if topic.name == "dev.device.checkins.v1")
    assert checkins.partitions == 7
    assert checkins.settings["retention.ms"] == str(14 * 24 * 60 * 60 * 1000)
    assert checkins.settings["message.timestamp.type"] == "LogAppendTime"


def test_no_partitions_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        topics_of("dev", 0)
