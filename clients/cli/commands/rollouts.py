"""Rollouts: create, steer, watch; and why a device got what it got."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.json_format import ParseDict, ParseError
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from rich.live import Live
from rich.table import Table

from clients.cli.commands.stages import HELP as STAGE_HELP
from clients.cli.commands.stages import parse_stage
from clients.cli.context import Session, session
from clients.cli.output import to_dict
from clients.sdk import ApiError

rollout = typer.Typer(help="Staged rollouts.", no_args_is_help=True)
attempt = typer.Typer(help="Attempts of devices to take a release.", no_args_is_help=True)
explain = typer.Typer(help="Why something is as it is.", no_args_is_help=True)

State = rollout_pb2.Rollout.State
ENDED = frozenset({State.STATE_COMPLETED, State.STATE_ABORTED, State.STATE_ROLLED_BACK, State.STATE_KILLED})
ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]
FilterOption = Annotated[str, typer.Option("--filter", help='`field = "value"` joined by AND, e.g. `state = PAUSED`.')]
WATCH_GIVE_UP_S: Final = 60.0


class OnFailure(StrEnum):
    """What a rollout does when a gate trips."""

    PAUSE = "pause"
    ROLL_BACK = "roll-back"


_ACTIONS: Final = {
    OnFailure.PAUSE: rollout_pb2.Rollout.FAILURE_ACTION_PAUSE,
    OnFailure.ROLL_BACK: rollout_pb2.Rollout.FAILURE_ACTION_ROLL_BACK,
}


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(rollout, name="rollout")
    app.add_typer(attempt, name="attempt")
    app.add_typer(explain, name="explain")


def _from_file(file: Path) -> rollout_pb2.Rollout:
    wanted = rollout_pb2.Rollout()
    try:
        ParseDict(json.loads(file.read_text()), wanted)
    except (ParseError, ValueError) as error:
        raise typer.BadParameter(f"{file} is not a rollout: {error}") from None
    return wanted


@rollout.command("create")
def rollout_create(
    context: typer.Context,
    rollout_id: str,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="JSON of the rollout; cohorts and bundle may be short names.")
    ] = None,
    bundle: Annotated[str, typer.Option(help="Bundle; wins over the file's.")] = "",
    stage: Annotated[list[str] | None, typer.Option(help=STAGE_HELP)] = None,
    on_failure: Annotated[
        OnFailure | None, typer.Option(help="What a tripped gate does. Default: the product's policy.")
    ] = None,
    expedited: Annotated[
        bool, typer.Option("--expedited", help="An emergency: pauses the cohorts' active rollout, waits for no window.")
    ] = False,
    description: Annotated[str, typer.Option(help="For people.")] = "",
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
) -> None:
    """Create a rollout from stages on the command line, or from a JSON file.

    `swell rollout create to-1-4-0 --bundle fw-1-4-0 --stage canary:max=5,min=5,soak=10m --stage
    production:max=100,min=200,success=98%,failures=5 --on-failure roll-back --start`

    An emergency for devices with a tag: `swell rollout create fix-1 --bundle fw-1-4-1 --stage
    production:tags=exposed,max=500,soak=30s --expedited --start`

    Example file: `{"bundle": "fw-1-1-0", "failure_action": "FAILURE_ACTION_ROLL_BACK", "stages": [{"display_name":
    "canary", "cohort": "canary", "max_in_flight": 5, "gate": {"min_sample": 5, "failure_limit": 3, "soak": "8s",
    "dark_after": "6s"}}]}`
    """
    state = session(context)
    wanted = _from_file(file) if file is not None else rollout_pb2.Rollout()
    if stage:
        del wanted.stages[:]
        wanted.stages.extend(parse_stage(text) for text in stage)
    wanted.bundle = bundle or wanted.bundle
    wanted.description = description or wanted.description
    wanted.expedited = expedited or wanted.expedited
    if on_failure is not None:
        wanted.failure_action = _ACTIONS[on_failure]
    if not wanted.bundle or not wanted.stages:
        raise typer.BadParameter("say what and where: --bundle and --stage, or --file")
    wanted.bundle = state.name_in_product("bundles", wanted.bundle)
    for one in wanted.stages:
        one.cohort = state.name_in_product("cohorts", one.cohort)
    created = state.client.rollout.CreateRollout(
        rollout_pb2.CreateRolloutRequest(parent=state.product_name(), rollout_id=rollout_id, rollout=wanted)
    )
    if start:
        created = state.client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=created.name))
    state.output.one(created)


@rollout.command("list")
def rollout_list(context: typer.Context, only: FilterOption = "") -> None:
    """List the product's rollouts: `swell rollout list --filter 'state = RUNNING'`."""
    state = session(context)
    request = rollout_pb2.ListRolloutsRequest(parent=state.product_name(), filter=only)
    found = state.client.pages(state.client.rollout.ListRollouts, request, "rollouts")
    state.output.many(found, ("name", "version", "state", "state_reason", "current_stage", "expedited"))


