"""``make bench``: every benchmark against the local servers, which are started when they do not run."""

from __future__ import annotations

import subprocess
import sys

from deploy.local import control
from deploy.local.settings import load

BENCHMARKS = (
    "bench.resolve",
    "bench.log_submit",
    "bench.log_commit",
    "bench.log_cold_start",
    "bench.webhooks",
    "bench.grants",
    "bench.rollout_scale",
    "bench.checkins",
    "bench.worker",
    "bench.cycles",
    "bench.stops",
)


def main() -> int:
    """Run all; the first failure is the exit status."""
    settings = load()
    control.up(settings, servers_only=True, say=lambda _: None)
    for module in BENCHMARKS:
        done = subprocess.run([sys.executable, "-m", module, "--kafka", settings.kafka], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
