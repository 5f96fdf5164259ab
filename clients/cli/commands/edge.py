"""What a device gateway of one's own asks, for trying it by hand: docs/own-gateway.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from groundswell.rollout.v1 import edge_pb2

from clients.cli.context import session

M = TypeVar("M", bound=Message)

edge = typer.Typer(help="Calls of a device gateway of your own.", no_args_is_help=True)
FileOption = Annotated[Path, typer.Option("--file", "-f", help="JSON of the request.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(edge, name="edge")


def _read(file: Path, into: M) -> M:
    try:
        ParseDict(json.loads(file.read_text()), into)
    except (ParseError, ValueError) as error:
        raise typer.BadParameter(f"{file} is not the JSON of a request: {error}") from None
    return into


@edge.command("claim")
def edge_claim(context: typer.Context, gateway: str, file: FileOption) -> None:
    """Claim offers for devices of the product.

    Example: `swell edge claim edge --file claims.json` with `{"items": [{"device": "…", "candidates": [{"release":
    "…"}], "check_in": {"device": "…", "instance": "…", "counter": "1", "body_sha256": "<base64>"}}]}`
    """
    state = session(context)
    request = _read(file, edge_pb2.EdgeClaimOffersRequest())
    request.parent = request.parent or state.product_name()
    request.gateway = state.name_in_organization("gateways", gateway)
    state.output.one(state.client.edge.ClaimOffers(request))


@edge.command("go")
def edge_go(context: typer.Context, gateway: str, attempt: str, file: FileOption) -> None:
    """Ask whether a device may switch slots now.

    Example: `swell edge go edge …/devices/SN-0042/attempts/… --file check-in.json` with `{"check_in": {"device": "…",
    "instance": "…", "counter": "2", "body_sha256": "<base64>"}}`
    """
    state = session(context)
    request = _read(file, edge_pb2.EdgeAuthorizeSwitchRequest())
    request.gateway = state.name_in_organization("gateways", gateway)
    request.attempt = attempt
    request.device = request.device or attempt.partition("/attempts/")[0]
    state.output.one(state.client.edge.AuthorizeSwitch(request))