@rollout.command("get")
def rollout_get(context: typer.Context, name: str) -> None:
    """Show a rollout with what its stages count and measured: `swell rollout get to-1-4-0`."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    found = state.client.rollout.GetRollout(rollout_pb2.GetRolloutRequest(name=full))
    if state.form == "json":
        state.output.one(found)
        return
    state.output.console.print(render(rollout_pb2.WatchRolloutResponse(rollout=found)))
    for stage, status in zip(found.stages, found.stage_statuses, strict=False):
        for line in _measured(status):
            state.output.console.print(f"  {stage.display_name}: {line}", markup=False, highlight=False)


def _measured(status: rollout_pb2.StageStatus) -> Iterator[str]:
    """What a stage measured, a line each."""
    took = status.grant_to_confirmed
    if took.count:
        half, most = took.p50.ToTimedelta().total_seconds(), took.p95.ToTimedelta().total_seconds()
        yield f"grant to confirmed: half within {half:.1f} s, 95 % within {most:.1f} s ({took.count})"
    if status.grants_per_minute:
        yield f"grants in the last minute: {status.grants_per_minute:.0f}"
    for failure in status.failure_codes:
        yield f"failure {failure.code}: {failure.count}"
    for metric in status.metrics:
        yield f"metric {metric.name}: min {metric.min:g}, mean {metric.mean:g}, max {metric.max:g} ({metric.count})"


@rollout.command("start")
def rollout_start(context: typer.Context, name: str) -> None:
    """Start a draft: `swell rollout start to-1-4-0`."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=full)))


@rollout.command("pause")
def rollout_pause(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Stop grants; devices that have not got `go` wait.

    Example: `swell rollout pause to-1-4-0 --reason "odd reports"`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.PauseRollout(rollout_pb2.PauseRolloutRequest(name=full, reason=reason)))


@rollout.command("resume")
def rollout_resume(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Go on after a pause or a halt.

    Example: `swell rollout resume to-1-4-0`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=full, reason=reason)))


