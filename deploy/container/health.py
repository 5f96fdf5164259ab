"""`python -m deploy.container.health NAME`: exit status 0 when that service of this container says that it is ready."""

from __future__ import annotations

import asyncio
import os
import sys

from deploy.local.specs import GrpcProbe, HttpProbe, is_ready
from libs.settings import Settings


def probe_of(name: str, settings: Settings) -> GrpcProbe | HttpProbe:
    """How a process of that name is asked."""
    if name in ("gateway", "worker"):
        address = settings.gateway_health if name == "gateway" else settings.worker_health
        return HttpProbe(f"http://{address}/healthz")
    port = settings.address(name, "internal").rpartition(":")[2]
    return GrpcProbe(f"localhost:{port}", str(settings.tls_dir), name)


def main(arguments: list[str]) -> int:
    """One line on standard error says why not."""
    name = arguments[0] if arguments else os.environ.get("GROUNDSWELL_PROCESS", "")
    answer = asyncio.run(is_ready(probe_of(name, Settings())))
    if answer:
        print(f"{name}: {answer}", file=sys.stderr)
    return 1 if answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
