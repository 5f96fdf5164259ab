"""A webhook receiver in a process of its own: it knows an address, a secret and a public key, and nothing else.

Every delivery must carry two good signatures: ``v1`` (HMAC), verified by the ``standardwebhooks`` package, and ``v1a``
(Ed25519), verified by ``cryptography``. What was verified goes to a journal, one JSON line each, flushed before the
answer; what was not is a line with ``error`` and an answer of 401. ``compare`` holds the journal against the list that
the independent checker made from the log: every event, once, under one id.

Run: ``python -m demo.receiver serve --listen 127.0.0.1:8443 --certificate c.pem --key k.pem --secrets secrets.json
--journal journal.jsonl`` and ``python -m demo.receiver compare --journal journal.jsonl --expected result.json``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import ssl
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook, WebhookVerificationError


def verify(secret: str, public_key: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """The event, or ``ValueError`` that says which signature is missing or wrong."""
    lowered = {name.lower(): value for name, value in headers.items()}
    try:
        event = Webhook(secret).verify(body.decode(), lowered)
    except WebhookVerificationError as error:
        raise ValueError(f"v1: {error}") from error
    signed = f"{lowered['webhook-id']}.{lowered['webhook-timestamp']}.".encode() + body
    asymmetric = [part[4:] for part in lowered["webhook-signature"].split() if part.startswith("v1a,")]
    if not asymmetric:
        raise ValueError("v1a: no such signature")
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key.removeprefix("whpk_")))
    if not any(_signed_with(key, signature, signed) for signature in asymmetric):  # two while a secret rotates
        raise ValueError("v1a: wrong signature")
    if not isinstance(event, dict):
        raise ValueError("the body is not an object")  # noqa: TRY004 - all that is wrong with a delivery is a ValueError
    return event


def _signed_with(key: Ed25519PublicKey, signature: str, signed: bytes) -> bool:
    try:
        key.verify(base64.b64decode(signature), signed)
    except InvalidSignature:
        return False
    return True


def make_app(secrets: Path, journal: Path) -> web.Application:
    """The secrets file is read at each delivery: it appears when the endpoint has been created."""

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        if not secrets.exists():
            return web.Response(status=503)  # asked whether it wants webhooks before it was told how they are signed
        known = json.loads(secrets.read_text())
        line: dict[str, Any] = {"webhook_id": request.headers.get("webhook-id", "")}
        try:
            event = verify(known["secret"], known["public_key"], dict(request.headers), body)
            line |= {"event_id": event["event_id"], "type": event["type"]}
            status = 204
        except (ValueError, KeyError) as error:
            line["error"] = f"{type(error).__name__}: {error}"
            status = 401
        with journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if status == 204 and event["type"] == "webhook.test_fire":
            return web.json_response({"challenge": event["data"]["challenge"]})
        return web.Response(status=status)

    app = web.Application(client_max_size=128 * 1024)
    app.router.add_post("/hooks", receive)
    return app


def compare(journal: Path, expected: dict[str, str]) -> tuple[list[str], int]:
    """Problems found, and how many distinct events arrived. ``expected`` maps event id to type."""
    problems: list[str] = []
    ids: dict[str, set[str]] = defaultdict(set)
    types: dict[str, str] = {}
    for text in journal.read_text().splitlines() if journal.exists() else ():
        line = json.loads(text)
        if "error" in line:
            problems.append(f"{line['webhook_id']}: {line['error']}")
            continue
        ids[line["event_id"]].add(line["webhook_id"])
        types[line["event_id"]] = line["type"]
    problems += [f"missing: {kind} {event}" for event, kind in expected.items() if event not in ids]
    problems += [f"one event under {len(names)} ids: {event}" for event, names in ids.items() if len(names) > 1]
    problems += [f"wrong type: {event}" for event, kind in expected.items() if event in types and types[event] != kind]
    problems += [
        f"unknown event: {event}" for event in ids if event not in expected and not types[event].startswith("webhook.")
    ]
    return problems, len(ids)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Receive and verify webhooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="receive until terminated")
    serve.add_argument("--listen", required=True)
    serve.add_argument("--certificate", required=True)
    serve.add_argument("--key", required=True)
    serve.add_argument("--secrets", type=Path, required=True)
    serve.add_argument("--journal", type=Path, required=True)
    check = commands.add_parser("compare", help="hold the journal against the checker's list")
    check.add_argument("--journal", type=Path, required=True)
    check.add_argument("--expected", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        expected = json.loads(arguments.expected.read_text())["webhook_events"]
        problems, received = compare(arguments.journal, expected)
        for problem in problems[:20]:
            print(f"FAIL {problem}")
        print(f"{received} events received, {len(expected)} expected, {len(problems)} problems")
        return 1 if problems or not expected else 0
    host, _, port = arguments.listen.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.certificate, arguments.key)
    web.run_app(
        make_app(arguments.secrets, arguments.journal), host=host, port=int(port), ssl_context=context, print=None
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
