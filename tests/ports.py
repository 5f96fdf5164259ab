"""Ports for the servers that a test starts itself.

A port that the kernel chose and the test gave back is one that the kernel may lend to any outgoing connection before
the test's server binds it. These lie below the range the kernel lends from, every test process has its own share of
them, and a process hands none out twice before it has been through its share.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator

FIRST, LAST = 10_240, 18_900  # Below the default stack at 19,000; Linux lends from 32,768.


def _share() -> Iterator[int]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(FIRST + int(worker.removeprefix("gw")) % count, LAST, count))
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle(ports[start:] + ports[:start])


_PORTS = _share()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on, and that nothing but a server of this process will take."""
    for port in itertools.islice(_PORTS, LAST - FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {FIRST} to {LAST}")


def free_address() -> str:
    """``host:port`` of a free port."""
    return f"127.0.0.1:{free_port()}"
