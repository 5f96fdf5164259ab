"""Sixty agents must start together on a small machine: what one may import, and how much it may hold."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {
    "aiohttp",
    "aiokafka",
    "asyncio",
    "google",
    "grpc",
    "groundswell",
    "immutables",
    "msgspec",
    "pydantic",
    "services",
    "urllib.request",
    "cryptography.x509",
}
MOST_KIB = 40 * 1024
MOST_PRIVATE_KIB = 16 * 1024
# Of the process itself: the peak that `getrusage` gives is inherited from the process that started it.
_PROBE = """
import json, pathlib, sys
import clients.agent.__main__
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
memory = {key: int(status[key].split()[0]) for key in ("VmHWM", "RssAnon")}
print(json.dumps([sorted(sys.modules), memory]))
"""


def test_the_agent_imports_nothing_heavy_and_stays_small() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, check=True)
    modules, memory = json.loads(done.stdout)
    assert HEAVY.isdisjoint(modules)
    assert {name.split(".")[0] for name in modules} & HEAVY == set()
    assert memory["VmHWM"] < MOST_KIB
    assert memory["RssAnon"] < MOST_PRIVATE_KIB
