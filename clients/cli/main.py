"""``swell``: every public API of Groundswell from the command line.

Names may be full (`organizations/acme/products/thermostat/cohorts/beta`) or short (`beta`) with `--organization` and
`--product`, or GROUNDSWELL_ORGANIZATION and GROUNDSWELL_PRODUCT. `--output json` may stand anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clients.cli.commands import (
    access,
    artifacts,
    doctor,
    edge,
    fleet,
    imports,
    library,
    overrides,
    pki,
    releases,
    resources,
    rollouts,
    webhooks,
)
from clients.cli.context import Session
from clients.cli.output import show_error
from clients.sdk import ApiError, SdkError


class Root(TyperGroup):
    """Takes `--output` behind the command too, where most people write it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoisted(args))


def hoisted(args: Sequence[str]) -> list[str]:
    """The option on the form of output first, wherever it stands; what follows ``--`` is left alone."""
    end = args.index("--") if "--" in args else len(args)
    first: list[str] = []
    others: list[str] = []
    words = iter(args[:end])
    for word in words:
        if word in ("--output", "-o"):
            first += [word, *islice(words, 1)]
        elif word.startswith("--output=") or word in ("-ojson", "-otable"):
            first.append(word)
        else:
            others.append(word)
    return [*first, *others, *args[end:]]


app = typer.Typer(
    name="swell",
    cls=Root,
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


class Form(StrEnum):
    """Output forms."""

    TABLE = "table"
    JSON = "json"


@app.callback()
def setup(
    context: typer.Context,
    output: Annotated[Form, typer.Option("--output", "-o", help="How results are written.")] = Form.TABLE,
    profile: Annotated[
        Path | None, typer.Option(envvar="GROUNDSWELL_PROFILE", help="Profile file written by `make up`.")
    ] = None,
    key: Annotated[str, typer.Option("--key", "-k", help="Name of a key in the profile, see `swell auth list`.")] = "",
    organization: Annotated[
        str, typer.Option("--organization", "-O", envvar="GROUNDSWELL_ORGANIZATION", help="Default organization.")
    ] = "",
    product: Annotated[
        str, typer.Option("--product", "-P", envvar="GROUNDSWELL_PRODUCT", help="Default product.")
    ] = "",
) -> None:
    """Options for every command."""
    context.obj = Session(profile, output.value, key, organization, product)


access.register(app)
fleet.register(app)
imports.register(app)
pki.register(app)
artifacts.register(app)
library.register(app)
releases.register(app)
overrides.register(app)
rollouts.register(app)
edge.register(app)
webhooks.register(app)
resources.register(app)
doctor.register(app)


def run() -> None:
    """Run the command line; refused calls end with status 1 and one clear error."""
    form = (
        "json"
        if any(argument in ("--output=json", "-ojson") for argument in sys.argv)
        or ("json" in sys.argv and any(argument in ("--output", "-o") for argument in sys.argv))
        else "table"
    )
    try:
        app(prog_name="swell")
    except (ApiError, SdkError, OSError) as error:
        show_error(error, form)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
