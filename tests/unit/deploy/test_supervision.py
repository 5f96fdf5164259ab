from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from deploy.local import pids
from deploy.local.credentials import S3Credentials
from deploy.local.errors import StackError
from deploy.local.services import service_specs
from deploy.local.settings import load
from deploy.local.specs import GrpcProbe, HttpProbe, Spec
from deploy.local.supervisor import FIRST_BACKOFF, LAST_BACKOFF, next_backoff


def test_back_off_doubles_up_to_a_limit_and_starts_again_after_a_settled_run() -> None:
    delays = [0.0]
    for _ in range(10):
        delays.append(next_backoff(delays[-1], ready_for=0))
    assert delays[1:4] == [FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF] == [0.5, 1.0, 2.0]
    assert delays[-1] == LAST_BACKOFF
    assert next_backoff(LAST_BACKOFF, ready_for=60) == FIRST_BACKOFF


def test_every_documented_process_is_in_the_table(tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in service_specs(load({}, tmp_path), S3Credentials("a", "b"))}
    assert {name: spec.argv[2] for name, spec in specs.items()} == {
        "registry": "services.registry",
        "pki": "services.pki",
        "artifacts": "services.artifacts",
        "releases": "services.releases",
        "rollout": "services.rollout",
        "webhooks": "services.webhooks",
        "gateway": "services.gateway",
        "worker": "services.rollout.worker",
    }
    assert isinstance(specs["registry"].probe, GrpcProbe)
    assert specs["gateway"].probe == HttpProbe("http://127.0.0.1:19407/healthz")
    assert specs["gateway"].ports == (19407, 19443)
    assert specs["pki"].env["GROUNDSWELL_S3_SECRET_KEY"] == "b"


def test_a_spec_survives_its_file(tmp_path: Path) -> None:
    specs = service_specs(load({}, tmp_path), S3Credentials("a", "b"))
    assert msgspec.json.decode(msgspec.json.encode(specs), type=tuple[Spec, ...]) == specs


def test_a_reused_pid_is_not_the_recorded_process(tmp_path: Path) -> None:
    pids.record(tmp_path, "it", os.getpid())
    found = pids.recorded(tmp_path, "it")
    assert found is not None
    assert found.pid == os.getpid()
    assert (tmp_path / "it.pid").read_text() == f"{os.getpid()}\n"
    (tmp_path / "it.began").write_text("another moment")
    assert pids.recorded(tmp_path, "it") is None


@pytest.mark.parametrize("content", ["", "x", "999999999"])
def test_a_useless_pid_file_names_nobody(content: str, tmp_path: Path) -> None:
    (tmp_path / "it.pid").write_text(content)
    assert pids.recorded(tmp_path, "it") is None


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = pids.Recorded(child.pid, pids.began(child.pid))
        assert pids.end([process], patience=0.2) == [child.pid]
        assert not process.is_alive()


def test_further_gateways_share_the_device_port_and_nothing_else(tmp_path: Path) -> None:
    given = load({"GROUNDSWELL_GATEWAYS": "3"}, tmp_path)
    specs = [spec for spec in service_specs(given, S3Credentials("a", "b")) if spec.name.startswith("gateway")]
    assert [spec.name for spec in specs] == ["gateway", "gateway-2", "gateway-3"]
    assert len({spec.env["GROUNDSWELL_GATEWAY_LISTEN"] for spec in specs}) == 1
    assert [spec.env.get("GROUNDSWELL_GATEWAY_ID", "local-1") for spec in specs] == ["local-1", "local-2", "local-3"]
    assert len({spec.env["GROUNDSWELL_GATEWAY_HEALTH"] for spec in specs}) == 3
    assert len({port for spec in specs for port in spec.ports}) == 4


@pytest.mark.parametrize("given", ["0", "17", "two", "-1"])
def test_an_unusable_number_of_gateways_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="GROUNDSWELL_GATEWAYS"):
        load({"GROUNDSWELL_GATEWAYS": given}, tmp_path)
