"""How long a stop takes to hold, with a thousand devices asking: the last request that was still let through.

    python -m bench.stops [--devices 1000] [--trials 5]

All devices poll once a second over kept connections. Two stops, each again and again: the CA of all of them is
suspended (no check-in may be accepted), and a rollout is paused while it gives out offers (none may be given out, nor
repeated). What counts is when a request was sent that still succeeded, after the operator's call was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import uvloop
from groundswell.pki.v1 import pki_pb2
from groundswell.rollout.v1 import rollout_pb2

from bench.cycles import Device, started
from bench.installation import enrolled, running, tenant_of, what_else_ran
from demo.factory import Identity
from tests.e2e.tenant import Tenant

POLL_S: Final = 1.0
SETTLE_S: Final = 3 * POLL_S
"""In which every device asks at least twice."""
LONGEST_S: Final = 60.0


@dataclass
class Fleet:
    """Devices that poll, and what they were answered."""

    devices: list[Device]
    heard: list[tuple[float, str]] = field(default_factory=list)
    """When each request was sent, and the answer's kind or the reason of its refusal."""

    async def poll(self, device: Device) -> None:
        await asyncio.sleep(random.random() * POLL_S)
        while True:
            sent = time.perf_counter()
            answer = await device.say()
            self.heard.append((sent, answer.answer if answer.error is None else answer.error.reason))
            await asyncio.sleep(max(0.0, sent + POLL_S - time.perf_counter()))

    def last(self, let_through: Callable[[str], bool]) -> float:
        """When the last request was sent that was let through."""
        return max((sent for sent, kind in self.heard if let_through(kind)), default=0.0)

    async def until(self, kind: str, share: float) -> None:
        """Until so many of the devices were answered so within a poll."""
        async with asyncio.timeout(LONGEST_S):
            while True:
                since = time.perf_counter() - POLL_S
                recent = Counter(heard for sent, heard in self.heard if sent > since)
                if recent[kind] >= share * len(self.devices):
                    return
                await asyncio.sleep(0.02)


async def suspended(tenant: Tenant, fleet: Fleet) -> float:
    """Seconds until no check-in under a suspended CA was accepted any more."""
    ca = f"{tenant.product}/caCertificates/factory"
    await fleet.until("none", 0.8)
    fleet.heard.clear()
    await asyncio.to_thread(tenant.client.pki.SuspendCaCertificate, pki_pb2.SuspendCaCertificateRequest(name=ca))
    acknowledged = time.perf_counter()
    await asyncio.sleep(SETTLE_S)
    if not any(kind == "CA_SUSPENDED" for _, kind in fleet.heard):
        raise SystemExit(f"stops: nobody was refused: {Counter(kind for _, kind in fleet.heard)}")
    bound = fleet.last(lambda kind: kind != "CA_SUSPENDED") - acknowledged
    await asyncio.to_thread(tenant.client.pki.ResumeCaCertificate, pki_pb2.ResumeCaCertificateRequest(name=ca))
    return max(0.0, bound)


async def paused(tenant: Tenant, fleet: Fleet, trial: int) -> tuple[float, int]:
    """Seconds until no offer was given out any more, and how many had been."""
    await fleet.until("none", 0.8)
    bundle = await asyncio.to_thread(tenant.bundle, f"1.{trial + 1}.{secrets.randbelow(1000)}")
    name = await asyncio.to_thread(started, tenant, bundle, len(fleet.devices))
    fleet.heard.clear()
    await fleet.until("offer", 0.3)
    await asyncio.to_thread(tenant.client.rollout.PauseRollout, rollout_pb2.PauseRolloutRequest(name=name))
    acknowledged = time.perf_counter()
    offers = sum(kind == "offer" for _, kind in fleet.heard)
    await asyncio.sleep(SETTLE_S)
    bound = fleet.last(lambda kind: kind == "offer") - acknowledged
    await asyncio.to_thread(tenant.client.rollout.AbortRollout, rollout_pb2.AbortRolloutRequest(name=name))
    return max(0.0, bound), offers


async def stops(tenant: Tenant, identities: list[Identity], trials: int) -> tuple[list[float], list[float], list[int]]:
    fleet = Fleet([Device(tenant, identity) for identity in identities])
    for device in fleet.devices:
        await device.connect()
    polling = [asyncio.create_task(fleet.poll(device)) for device in fleet.devices]
    cas: list[float] = []
    rollouts: list[float] = []
    offers: list[int] = []
    try:
        for trial in range(trials):
            cas.append(await suspended(tenant, fleet))
            bound, given = await paused(tenant, fleet, trial)
            rollouts.append(bound)
            offers.append(given)
        ended: Any = [one for one in polling if one.done()]
        if ended:
            raise SystemExit(f"stops: {len(ended)} devices gave up: {ended[0].exception()!r}")
    finally:
        for one in polling:
            one.cancel()
        await asyncio.gather(*polling, return_exceptions=True)
    return cas, rollouts, offers


def main(devices: int, trials: int) -> None:
    with running() as stack, tenant_of(stack) as tenant:
        identities = enrolled(tenant, [f"canary-{number}" for number in range(devices)])
        cas, rollouts, offers = uvloop.run(stops(tenant, identities, trials))
        print(
            f"stops: {devices} devices poll once a second; after a CA was suspended the last check-in was accepted "
            f"{max(cas) * 1000:.0f} ms after the answer (worst of {trials}, "
            f"median {statistics.median(cas) * 1000:.0f}); "
            f"after a rollout was paused amid {min(offers)} to {max(offers)} offers the last one was given out "
            f"{max(rollouts) * 1000:.0f} ms after (median {statistics.median(rollouts) * 1000:.0f}); "
            f"{what_else_ran()}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--kafka", help="not used: the benchmark brings an installation of its own")
    arguments = parser.parse_args(sys.argv[1:])
    main(arguments.devices, arguments.trials)
