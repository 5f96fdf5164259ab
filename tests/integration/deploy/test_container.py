"""The deploy step of an installation in containers, run as they run it, against real servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from deploy.local.specs import s3_client
from tests.servers import Servers

ROOT = Path(__file__).resolve().parents[3]


def prepare(servers: Servers, env: str, state: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **servers.environment,
        "GROUNDSWELL_ENV": env,
        "GROUNDSWELL_S3_BUCKET": env,
        "GROUNDSWELL_LOCAL_DIR": str(state),
        "GROUNDSWELL_TLS_DIR": str(state / "tls"),
        "GROUNDSWELL_KEYSTORE_DIR": str(state / "keystore"),
    }
    return subprocess.run(
        [sys.executable, "-m", "deploy.container.prepare"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


def test_prepared_twice_changes_nothing(servers: Servers, env_prefix: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = prepare(servers, env_prefix, state)
    assert first.returncode == 0, first.stderr
    made = {path: path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file()}
    assert {"ca.pem", "registry.pem", "gateway.key", "kek", "bootstrap.secret"} <= {path.name for path in made}
    assert all(path.stat().st_mode & 0o077 == 0 for path in made if path.suffix in (".key", ".secret"))
    assert s3_client(servers.s3_endpoint, servers.s3_access_key, servers.s3_secret_key).bucket_exists(env_prefix)

    again = prepare(servers, env_prefix, state)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in made} == made


def test_without_an_address_it_says_what_to_set(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GROUNDSWELL_")}
    done = subprocess.run(
        [sys.executable, "-m", "deploy.container.prepare"],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "set GROUNDSWELL_KAFKA" in done.stderr
