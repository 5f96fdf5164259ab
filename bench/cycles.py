"""Whole update cycles of devices: check-in, grant, three reports, go, confirmation; and downloads through the redirect.

    python -m bench.cycles [--devices 3000] [--rounds 3] [--megabytes 16]

Cycles: all devices but one of an open stage begin at once, each over its own kept connection, and say the next thing
as soon as the last was answered and taken by the log. The rate is devices by the time until the last has said
CONFIRMED, with everything, this tool too, on the cores of one machine. Downloads: the same file by a fresh redirect
each time, against the same link of the object store read again and again, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import resource
import secrets
import ssl
import statistics
import sys
import time
import uuid
from collections.abc import Generator
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import uvloop
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.rollout.v1 import rollout_pb2
from msgspec.json import encode

from bench.installation import enrolled, running, tenant_of, what_else_ran
from clients.sdk.signing import sign_bundle
from demo.factory import Identity
from tests.e2e.device import RawDevice
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant, seconds

RETRY_S: Final = 0.05
LONGEST_S: Final = 300.0


def started(tenant: Tenant, bundle: artifacts_pb2.Bundle, devices: int, cohort: str = "canary") -> str:
    """An open stage that holds nobody back."""
    stage = rollout_pb2.Stage(
        display_name="all",
        cohort=tenant.cohort(cohort),
        max_in_flight=devices * 2,
        gate=rollout_pb2.Gate(min_sample=devices, soak=seconds(1), dark_after=seconds(600), stall_after=seconds(3600)),
    )
    rollout = rollout_pb2.Rollout(
        bundle=bundle.name,
        stages=[stage],
        failure_action=rollout_pb2.Rollout.FAILURE_ACTION_PAUSE,
        attempt_policy=rollout_pb2.AttemptPolicy(lease=seconds(600), go_valid=seconds(60)),
    )
    created = tenant.client.rollout.CreateRollout(
        rollout_pb2.CreateRolloutRequest(parent=tenant.product, rollout_id=f"r{secrets.token_hex(3)}", rollout=rollout)
    )
    request = rollout_pb2.StartRolloutRequest(name=created.name, request_id=str(uuid.uuid4()))
    return str(tenant.client.rollout.StartRollout(request).name)


class Offer(msgspec.Struct):
    """What the tool needs of an offer."""

    attempt: str
    release: str
    bundle: str
    version: str
    security_version: int


class Refusal(msgspec.Struct):
    """Why a request was not answered."""

    reason: str


class Answer(msgspec.Struct):
    """What the tool needs of an answer, or of an error."""

    answer: str = ""
    error: Refusal | None = None
    reports_accepted_through: int = 0
    offer: Offer | None = None


Script = Generator[dict[str, Any] | float, Answer | None, None]
"""What a device does: it yields what to say, and is sent the answer; or yields how many seconds to wait."""


class Device(asyncio.Protocol):
    """A device that does as it is told, at once: the next request leaves with the arrival of the answer."""

    def __init__(self, tenant: Tenant, identity: Identity) -> None:
        self._tenant, self._identity = tenant, identity
        self._agent = {"instance": str(uuid.uuid4()), "boot_id": str(uuid.uuid4())}
        self._running: dict[str, Any] = {"version": "1.0.0", "slot": "a", "security_version": 1}
        self._counter = 1_000_000
        self._head = f"POST /v1/checkin HTTP/1.1\r\nHost: {tenant.server_name}\r\nContent-Length: ".encode()
        self._answers: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)
        self._got = b""
        self._awaited = 0
        self._script: Script | None = None
        self._done: asyncio.Future[None] | None = None

    async def connect(self) -> None:
        stack = self._tenant.stack
        context = ssl.create_default_context(cafile=str(stack.profile.ca))
        context.load_cert_chain(self._identity.certificate, self._identity.key)
        host, _, port = stack.profile.gateway.rpartition(":")
        self._loop = asyncio.get_running_loop()
        self._transport, _ = await self._loop.create_connection(
            lambda: self, host, int(port), ssl=context, server_hostname=self._tenant.server_name
        )

    def data_received(self, data: bytes) -> None:
        self._got += data
        while self._got:
            got = self._got
            end = got.find(b"\r\n\r\n") + 4
            at = got.find(b"ontent-Length: ") + 15
            if end < 4:
                return
            whole = end + int(got[at : got.find(b"\r", at)])
            if len(got) < whole:
                return
            self._got = got[whole:]
            self._awaited -= 1
            if not self._awaited:  # else it is that of a script that was given up
                self._next(self._answers.decode(got[end:whole]))

    def connection_lost(self, _exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the gateway closed the connection"))

    def play(self, script: Script) -> asyncio.Future[None]:
        """Begin; done when the script ends."""
        self._script, self._done = script, self._loop.create_future()
        self._next(None)
        return self._done

    def _next(self, answer: Answer | None) -> None:
        assert self._script is not None
        assert self._done is not None
        try:
            wish = self._script.send(answer)
        except StopIteration:
            if not self._done.done():
                self._done.set_result(None)
            return
        if isinstance(wish, float):
            self._loop.call_later(wish, self._next, None)
            return
        self._counter += 1
        self._awaited += 1
        raw = encode({"agent": {**self._agent, "counter": self._counter}, "running": self._running, **wish})
        self._transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(raw), raw))

    async def say(self) -> Answer:
        """One check-in with nothing to tell."""
        answers: list[Answer] = []

        def script() -> Script:
            answer = yield {}
            assert answer is not None
            answers.append(answer)

        await self.play(script())
        return answers[0]

    @staticmethod
    def _until(kind: str, **more: Any) -> Generator[dict[str, Any] | float, Answer | None, Answer]:
        while True:
            answer = yield more
            if answer is not None and answer.answer == kind:
                return answer
            yield RETRY_S

    def _report(self, attempt: str, state: str, /, **more: Any) -> Script:
        self._counter += 1
        counter = self._counter
        report = {"counter": counter, "attempt": attempt, "state": state}
        while True:
            answer = yield {"reports": [report], **more}
            if answer is not None and answer.reports_accepted_through >= counter:
                return
            yield RETRY_S

    def cycle(self) -> Script:
        """One update."""
        offer = (yield from self._until("offer")).offer
        assert offer is not None
        attempt = offer.attempt
        for state in ("ACCEPTED", "DOWNLOADED", "INSTALLED"):
            yield from self._report(attempt, state, attempt={"name": attempt})
        yield from self._until("go", attempt={"name": attempt, "ask": "go"})
        self._running = msgspec.structs.asdict(offer)
        del self._running["attempt"]
        yield from self._report(attempt, "CONFIRMED")


async def cycles(tenant: Tenant, identities: list[Identity], rounds: int) -> tuple[float, float]:
    """(median cycles a second, cores of this tool)."""
    devices = [Device(tenant, identity) for identity in identities]
    for device in devices:
        await device.connect()
    rates, cores = [], []
    for number in range(rounds + 1):
        bundle = await asyncio.to_thread(tenant.bundle, f"1.{number + 1}.0")
        name = await asyncio.to_thread(started, tenant, bundle, len(devices))
        await devices[0].play(devices[0].cycle())  # once it has an offer, the stage is open everywhere
        used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        async with asyncio.timeout(LONGEST_S):
            await asyncio.gather(*(device.play(device.cycle()) for device in devices[1:]))
        spent, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.to_thread(tenant.await_completion, name, LONGEST_S)
        if number:  # the first one warms up
            rates.append((len(devices) - 1) / spent)
            cores.append((after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime) / spent)
    return statistics.median(rates), statistics.median(cores)


# Downloads.


def large_offer(tenant: Tenant, device: RawDevice, megabytes: int) -> str:
    """The link of an offer of so many megabytes."""
    path = tenant.directory / "large.bin"
    path.write_bytes(secrets.token_bytes(megabytes << 20))
    binary = tenant.upload("9.0.0", path)
    created = tenant.client.artifacts.CreateBundle(
        artifacts_pb2.CreateBundleRequest(
            parent=tenant.product,
            bundle_id="fw-9-0-0",
            version="9.0.0",
            security_version=9,
            entries=[artifacts_pb2.BundleEntrySpec(binary=binary.name)],
        )
    )
    signature = sign_bundle(tenant.key(), created)
    bundle = tenant.client.artifacts.SignBundle(artifacts_pb2.SignBundleRequest(name=created.name, signature=signature))
    started(tenant, bundle, 1, "main")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        offer = device.check_in().body.get("offer")
        if offer is not None:
            return str(offer["binaries"][0]["url"])
        time.sleep(0.1)
    raise SystemExit("downloads: no offer came")


def downloads(stack: Stack, tenant: Tenant, identity: Identity, megabytes: int, rounds: int) -> tuple[float, float]:
    """Median MB/s through the redirect, and of the object store's own GET."""
    device = tenant.raw_device(identity)
    device.counter = 9_000_000
    url = large_offer(tenant, device, megabytes)
    host, _, port = stack.profile.gateway.rpartition(":")
    gateway = http.client.HTTPConnection(host, int(port))
    context = ssl.create_default_context(cafile=str(stack.profile.ca))
    context.load_cert_chain(identity.certificate, identity.key)
    gateway.connect()
    gateway.sock = context.wrap_socket(gateway.sock, server_hostname=tenant.server_name)
    store = http.client.HTTPConnection(urlsplit(stack.settings.s3).netloc)

    def link() -> str:
        gateway.request("GET", url)
        answer = gateway.getresponse()
        answer.read()
        if answer.status != 307:
            raise SystemExit(f"downloads: the gateway answered {answer.status}")
        return str(answer.headers["location"])

    def fetch(location: str) -> None:
        parts = urlsplit(location)
        store.request("GET", f"{parts.path}?{parts.query}", headers={"Host": parts.netloc})
        answer, size = store.getresponse(), 0
        while data := answer.read(1 << 20):
            size += len(data)
        if answer.status != 200 or size != megabytes << 20:
            raise SystemExit(f"downloads: the object store answered {answer.status} with {size} bytes")

    times: tuple[list[float], list[float]] = ([], [])
    known = link()
    fetch(known)
    for _ in range(rounds * 10):
        known = link()  # a link lives for a minute
        for through_gateway in (True, False):
            began = time.perf_counter()
            fetch(link() if through_gateway else known)
            times[not through_gateway].append(time.perf_counter() - began)
    through, direct = (megabytes / statistics.median(one) for one in times)
    return through, direct


def main(devices: int, rounds: int, megabytes: int) -> None:
    with running() as stack, tenant_of(stack) as tenant:
        # The last one is of the other cohort, to which nothing has been offered before.
        identities = enrolled(tenant, [*(f"canary-{number}" for number in range(devices)), "main-0"])
        rate, cores = uvloop.run(cycles(tenant, identities[:devices], rounds))
        print(
            f"cycles: {rate:,.0f} whole update cycles/s, {devices} devices at once (aim 1,000 on both cores); "
            f"load tool {cores:.2f} cores; {what_else_ran()}"
        )
        through, direct = downloads(stack, tenant, identities[devices], megabytes, rounds)
        print(
            f"downloads: {through:,.0f} MB/s through the gateway's redirect, "
            f"object store's own GET {direct:,.0f} MB/s, ratio {through / direct:.2f} (aim 0.90); "
            f"files of {megabytes} MB; {what_else_ran()}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--kafka", help="not used: the benchmark brings an installation of its own")
    arguments = parser.parse_args(sys.argv[1:])
    main(arguments.devices, arguments.rounds, arguments.megabytes)
