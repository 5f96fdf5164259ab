"""Calling the firmware of a slot: a child in a process group of its own, killed whole when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SAID = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to; ``code`` is empty when it went well."""

    code: str = ""
    detail: str = ""


def call(program: Path, action: str, timeout_s: float, environment: Mapping[str, str]) -> Outcome:
    """Run `run --boot SLOT` or `run --health SLOT`. Never leaves a process behind, also when interrupted."""
    slot = program.parent
    verdict = "BOOT_FAILED" if action == "boot" else "UNHEALTHY"
    try:
        child = subprocess.Popen(
            [str(program), f"--{action}", str(slot)],
            cwd=slot,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(verdict, f"the program cannot be started: {error.strerror}")
    try:
        output, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Outcome("BOOT_TIMED_OUT" if action == "boot" else "HEALTH_TIMED_OUT", f"no end within {timeout_s:g} s")
    finally:
        # Its time is up, or ours. An ended child is left alone: its number may be another process's by now.
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
    if child.returncode == 0:
        return Outcome()
    # Paths of the device say nothing to the server.
    said = output.decode("utf-8", "replace").replace(f"{slot}/", "").strip().partition("\n")[0][:_SAID]
    return Outcome(verdict, f"status {child.returncode}: {said}")