@rollout.command("abort")
def rollout_abort(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """End it: nothing more is offered, updated devices stay.

    Example: `swell rollout abort to-1-4-0 --reason "superseded"`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.AbortRollout(rollout_pb2.AbortRolloutRequest(name=full, reason=reason)))


@rollout.command("roll-back")
def rollout_roll_back(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Retract the release and bring devices back to where they came from.

    Example: `swell rollout roll-back to-1-4-0 --reason "boots slowly"`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    request = rollout_pb2.RollBackRolloutRequest(name=full, reason=reason)
    state.output.one(state.client.rollout.RollBackRollout(request))


@rollout.command("advance")
def rollout_advance(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Pass a stage that awaits approval or is stalled.

    Example: `swell rollout advance to-1-4-0 --reason "stragglers are in storage"`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.AdvanceStage(rollout_pb2.AdvanceStageRequest(name=full, reason=reason)))


@rollout.command("approve")
def rollout_approve(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Approve the stage that waits for an operator: `swell rollout approve to-1-4-0 --reason "looks good"`."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    now = state.client.rollout.GetRollout(rollout_pb2.GetRolloutRequest(name=full))
    status = now.stage_statuses[now.current_stage].state
    if status != rollout_pb2.StageStatus.STATE_AWAITING_APPROVAL:
        shown = rollout_pb2.StageStatus.State.Name(status).removeprefix("STATE_")
        raise typer.BadParameter(
            f"stage {now.stages[now.current_stage].display_name} is {shown} and awaits no approval; "
            "a stalled one is passed by `swell rollout advance --reason …`"
        )
    request = rollout_pb2.AdvanceStageRequest(name=full, etag=now.etag, reason=reason)
    state.output.one(state.client.rollout.AdvanceStage(request))


@rollout.command("retry")
def rollout_retry(
    context: typer.Context,
    name: str,
    device: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated. Default: all.")] = None,
    reason: ReasonOption = "",
) -> None:
    """Give failed and reverted devices another try: `swell rollout retry to-1-4-0 --device SN-0042`."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    devices = [state.name_in_product("devices", one) for one in device or ()]
    request = rollout_pb2.RetryRolloutRequest(name=full, devices=devices, reason=reason)
    state.output.one(state.client.rollout.RetryRollout(request))


@rollout.command("kill")
def rollout_kill(
    context: typer.Context,
    name: str,
    reason: Annotated[str, typer.Option(help="Why, for the audit.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Kill switch: no grant and no `go` from this moment on, links die. It cannot be undone.

    `swell rollout kill to-1-4-0 --reason "bricks boards of revision C" --yes`
    """
    state = session(context)
    full = state.name_in_product("rollouts", name)
    if not yes:
        typer.confirm(f"Kill {full} for good?", abort=True)
    state.output.one(state.client.rollout.KillRollout(rollout_pb2.KillRolloutRequest(name=full, reason=reason)))


@rollout.command("held")
def rollout_held(context: typer.Context, name: str) -> None:
    """List devices that must go back and cannot, with reasons: `swell rollout held to-1-4-0`."""
    state = session(context)
    request = rollout_pb2.ListHeldDevicesRequest(parent=state.name_in_product("rollouts", name))
    found = state.client.pages(state.client.rollout.ListHeldDevices, request, "held_devices")
    state.output.many(found, ("device", "release", "reason.code", "reason.message"))


@attempt.command("list")
def attempt_list(
    context: typer.Context,
    rollout_name: Annotated[str, typer.Option("--rollout", help="Attempts of this rollout.")] = "",
    device: Annotated[str, typer.Option(help="Attempts of this device; with --rollout: of both.")] = "",
    in_state: Annotated[str, typer.Option("--state", help="e.g. FAILED, CONFIRMED, WENT_DARK.")] = "",
    stage: Annotated[int, typer.Option(help="Index of the stage, from 0.")] = -1,
) -> None:
    """List attempts: `swell attempt list --rollout to-1-4-0 --state FAILED`."""
    state = session(context)
    if not rollout_name and not device:
        raise typer.BadParameter("name a --rollout or a --device")
    full_device = state.name_in_product("devices", device) if device else ""
    parent = state.name_in_product("rollouts", rollout_name) if rollout_name else full_device
    clauses = [f'device = "{full_device}"'] if device and rollout_name else []
    if in_state:
        if f"ATTEMPT_STATE_{in_state.upper()}" not in device_pb2.AttemptState.keys():  # noqa: SIM118 - no dict
            known = ", ".join(key.removeprefix("ATTEMPT_STATE_") for key in device_pb2.AttemptState.keys()[1:])
            raise typer.BadParameter(f"no state {in_state}; there are {known}")
        clauses.append(f"state = {in_state.upper()}")
    if stage >= 0:
        clauses.append(f"stage = {stage}")
    request = rollout_pb2.ListAttemptsRequest(parent=parent, filter=" AND ".join(clauses))
    found = state.client.pages(state.client.rollout.ListAttempts, request, "attempts")
    state.output.many(found, ("device", "state", "code", "stage", "kind", "ordinal", "withdrawn", "grant_time"))


@attempt.command("retry")
def attempt_retry(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A full name, or a device: then its last attempt that failed.")],
    reason: ReasonOption = "",
) -> None:
    """Give one failed device another try, with or without a rollout.

    `swell attempt retry SN-0042 --reason "new battery"`
    """
    state = session(context)
    if "/attempts/" not in name:
        device = state.name_in_product("devices", name)
        request = rollout_pb2.ListAttemptsRequest(parent=device)
        found = [
            one
            for one in state.client.pages(state.client.rollout.ListAttempts, request, "attempts")
            if one.state in (device_pb2.ATTEMPT_STATE_FAILED, device_pb2.ATTEMPT_STATE_REVERTED)
        ]
        if not found:
            raise typer.BadParameter(f"no attempt of {device} failed: see `swell attempt list --device {name}`")
        name = max(found, key=lambda one: one.grant_time.ToNanoseconds()).name
    state.output.one(state.client.rollout.RetryAttempt(rollout_pb2.RetryAttemptRequest(name=name, reason=reason)))


@rollout.command("watch")
def rollout_watch(
    context: typer.Context,
    name: str,
    until_end: Annotated[bool, typer.Option(help="Leave when the rollout has ended.")] = True,
) -> None:
    """Follow a rollout live: `swell rollout watch to-1-4-0`. Into a file or a pipe: one line per change.

    With `--output json` each line is the whole answer.
    """
    state = session(context)
    updates = _updates(state, rollout_pb2.WatchRolloutRequest(name=state.name_in_product("rollouts", name)))
    if state.form == "json":
        for update in updates:
            sys.stdout.write(json.dumps(to_dict(update)) + "\n")
            sys.stdout.flush()
            if until_end and update.rollout.state in ENDED:
                return
        return
    console = state.output.console
    if not console.is_terminal:
        for text in _lines(updates, until_end=until_end):
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        return
    with Live(console=console, refresh_per_second=8) as live:
        for update in updates:
            live.update(render(update))
            if until_end and update.rollout.state in ENDED:
                return


def _updates(state: Session, request: rollout_pb2.WatchRolloutRequest) -> Iterator[Any]:
    """The stream, taken up again when the server that served it went away; what it missed is in the next update."""
    heard = time.monotonic()
    while True:
        try:
            for update in state.client.stream(state.client.rollout.WatchRollout, request):
                heard = time.monotonic()
                yield update
        except ApiError as error:
            if error.code not in ("UNAVAILABLE", "CANCELLED") or time.monotonic() - heard > WATCH_GIVE_UP_S:
                raise
        time.sleep(0.5)


_COUNTS: Final = (
    "confirmed", "soaked", "failed", "reverted", "dark", "withdrawn", "expired", "rolled_back", "held",
)  # fmt: skip
_SHORT: Final = {"rolled_back": "back"}


def _title(now: rollout_pb2.Rollout) -> str:
    title = f"{now.name.rsplit('/', 1)[-1]}  {now.version}  {State.Name(now.state).removeprefix('STATE_')}"
    if now.state_reason:
        title += f" ({now.state_reason}{f' by {now.superseded_by}' if now.superseded_by else ''})"
    return title


def _stages(now: rollout_pb2.Rollout) -> Iterator[tuple[rollout_pb2.Stage, rollout_pb2.StageStatus, str]]:
    """Each stage, how it stands, and its state in a word."""
    for stage, status in zip(now.stages, now.stage_statuses, strict=False):
        yield stage, status, rollout_pb2.StageStatus.State.Name(status.state).removeprefix("STATE_")


def render(update: rollout_pb2.WatchRolloutResponse) -> Table:
    """The rollout as a table, one row a stage."""
    caption = f"observations {update.observation_lag_s:.1f} s behind"
    table = Table(title=_title(update.rollout), caption=caption, title_justify="left")
    for column in ("stage", "state", "in flight", *(_SHORT.get(count, count) for count in _COUNTS)):
        table.add_column(column)
    for stage, status, word in _stages(update.rollout):
        in_flight = f"{status.in_flight}/{stage.max_in_flight or 100} (peak {status.peak_in_flight})"
        table.add_row(stage.display_name, word, in_flight, *(str(getattr(status, count)) for count in _COUNTS))
    return table


def line(update: rollout_pb2.WatchRolloutResponse) -> str:
    """The rollout in a line, for logs: of the counts those that are not 0."""
    parts = [_title(update.rollout)]
    for stage, status, word in _stages(update.rollout):
        counts = [f"{getattr(status, count)} {_SHORT.get(count, count)}" for count in _COUNTS if getattr(status, count)]
        if status.in_flight:
            counts.insert(0, f"{status.in_flight} in flight")
        parts.append(f"{stage.display_name} {word}" + (f": {', '.join(counts)}" if counts else ""))
    return " | ".join(parts)


def _lines(updates: Iterator[Any], *, until_end: bool) -> Iterator[str]:
    """A line for each update that says something new."""
    told = ""
    for update in updates:
        text = line(update)
        if text != told:
            told = text
            yield text
        if until_end and update.rollout.state in ENDED:
            return


@explain.command("device")
def explain_device(context: typer.Context, name: str) -> None:
    """Why a device runs what it runs, and why not something else, from stored receipts alone.

    Example: `swell explain device SN-0042`
    """
    state = session(context)
    full = state.name_in_product("devices", name)
    answer = state.client.rollout.ExplainDevice(rollout_pb2.ExplainDeviceRequest(name=full))
    if state.form == "json":
        state.output.one(answer)
        return
    _print_explanation(state, answer)


def _print_explanation(state: Session, answer: rollout_pb2.ExplainDeviceResponse) -> None:
    write = state.output.console.print
    running = answer.running
    write(f"[bold]{answer.device}[/bold]")
    write(
        f"runs {running.version or 'an unknown version'} {running.release or running.bundle or '(no release reported)'}"
    )
    for grant in answer.grants:
        attempt = grant.attempt
        states = device_pb2.AttemptState
        status = states.Name(attempt.state).removeprefix("ATTEMPT_STATE_")
        kind = "back to" if attempt.kind == rollout_pb2.Attempt.KIND_ROLLBACK else "to"
        write(f"\ngranted {attempt.grant_time.ToJsonString()} {kind} {attempt.release or attempt.bundle}: {status}")
        write(f"  GRANTED at position {grant.position} of the rollout log", highlight=False)
        for entry in grant.reasons:
            _print_reason(state, entry)
    if answer.HasField("last_seen_time"):
        write(f"\nlast seen {answer.last_seen_time.ToJsonString()}", highlight=False)
    if answer.HasField("last_check_in"):
        receipt = answer.last_check_in
        write(f"last check-in: answered [bold]{receipt.answer}[/bold]")
        for entry in receipt.steps:
            _print_reason(state, entry)
        views = ", ".join(f"{view.service}@{view.public_seq}" for view in receipt.views)
        write(f"  decided on views {views}", highlight=False)


def _print_reason(state: Session, entry: device_pb2.Reason) -> None:
    mark = "x" if entry.blocking else "-"
    subject = f" ({entry.subject})" if entry.subject else ""
    state.output.console.print(f"  {mark} {entry.code}: {entry.message}{subject}", markup=False, highlight=False)
