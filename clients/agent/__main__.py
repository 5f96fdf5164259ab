"""`python -m clients.agent --config FILE`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from clients.agent.agent import Agent
from clients.agent.config import load
from clients.agent.log import Log
from clients.device.errors import DeviceError


class _EndError(SystemExit):
    """SIGTERM. Raised wherever the agent is: every point of it is safe to be killed at, so also to leave."""


def _end(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _EndError(0)


def main(arguments: list[str]) -> int:
    """Status 0 after SIGTERM, 1 when the agent cannot work, 2 for a wrong command line."""
    if len(arguments) != 2 or arguments[0] != "--config":
        sys.stderr.write("usage: python -m clients.agent --config FILE\n")
        return 2
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    log = Log()
    try:
        config = load(Path(arguments[1]))
        log = Log(config.log)
        Agent(config, log).run()
    except DeviceError as error:
        log("ended", reason=error.reason, message=error.message)
        return 1
    except _EndError:
        log("ended", reason="SIGTERM")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
