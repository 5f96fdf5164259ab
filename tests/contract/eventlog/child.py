"""One replica in a process of its own, to be killed: `python -m tests.contract.eventlog.child BOOTSTRAP ENV`.

It leads, says so, writes one value under a fixed request id, says so, and waits for the end.
"""

from __future__ import annotations

import asyncio
import sys

from libs.eventlog import Command, Deadline, Runtime, RuntimeConfig, failpoints
from libs.eventlog.kafka import KafkaLog
from tests.contract.eventlog.support import HOME, ORGANIZATION, KeyValue, Put

REQUEST_ID = "killed-in-the-middle"


async def main(bootstrap: str, env: str, points: str) -> None:
    runtime = Runtime(KeyValue(), KafkaLog(bootstrap), RuntimeConfig(env=env, partitions=4, address="child"))
    await runtime.start()
    await runtime.wait_leading(Deadline.after(20), [HOME])
    print("leading", flush=True)
    failpoints.arm(points)
    done = await runtime.submit(
        Command(ORGANIZATION, Put("a", "from the child"), principal="p", request_id=REQUEST_ID), Deadline.after(10)
    )
    print(f"answered {done.token}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
