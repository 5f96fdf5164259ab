"""The load tool: devices over keep-alive mutual TLS, as fast as they are answered.

    python -m bench.device_load SPEC.json      # reads lines "<port> <seconds>" from stdin, writes a JSON line for each

`wrk` cannot present a client certificate, and a body that rises from request to request is beyond `ab` and `h2load`, so
this is a small tool of our own: one process, uvloop, one asyncio protocol for each connection, prebuilt requests whose
counter is all that changes, answers recognised by their length. Every connection has one request under way. Its own
ceiling is measured in every run, against a server that answers without reading.
"""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Final

import uvloop

FIRST_COUNTER: Final = 1_000_000_000
"""All counters have as many digits, so that a request's length never changes."""


class Device(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: Load, identity: dict[str, Any]) -> None:
        self._load = load
        instance, boot = uuid.uuid5(uuid.NAMESPACE_OID, f"{identity['certificate']}"), uuid.uuid4()
        body = (
            f'{{"agent":{{"instance":"{instance}","boot_id":"{boot}","counter":%d}},'
            '"running":{"version":"1.0.0","slot":"a","security_version":1}}'
        )
        length = len(body % FIRST_COUNTER)
        head = (
            f"POST /v1/checkin HTTP/1.1\r\nHost: {load.server_name}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n"
        )
        self._request = (head + body).encode()
        self._got = b""
        self._sent_at = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def go(self) -> None:
        self._load.counter += 1
        self._sent_at = time.perf_counter()
        self._transport.write(self._request % self._load.counter)

    def data_received(self, data: bytes) -> None:
        got = self._got + data if self._got else data
        end = got.find(b"\r\n\r\n")
        if end < 0:
            self._got = got
            return
        at = got.find(b"ontent-Length: ")
        wanted = end + 4 + int(got[at + 15 : got.find(b"\r", at)])
        if len(got) < wanted:
            self._got = got
            return
        self._got = b""
        self._load.answered(got, time.perf_counter() - self._sent_at)
        if self._load.on:
            self.go()
        else:
            self._load.quiet()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._load.lost += 1


class Load:
    """All connections of one port."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.server_name: str = spec["server_name"]
        self._spec = spec
        self.counter = FIRST_COUNTER
        self.on = False
        self.lost = self.ok = self.other = 0
        self.sample = b""
        self._times: list[float] = []
        self._open = 0
        self._idle = asyncio.Event()

    def answered(self, answer: bytes, took: float) -> None:
        self._times.append(took)
        if answer.startswith(b"HTTP/1.1 200") and b'"answer":"none"' in answer and b"try later" not in answer:
            self.ok += 1
        else:
            self.other += 1
            self.sample = answer

    def quiet(self) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()

    async def connect(self, port: int) -> list[Device]:
        loop = asyncio.get_running_loop()
        devices = []
        for identity in self._spec["identities"]:
            context = ssl.create_default_context(cafile=self._spec["ca"])
            context.load_cert_chain(identity["certificate"], identity["key"])
            _, device = await loop.create_connection(
                lambda identity=identity: Device(self, identity),  # type: ignore[misc]
                "127.0.0.1",
                port,
                ssl=context,
                server_hostname=self.server_name,
            )
            devices.append(device)
        return devices

    async def run(self, devices: list[Device], seconds: float) -> dict[str, Any]:
        self.ok = self.other = 0
        self._times.clear()
        self._idle.clear()
        self._open = len(devices)
        used = resource.getrusage(resource.RUSAGE_SELF)
        began = time.perf_counter()
        self.on = True
        for device in devices:
            device.go()
        await asyncio.sleep(seconds)
        self.on = False
        await self._idle.wait()
        spent = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        times = sorted(self._times)
        return {
            "rate": self.ok / spent,
            "ok": self.ok,
            "other": self.other,
            "lost": self.lost,
            "cores": cpu / spent,
            "p50_ms": times[len(times) // 2] * 1000,
            "p99_ms": times[len(times) * 99 // 100] * 1000,
            "sample": self.sample[-300:].decode("utf-8", "replace"),
        }


async def main(spec: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    loads: dict[int, tuple[Load, list[Device]]] = {}
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        port, seconds = line.split()
        if int(port) not in loads:
            load = Load(spec)
            loads[int(port)] = (load, await load.connect(int(port)))
        load, devices = loads[int(port)]
        print(json.dumps(await load.run(devices, float(seconds))), flush=True)


if __name__ == "__main__":
    uvloop.run(main(json.loads(Path(sys.argv[1]).read_text())))
