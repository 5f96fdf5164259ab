from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import servers
from deploy.local.credentials import S3Credentials
from deploy.local.errors import StackError
from deploy.local.files import check_room
from deploy.local.settings import load

KEYS = S3Credentials("a", "b")


def _quiet(_: str) -> None: ...


def test_kafka_notices_a_dead_leader_within_a_second_and_makes_no_topics() -> None:
    lines = servers.kafka_properties(load({}, Path("/checkout"))).splitlines()
    assert "group.min.session.timeout.ms=1000" in lines
    assert "group.initial.rebalance.delay.ms=0" in lines
    assert "auto.create.topics.enable=false" in lines
    assert "advertised.listeners=PLAINTEXT://127.0.0.1:19092" in lines


def test_every_server_listens_on_loopback_only() -> None:
    settings = load({}, Path("/checkout"))
    assert "bind 127.0.0.1\n" in servers.redis_configuration(settings)
    assert "s3proxy.endpoint=http://127.0.0.1:19900\n" in servers.s3_properties(settings, KEYS)
    assert "listeners=PLAINTEXT://127.0.0.1:19092,CONTROLLER://127.0.0.1:19093\n" in servers.kafka_properties(settings)


def test_s3_gets_an_absolute_folder() -> None:
    text = servers.s3_properties(load({}, Path()), KEYS)
    folder = next(line for line in text.splitlines() if "basedir" in line).partition("=")[2]
    assert Path(folder).is_absolute()


@pytest.mark.parametrize("program", ["java", "mvn", "redis-server"])
def test_a_missing_program_is_one_line_naming_its_package(
    program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackError) as caught:
        servers.require(program, _quiet)
    assert servers.PACKAGES[program] in caught.value.line
    assert "\n" not in caught.value.line


def test_an_old_java_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(StackError, match="Java 17 or newer"):
        servers.server_specs(load({}, tmp_path), KEYS, _quiet)


def test_somebody_elses_servers_are_not_started(tmp_path: Path) -> None:
    given = {
        "GROUNDSWELL_KAFKA": "127.0.0.1:1",
        "GROUNDSWELL_REDIS": "redis://127.0.0.1:2/0",
        "GROUNDSWELL_S3_ENDPOINT": "http://127.0.0.1:3",
    }
    assert servers.server_specs(load(given, tmp_path), KEYS, _quiet) == ()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="MiB free"):
        check_room(tmp_path, needed=2**62)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"cannot write to .*GROUNDSWELL_LOCAL_DIR"):
        check_room(tmp_path / "file" / "folder")


def test_jars_that_another_stack_fetched_meanwhile_are_taken(tmp_path: Path) -> None:
    ours, theirs = tmp_path / ".s3.1", tmp_path / "s3"
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "a.jar").write_text(folder.name)
    servers._move(ours, theirs)
    assert (theirs / "a.jar").read_text() == "s3"
    with pytest.raises(FileNotFoundError):
        servers._move(tmp_path / "gone", tmp_path / "new")
