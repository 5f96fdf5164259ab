"""The agent's configuration file, checked once at the start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.device.api import Endpoint
from clients.device.download import Pace
from clients.device.errors import ConfigError
from clients.device.offers import Rules


@dataclass(frozen=True, slots=True)
class Config:
    """What an agent is told; see the package for the fields."""

    endpoint: Endpoint
    rules: Rules
    state_directory: Path
    factory_version: str
    factory_security_version: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    serial: str = ""
    poll_s: float | None = None
    log: Path | None = None
    boot_timeout_s: float = 30.0
    health_timeout_s: float = 10.0
    trial_timeout_s: float = 600.0
    pace: Pace = field(default_factory=Pace)
    min_free_bytes: int = 1024 * 1024
    object_store_ca: Path | None = None
    timeout_s: float = 20.0


def load(path: Path) -> Config:
    """Read and check a configuration file."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("CONFIG_UNREADABLE", str(error)) from error
    except ValueError as error:
        raise ConfigError("CONFIG_MALFORMED", f"{path.name} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError("CONFIG_MALFORMED", f"{path.name} holds no object")
    try:
        return _config(body, path.resolve().parent)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("CONFIG_MALFORMED", f"{path.name}: {error!r}") from error


def _config(body: Mapping[str, Any], base: Path) -> Config:
    host, _, port = str(body["gateway"]).rpartition(":")
    keys = body["trusted_keys"]
    if not isinstance(keys, list):
        raise ConfigError("CONFIG_MALFORMED", "trusted_keys is not a list")
    if not keys:
        raise ConfigError("TRUST_LIST_EMPTY", "trusted_keys is empty: no firmware could ever be believed")

    def file(name: str) -> Path:
        return base / str(body[name])

    def optional(name: str) -> Path | None:
        return base / str(body[name]) if body.get(name) else None

    defaults = Pace()
    return Config(
        endpoint=Endpoint(
            host=host.strip("[]"),
            port=int(port),
            server_name=str(body["server_name"]),
            ca_file=file("ca_file"),
            certificate=file("certificate"),
            key=file("key"),
        ),
        rules=Rules(
            product=str(body["product"]),
            target=str(body["target"]),
            trusted_keys=tuple(bytes.fromhex(one) for one in keys),
            threshold=int(body["threshold"]),
            max_bundle_bytes=int(body.get("max_bundle_bytes", 1024 * 1024 * 1024)),
        ),
        state_directory=file("state_directory"),
        factory_version=str(body["factory"]["version"]),
        factory_security_version=int(body["factory"].get("security_version", 0)),
        attributes={str(key): str(value) for key, value in body.get("attributes", {}).items()},
        serial=str(body.get("serial", "")),
        poll_s=float(body["poll_s"]) if body.get("poll_s") is not None else None,
        log=optional("log"),
        boot_timeout_s=float(body.get("boot_timeout_s", 30.0)),
        health_timeout_s=float(body.get("health_timeout_s", 10.0)),
        trial_timeout_s=float(body.get("trial_timeout_s", 600.0)),
        pace=Pace(
            floor_bytes_s=float(body.get("floor_rate_bytes_s", defaults.floor_bytes_s)),
            window_s=float(body.get("rate_window_s", defaults.window_s)),
            total_s=float(body.get("download_timeout_s", defaults.total_s)),
        ),
        min_free_bytes=int(body.get("min_free_bytes", 1024 * 1024)),
        object_store_ca=optional("object_store_ca"),
        timeout_s=float(body.get("timeout_s", 20.0)),
    )
