"""`swell import`: many devices from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.message import Message
from groundswell.registry.v1 import device_imports_pb2 as pb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from clients.cli.context import Session, session
from clients.cli.output import to_dict
from clients.sdk.device_import import DeviceImportJob

SHOWN: Final = 50
"""Problems shown in a table; `swell import verdicts` lists all."""

import_ = typer.Typer(help="Imports of devices.", no_args_is_help=True)

ProductOption = Annotated[str, typer.Option("--product", help="Product; default: that of `swell -P`.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(import_, name="import")


@contextmanager
def _bars(state: Session) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress bars on stderr, one for each step; none for programs that read JSON."""
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=state.output.form == "json") as bars:

        def bar(title: str) -> Callable[[int, int], None]:
            task = bars.add_task(title, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


@import_.command("devices")
def import_devices(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="CSV file.", exists=True, dir_okay=False)],
    product: ProductOption = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge every row, create nothing.")] = False,
    skip_problems: Annotated[bool, typer.Option(help="Leave rows with problems out instead of stopping.")] = False,
) -> None:
    """Import devices from a CSV file with the columns identifier, description, tags (separated by `;`), cohort, target.

    Run it again when it broke off: it goes on where it was. Ends with status 1 when rows had problems.

    Example: `swell -O acme import devices devices.csv --product thermostat --dry-run`
    """
    state = session(context)
    job = DeviceImportJob.of_file(state.client, state.product_name(product), file)
    with _bars(state) as bar:
        image = job.upload(bar("upload"))
        if image.state != pb.DeviceImport.STATE_COMMITTING:
            image = job.validate(bar("dry run"))
        if not dry_run and (skip_problems or not image.problem_count):
            image = job.commit(skip_problems=skip_problems, progress=bar("commit"))
    _show(state, job, image)
    committed = image.state == pb.DeviceImport.STATE_COMPLETED
    raise typer.Exit(int(bool(image.failed_count if committed else image.problem_count) and not skip_problems))


def _show(state: Session, job: DeviceImportJob, image: pb.DeviceImport) -> None:
    problems = list(islice(job.problems(), SHOWN + 1))
    if state.output.form == "json":
        json.dump({**to_dict(image), "problems": [to_dict(one) for one in problems[:SHOWN]]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    state.output.one(image)
    if problems:
        state.output.many(problems[:SHOWN], ("row", "identifier", "code", "detail"))
    if len(problems) > SHOWN:
        state.output.console.print(f"and more: `swell import verdicts {image.name}`", highlight=False)


def _name(state: Session, given: str) -> str:
    return state.name_in_product("deviceImports", given)


def _one(context: typer.Context, method: str, request: Message) -> None:
    state = session(context)
    call: Any = getattr(state.client.registry, method)
    state.output.one(call(request))


@import_.command("verdicts")
def import_verdicts(
    context: typer.Context,
    name: str,
    all_rows: Annotated[bool, typer.Option("--all", help="Good rows too; between dry run and commit.")] = False,
) -> None:
    """What became of the rows of an import. Example: `swell -P thermostat import verdicts csv-0a1b2c`."""
    state = session(context)
    request = pb.ListDeviceImportVerdictsRequest(parent=_name(state, name), all_rows=all_rows, page_size=1_000)
    found = state.client.pages(state.client.registry.ListDeviceImportVerdicts, request, "verdicts")
    state.output.many(found, ("row", "identifier", "code", "detail"))


@import_.command("cancel")
def import_cancel(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Stop an import; devices that were created stay. Example: `swell -P thermostat import cancel csv-0a1b2c`."""
    _one(context, "CancelDeviceImport", pb.CancelDeviceImportRequest(name=_name(session(context), name), reason=reason))


@import_.command("delete")
def import_delete(context: typer.Context, name: str) -> None:
    """Forget an import that has ended. Example: `swell -P thermostat import delete csv-0a1b2c`."""
    state = session(context)
    full = _name(state, name)
    state.client.registry.DeleteDeviceImport(pb.DeleteDeviceImportRequest(name=full))
    state.output.text(f"{full} is deleted", deleted=full)
