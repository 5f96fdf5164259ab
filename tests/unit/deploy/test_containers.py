"""docker-compose.yml and Dockerfile agree with the code: settings that exist, pinned servers, no open port."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.container import environment
from deploy.container.health import probe_of
from deploy.local.servers import kafka_version
from deploy.local.services import SERVICES
from deploy.local.specs import GrpcProbe, HttpProbe
from libs.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PROCESSES: dict[str, Any] = COMPOSE["services"]
SECRET = re.compile(r"\$\{GROUNDSWELL_S3_(ACCESS|SECRET)_KEY:\?")


def test_every_process_of_the_stack_without_containers_is_there_with_the_same_module() -> None:
    for service in SERVICES:
        assert PROCESSES[service.name]["command"] == [service.module]


@pytest.mark.parametrize("name", [service.name for service in SERVICES])
def test_every_process_is_asked_for_its_own_health(name: str) -> None:
    assert PROCESSES[name]["healthcheck"]["test"] == ["CMD", "python", "-m", "deploy.container.health", name]
    assert isinstance(probe_of(name, Settings()), HttpProbe if name in ("gateway", "worker") else GrpcProbe)


def test_every_variable_is_a_setting() -> None:
    known = {f"GROUNDSWELL_{field.upper()}" for field in Settings.model_fields}
    for name, process in PROCESSES.items():
        ours = {variable for variable in process.get("environment", {}) if variable.startswith("GROUNDSWELL_")}
        assert ours <= known, name


def test_what_a_service_is_called_is_where_it_is_reached() -> None:
    settings = COMPOSE["x-settings"]
    for name in ("registry", "pki", "artifacts", "releases", "rollout", "webhooks"):
        host, _, port = settings[f"GROUNDSWELL_{name.upper()}_INTERNAL"].partition(":")
        assert (host, f"127.0.0.1:{int(port) + 100}:{int(port) + 100}") == (name, PROCESSES[name]["ports"][0])


def test_ports_are_open_on_loopback_only() -> None:
    ports = [port for process in PROCESSES.values() for port in process.get("ports", [])]
    assert len(ports) == 8
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_of_others_are_pinned_to_the_version_of_the_stack_without_containers() -> None:
    assert PROCESSES["kafka"]["image"] == f"apache/kafka:{kafka_version()}"
    assert re.fullmatch(r"redis:7\.\d+", PROCESSES["redis"]["image"])


def test_services_start_after_the_deploy_step_and_run_without_rights() -> None:
    for service in SERVICES:
        process = PROCESSES[service.name]
        assert process["depends_on"]["prepare"]["condition"] == "service_completed_successfully"
        assert (process["read_only"], process["cap_drop"]) == (True, ["ALL"])


def test_the_files_hold_no_secret() -> None:
    for process in PROCESSES.values():
        for name, value in process.get("environment", {}).items():
            if name in ("GROUNDSWELL_S3_ACCESS_KEY", "GROUNDSWELL_S3_SECRET_KEY"):
                assert SECRET.match(value)


def test_secrets_are_made_once_and_for_their_owner_only(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    assert environment.main(target) == 0
    first = target.read_text()
    assert target.stat().st_mode & 0o077 == 0
    assert environment.main(target) == 0
    assert target.read_text() == first
    assert re.search(r"^GROUNDSWELL_S3_SECRET_KEY=[0-9a-f]{40}$", first, re.MULTILINE)


def test_the_image_copies_what_the_services_import() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text()
    for folder in ("libs", "services", "clients", "deploy", "protos"):
        assert f"COPY {folder} " in dockerfile
        assert f"!{folder}\n" in ignored
