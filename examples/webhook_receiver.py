"""A complete receiver of Groundswell webhooks: one file, to be copied.

    python examples/webhook_receiver.py --listen 127.0.0.1:8443 --certificate server.pem --key server.key

It reads its secrets from the environment, with spaces between: ``WEBHOOK_SECRETS`` holds one or more ``whsec_…``, and
``WEBHOOK_PUBLIC_KEYS`` one or more ``whpk_…``. Either is enough. While a secret rotates, put both in, and take the old
one out later.

What a receiver must do, and where it is below:

1. Verify a signature over the *bytes* that arrived, in constant time, before it parses them (``verify``).
2. Refuse what is more than five minutes off its own clock: a captured delivery is worthless later (``TOLERANCE_S``).
3. Remember ids: a delivery comes at least once, and each repetition has the same ``webhook-id`` (``Seen``).
4. Answer 2xx quickly and work afterwards; anything else is a failure and comes again.
5. Repeat the challenge of ``webhook.test_fire``: that is how this address proves that it wants deliveries.

It needs ``aiohttp``, and ``cryptography`` for ``v1a`` signatures.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import os
import ssl
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE_S = 300
REMEMBERED = 100_000
MAX_BODY = 128 * 1024


class NotVerifiedError(Exception):
    """The request is not a delivery that we can trust; the text says why, for our own log only."""


def verify(
    headers: Mapping[str, str],
    body: bytes,
    *,
    secrets: Sequence[str] = (),
    public_keys: Sequence[str] = (),
    now_s: float | None = None,
) -> str:
    """The ``webhook-id`` of a genuine delivery. Raises :class:`NotVerifiedError`."""
    identifier, sent_at, signatures = (
        headers.get(name, "") for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
    )
    if not identifier or not signatures:
        raise NotVerifiedError("headers are missing")
    if not (sent_at.isascii() and sent_at.isdigit() and len(sent_at) < 12):
        raise NotVerifiedError("the timestamp is no number")
    if abs((time.time() if now_s is None else now_s) - int(sent_at)) > TOLERANCE_S:
        raise NotVerifiedError("too old, or from the future")
    signed = f"{identifier}.{sent_at}.".encode() + body
    for part in signatures.split(" "):
        kind, _, text = part.partition(",")
        try:
            signature = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue
        if kind == "v1" and any(_hmac_matches(secret, signed, signature) for secret in secrets):
            return identifier
        if kind == "v1a" and any(_ed25519_matches(key, signed, signature) for key in public_keys):
            return identifier
    raise NotVerifiedError("no signature of ours")


def _hmac_matches(secret: str, signed: bytes, signature: bytes) -> bool:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return hmac.compare_digest(hmac.digest(key, signed, hashlib.sha256), signature)


def _ed25519_matches(public_key: str, signed: bytes, signature: bytes) -> bool:
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key.removeprefix("whpk_")))
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


class Seen:
    """The latest ids. In earnest this is a unique column beside the effect, written in the same transaction."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._most = most

    def is_new(self, identifier: str) -> bool:
        """Whether it is here for the first time."""
        if identifier in self._ids:
            return False
        self._ids[identifier] = None
        if len(self._ids) > self._most:
            self._ids.popitem(last=False)
        return True


def make_app(
    secrets: Sequence[str], public_keys: Sequence[str], handle: Callable[[dict[str, Any]], None]
) -> web.Application:
    """``handle`` gets each event once."""
    seen = Seen()
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        try:
            identifier = verify(request.headers, body, secrets=secrets, public_keys=public_keys)
        except NotVerifiedError as problem:
            print(f"refused: {problem}", file=sys.stderr)
            return web.Response(status=401)
        event = json.loads(body)
        if event["type"] == "webhook.test_fire":
            return web.json_response({"challenge": event["data"]["challenge"]})
        if seen.is_new(identifier):
            queue.put_nowait(event)
        return web.Response(status=204)

    async def work(_: web.Application) -> Any:
        async def forever() -> None:
            while True:
                handle(await queue.get())

        worker = asyncio.create_task(forever())
        yield
        worker.cancel()

    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_post("/hooks", receive)
    app.cleanup_ctx.append(work)
    return app


def show(event: dict[str, Any]) -> None:
    """The place of your own code."""
    print(event["timestamp"], event["type"], event["resource"], flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Receive and verify Groundswell webhooks.")
    parser.add_argument("--listen", default="127.0.0.1:8443")
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    arguments = parser.parse_args()
    secrets = os.environ.get("WEBHOOK_SECRETS", "").split()
    public_keys = os.environ.get("WEBHOOK_PUBLIC_KEYS", "").split()
    if not secrets and not public_keys:
        parser.error("set WEBHOOK_SECRETS or WEBHOOK_PUBLIC_KEYS")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.certificate, arguments.key)
    host, _, port = arguments.listen.rpartition(":")
    web.run_app(make_app(secrets, public_keys, show), host=host, port=int(port), ssl_context=context, print=None)


if __name__ == "__main__":
    main()
