"""How results and errors look: tables for people, JSON for programs, one line and a next step for errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clients.sdk import ApiError

NEXT_STEPS: Final = {
    "UNAUTHENTICATED": "check the key: `swell auth list`, or set GROUNDSWELL_API_KEY",
    "CREDENTIALS_MISSING": "set GROUNDSWELL_API_KEY, or run `swell auth use NAME`",
    "API_KEY_EXPIRED": "make a new key: `swell key create`",
    "API_KEY_REVOKED": "make a new key: `swell key create`",
    "PERMISSION_MISSING": "ask an owner for a key with that scope: `swell key create --scope …`",
    "ETAG_MISMATCH": "somebody changed it meanwhile: read it again and repeat",
    "BUNDLE_NOT_OFFERABLE": "sign it first: `swell bundle sign`",
    "REQUEST_ID_REUSED": "use a new --request-id for a new command",
    "IMPORT_HAS_PROBLEMS": "see `swell import verdicts`; put the rows right, or leave them out with --skip-problems",
    "PRODUCT_HAS_DEVICES": "list them: `swell list devices`; retire them: `swell device retire`",
    "ROLE_IN_USE": "give those members another role: `swell member update`",
    "RESOURCE_IN_USE": "see what uses it; `swell binary destroy --force --reason …` destroys a binary all the same",
    "DEPENDENCY_UNSATISFIED": "add a binary of that artifact to the bundle",
    "COHORT_BUSY": "another rollout is active in that cohort: `swell rollout list`; an emergency takes --expedited",
    "NOTHING_TO_RETRY": "see what failed: `swell attempt list --rollout … --state FAILED`",
    "RETRY_BUDGET_SPENT": "look at the device, then reach it with a bundle override or another rollout",
    "STAGE_NOT_WAITING": "only a stage that awaits approval or is stalled is passed by hand: `swell rollout get …`",
    "MIN_SAMPLE_UNREACHABLE": "lower min, or raise count",
    "SIGNING_KEY_UNKNOWN": "register the public key: `swell signing-key register`",
    "ISSUING_CA_MISSING": "make one: `swell issuing-ca create`",
    "ISSUING_CA_EXISTS": "let another one take over: `swell issuing-ca rotate`",
    "PROOF_CODE_USED": "get a new code: `swell ca code`",
}


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how results are written."""

    form: str
    """``table`` or ``json``."""
    console: Console

    def one(self, message: Message) -> None:
        """A single resource."""
        if self.form == "json":
            self._json(to_dict(message))
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for key, value in to_dict(message).items():
            table.add_row(f"[bold]{key}[/bold]", _cell(value))
        self.console.print(table)

    def many(self, messages: Iterable[Message], columns: Sequence[str]) -> None:
        """A list of resources with the columns that matter."""
        rows = [to_dict(message) for message in messages]
        if self.form == "json":
            self._json(rows)
            return
        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column.upper(), overflow="fold")
        for row in rows:
            table.add_row(*(_cell(_dig(row, column)) for column in columns))
        self.console.print(table if rows else "nothing found")

    def rows(self, rows: Sequence[Mapping[str, str]]) -> None:
        """A table of plain texts, all with the same keys."""
        if self.form == "json":
            self._json([{key or "level": text for key, text in row.items()} for row in rows])
            return
        table = Table(box=None, pad_edge=False)
        for column in rows[0] if rows else ():
            table.add_column(column.upper(), overflow="fold")
        for row in rows:
            table.add_row(*(escape(text) for text in row.values()))
        self.console.print(table if rows else "nothing found")

    def text(self, line: str, **data: Any) -> None:
        """A sentence, or its data as JSON."""
        if self.form == "json":
            self._json(data)
        else:
            self.console.print(line)

    def _json(self, value: Any) -> None:
        json.dump(value, sys.stdout, indent=1)
        sys.stdout.write("\n")


def to_dict(message: Message) -> dict[str, Any]:
    """Proto JSON with our own field names."""
    return MessageToDict(message, preserving_proto_field_name=True)


def _dig(row: Any, path: str) -> Any:
    for part in path.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value) if not all(isinstance(item, str) for item in value) else ", ".join(value)
    return str(value)


def show_error(error: Exception, form: str) -> None:
    """One error on stderr, with what to do next where that is known."""
    console = Console(stderr=True)
    if not isinstance(error, ApiError):
        _write_error(console, form, {"message": str(error)}, str(error), "")
        return
    next_step = NEXT_STEPS.get(error.reason, "")
    if not next_step and error.code == "UNAVAILABLE":
        next_step = "is it running? `make up` starts everything, `make status` says what runs"
    document = {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "metadata": dict(error.metadata),
        "fields": dict(error.fields),
    }
    text = f"{error.message} [{error.reason or error.code}]"
    for field, problem in error.fields.items():
        text += f"\n  {field}: {problem}"
    _write_error(console, form, document, text, next_step)


def _write_error(console: Console, form: str, document: dict[str, Any], text: str, next_step: str) -> None:
    if form == "json":
        json.dump({"error": document | ({"next_step": next_step} if next_step else {})}, sys.stderr)
        sys.stderr.write("\n")
        return
    console.print("[red]error:[/red]", end=" ")
    console.print(text, markup=False, highlight=False)
    if next_step:
        console.print(f"  {next_step}", markup=False, highlight=False)
