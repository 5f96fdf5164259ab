"""`up` as a whole, over the real servers, with services that only say that they are healthy."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import control, pids, supervisor
from deploy.local.errors import StackError
from deploy.local.services import SERVICES
from deploy.local.settings import Settings, load
from tests.servers import Servers

GRPC_SERVICE = """
import asyncio, os, sys
from pathlib import Path
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def main(name):
    tls = Path(os.environ["GROUNDSWELL_TLS_DIR"])
    pair = ((tls / f"{name}.key").read_bytes(), (tls / f"{name}.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (tls / "ca.pem").read_bytes(), require_client_auth=True)
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    assert server.add_secure_port(os.environ[f"GROUNDSWELL_{name.upper()}_INTERNAL"], credentials)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main(sys.argv[0].split("/")[-2]))
"""
HTTP_SERVICE = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()
host, port = os.environ["GROUNDSWELL_{name}_HEALTH"].split(":")
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
"""
BOOTSTRAP = """
import json, os
from pathlib import Path
secret = Path(os.environ["GROUNDSWELL_BOOTSTRAP_SECRET_FILE"]).read_text()
Path(os.environ["GROUNDSWELL_LOCAL_DIR"], "profile.json").write_text(json.dumps({"secret": secret}))
"""


def _quiet(_: str) -> None: ...


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for folder in path.parents:
        if folder.name == "services":
            (folder / "__init__.py").touch()
            break
        (folder / "__init__.py").touch()


def _free_base() -> int:
    """A block of ports that nobody listens in, for the few that are used."""
    for base in range(21000, 28000, 1000):
        if all(pids.port_is_free(base + offset) for offset in (101, 201, 407, 408, 443)):
            return base
    pytest.fail("no free block of ports")


@pytest.fixture
def checkout(tmp_path: Path, servers: Servers, env_prefix: str) -> Iterator[Settings]:
    services = tmp_path / "services"
    for service in SERVICES:
        path = tmp_path.joinpath(*service.module.split("."))
        http = service.name in ("gateway", "worker")
        _write(path / "__main__.py", HTTP_SERVICE.format(name=service.name.upper()) if http else GRPC_SERVICE)
    _write(services / "registry" / "bootstrap.py", BOOTSTRAP)
    settings = load(
        {
            **servers.environment,
            "GROUNDSWELL_S3_BUCKET": env_prefix,
            "GROUNDSWELL_ENV": env_prefix,
            "GROUNDSWELL_PORT_BASE": str(_free_base()),
        },
        tmp_path,
    )
    try:
        yield settings
    finally:
        control.down(settings, _quiet)


def test_up_starts_every_service_and_writes_the_profile(checkout: Settings) -> None:
    lines: list[str] = []
    control.up(checkout, say=lines.append)
    assert "everything is ready" in lines
    assert "created 14 topics" in lines[0]
    profile = json.loads((checkout.local_dir / "profile.json").read_text())
    assert profile["secret"] == checkout.bootstrap_secret.read_text()

    lines.clear()
    control.up(checkout, say=lines.append)
    assert lines[0] == "already running"

    # Two services are killed at once: one behind mutual TLS, one behind plain HTTP.
    killed = {name: pids.recorded(checkout.run_dir, name) for name in ("rollout", "worker")}
    for process in killed.values():
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while True:
        seen = {status.name: status for status in supervisor.read_state(checkout.run_dir).processes}
        if all(seen[name].restarts == 1 and seen[name].state == "ready" for name in killed):
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(status.restarts for status in seen.values()) == 2

    control.down(checkout, lines.append)
    assert re.fullmatch(r"ended (\w+, ){7}\w+", lines[-1])


def test_a_failing_bootstrap_is_a_line_and_leaves_the_services_up(checkout: Settings) -> None:
    (checkout.root / "services" / "registry" / "bootstrap.py").write_text("import sys; sys.exit('secret refused')")
    with pytest.raises(StackError, match=r"platform bootstrap failed \(exit 1\)") as caught:
        control.up(checkout, say=_quiet)
    assert "secret refused" in caught.value.detail
    assert control.status(checkout, _quiet)


def test_a_server_of_somebody_else_that_is_silent_is_named(tmp_path: Path, servers: Servers) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
        settings = load({**servers.environment, "GROUNDSWELL_REDIS": address}, tmp_path)
        with pytest.raises(StackError, match=re.escape(f"GROUNDSWELL_REDIS={address} does not answer")):
            control.await_external(settings, within=0.1)
