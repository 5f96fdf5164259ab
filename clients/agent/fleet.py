"""Many agents on one machine: `python -m clients.agent.fleet --config FILE --config FILE …`.

Every agent is a process of its own, forked from one that has imported everything, so the code is in memory once. One
line of JSON on standard output names them, in the order of the command line: `{"pids": [...]}`. The parent waits;
SIGTERM ends it and all agents that it started. A killed agent stays dead: start it again by `python -m clients.agent`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

# Imported before the fork by whoever needs them later, so that their pages are shared as well.
import clients.agent.agent  # noqa: F401
from clients.agent.__main__ import main as run_one


def main(arguments: list[str]) -> int:
    """Status 0 after SIGTERM or when every agent has ended."""
    files = arguments[1::2]
    if not files or arguments[0::2] != ["--config"] * len(files):
        sys.stderr.write("usage: python -m clients.agent.fleet --config FILE [--config FILE ...]\n")
        return 2
    # Objects of before the fork are never collected, so the collector does not copy their pages.
    gc.collect()
    gc.freeze()
    children: list[int] = []
    for file in files:
        child = os.fork()
        if child == 0:
            os._exit(_agent(file))
        children.append(child)

    def end(_signal: int, _frame: FrameType | None) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    sys.stdout.write(json.dumps({"pids": children}) + "\n")
    sys.stdout.flush()
    while children:
        # Only children that still are ours keep their number, so no other process is ever signalled.
        with suppress(ChildProcessError):
            ended, _ = os.wait()
            children.remove(ended)
    return 0


def _agent(file: str) -> int:
    status = 1
    try:
        status = run_one(["--config", file])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
