"""Batch work: for the process, and for what it starts afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, subprocess, sys, threading
from libs.scheduling import prefer_throughput
{spoilt}
prefer_throughput()
policies = [os.sched_getscheduler(0)]
thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
child = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
policies.append(int(subprocess.run(child, capture_output=True, check=True).stdout))
print({{os.SCHED_BATCH: "batch", os.SCHED_OTHER: "other"}}[policies[0]], len(set(policies)))
"""
FORBIDDEN = """
def refused(*_):
    raise PermissionError
os.sched_setscheduler = refused
"""


def run(spoilt: str = "") -> str:
    command = [sys.executable, "-c", PROGRAM.format(spoilt=spoilt)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()


def test_threads_and_children_are_batch_work_too() -> None:
    assert run() == "batch 1"


def test_what_the_system_does_not_allow_is_left_alone() -> None:
    assert run(FORBIDDEN) in {"other 1", "batch 1"}  # whoever runs the tests may be batch work already
