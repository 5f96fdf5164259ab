"""Check-ins over keep-alive mutual TLS through one gateway, resolved and recorded, against a bare aiohttp handler.

    python -m bench.checkins [--seconds 4] [--rounds 5] [--devices 64]

Both sides have the same TLS, loop, request and length of answer, one process each, and are loaded in turn by the same
tool over as many connections, one request under way on each. The gateway also knows the device, decides, signs and has
Kafka hold what was said. Every check-in that was answered is counted again in the topic afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from groundswell.device.v1 import device_pb2

from bench.installation import enrolled, running, tenant_of, what_else_ran
from demo import checker
from demo.factory import Identity
from deploy.local.settings import ROOT
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

BARE, RAW = 801, 802


def spec_of(stack: Stack, tenant: Tenant, identities: list[Identity]) -> dict[str, Any]:
    tls = stack.settings.tls_dir.resolve()
    return {
        "server_name": tenant.server_name,
        "ca": str(tls / "ca.pem"),
        "server_certificate": str(tls / "gateway.pem"),
        "server_key": str(tls / "gateway.key"),
        "device_ca": str(tenant.factory.certificate_file),
        "identities": [{"certificate": str(one.certificate), "key": str(one.key)} for one in identities],
    }


@contextlib.contextmanager
def process(*arguments: str, wait: bool) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            if wait:
                child.stdout.readline()
            yield child
        finally:
            child.terminate()


class Tool:
    """The load tool, on a leash."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def load(self, port: int, seconds: float) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{port} {seconds}\n")
        self._child.stdin.flush()
        result: dict[str, Any] = json.loads(self._child.stdout.readline())
        return result


def cpu_s(pid: int | None) -> float:
    """CPU a process has used: on a machine that others use too, the fairer measure of two."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def recorded(stack: Stack, organization: str) -> int:
    """Check-ins of the organization in the topic."""
    records = asyncio.run(checker.read_topic(stack.settings.kafka, f"{stack.settings.env}.device.checkins.v1"))
    batches = (device_pb2.CheckInBatch.FromString(record.value) for record in records)
    return sum(len(batch.items) for batch in batches if batch.organization == organization)


def main(seconds: float, rounds: int, devices: int) -> None:
    with running() as stack, tenant_of(stack) as tenant, TemporaryDirectory() as directory:
        identities = enrolled(tenant, [f"bench-{number}" for number in range(devices)])
        spec = Path(directory) / "spec.json"
        spec.write_text(json.dumps(spec_of(stack, tenant, identities)))
        bare, raw = (stack.settings.port(offset) for offset in (BARE, RAW))
        ours = int(stack.profile.gateway.rpartition(":")[2])
        with (
            process("bench.bare_https", str(spec), "aiohttp", str(bare), wait=True) as bare_process,
            process("bench.bare_https", str(spec), "raw", str(raw), wait=True),
            process("bench.device_load", str(spec), wait=False) as child,
        ):
            tool = Tool(child)
            before = recorded(stack, tenant.organization)
            for port in (ours, bare, raw):
                tool.load(port, 1.0)
            answered = tool.load(ours, seconds)["ok"]  # the second warm-up, by now with every device cached
            found: dict[int, list[dict[str, Any]]] = {ours: [], bare: [], raw: []}
            pids = {ours: stack.pid("gateway"), bare: bare_process.pid}
            for _ in range(rounds):
                for port, results in found.items():
                    used = cpu_s(pids.get(port))
                    result = tool.load(port, seconds)
                    result["cpu_us"] = (cpu_s(pids.get(port)) - used) * 1e6 / max(1, result["ok"])
                    results.append(result)
            load = what_else_ran()
        rates = {port: statistics.median(one["rate"] for one in results) for port, results in found.items()}
        cores = statistics.median(one["cores"] for one in found[ours])
        answered += sum(one["ok"] for one in found[ours])
        other = sum(one["other"] + one["lost"] for one in found[ours])
        held = recorded(stack, tenant.organization) - before
        if held < answered or other:
            sample = found[ours][-1]["sample"]
            raise SystemExit(f"checkins: {answered} answered, {held} recorded, {other} answered otherwise: {sample}")
        cost = {port: statistics.median(one["cpu_us"] for one in found[port]) for port in pids}
        p99 = statistics.median(one["p99_ms"] for one in found[ours])
        print(
            f"checkins: {rates[ours]:,.0f}/s resolved and recorded by one gateway process, bare aiohttp over the same "
            f"mutual TLS {rates[bare]:,.0f}/s, ratio {rates[ours] / rates[bare]:.2f} (aim 0.50, above 10,000/s); "
            f"{cost[ours]:.0f} us of CPU each, bare {cost[bare]:.0f} us, ratio {cost[bare] / cost[ours]:.2f}; "
            f"p99 {p99:.1f} ms at {devices} connections; load tool of our own in Python on uvloop: {cores:.2f} cores, "
            f"ceiling {rates[raw]:,.0f}/s; {held} of {answered} counted again in the topic; {load}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--kafka", help="not used: the benchmark brings an installation of its own")
    arguments = parser.parse_args(sys.argv[1:])
    main(arguments.seconds, arguments.rounds, arguments.devices)
