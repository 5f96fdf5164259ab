"""What check-ins are compared with: one process, uvloop, mutual TLS as the gateway has it, and next to nothing more.

    python -m bench.bare_https SPEC.json aiohttp|raw PORT

`aiohttp` reads the body and answers a fixed one as long as the gateway's; `raw` answers each read of the socket with
the bytes of such an answer, without looking: it shows what the load tool can do.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

ANSWER = json.dumps(
    {
        "server_time": "2026-01-01T00:00:00.000000Z",
        "poll_after_s": 60.123,
        "reports_accepted_through": 0,
        "reasons": [{"code": "NO_RELEASES", "message": "the cohort has no releases: create one", "subject": "x" * 60}],
        "answer": "none",
    },
    separators=(",", ":"),
).encode()


class Raw(asyncio.Protocol):
    """Answers without reading."""

    def connection_made(self, transport: Any) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n"
        self._transport, self._answer = transport, head.encode() + ANSWER

    def data_received(self, _data: bytes) -> None:
        self._transport.write(self._answer)


async def check_in(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=ANSWER, content_type="application/json")


def context_of(spec: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(spec["server_certificate"], spec["server_key"])
    context.load_verify_locations(spec["device_ca"])
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def main(spec: dict[str, Any], kind: str, port: int) -> None:
    if kind == "aiohttp":
        app = web.Application()
        app.router.add_post("/v1/checkin", check_in)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context_of(spec)).start()
    else:
        await asyncio.get_running_loop().create_server(Raw, "127.0.0.1", port, ssl=context_of(spec))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])))
