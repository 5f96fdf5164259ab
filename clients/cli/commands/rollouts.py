"""Rollouts: create, steer, watch; and why a device got what it got."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import ParseDict, ParseError
from groundswell.device.v1 import device_pb2
from groundswell.rollout.v1 import rollout_pb2
from rich.live import Live
from rich.table import Table

from clients.cli.context import Session, session
from clients.cli.output import to_dict

rollout = typer.Typer(help="Staged rollouts.", no_args_is_help=True)
explain = typer.Typer(help="Why something is as it is.", no_args_is_help=True)

State = rollout_pb2.Rollout.State
ENDED = frozenset({State.STATE_COMPLETED, State.STATE_ABORTED, State.STATE_ROLLED_BACK})
ReasonOption = Annotated[str, typer.Option(help="Why, for the audit.")]


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(rollout, name="rollout")
    app.add_typer(explain, name="explain")


@rollout.command("create")
def rollout_create(
    context: typer.Context,
    rollout_id: str,
    file: Annotated[
        Path, typer.Option("--file", "-f", help="JSON of the rollout; cohorts and bundle may be short names.")
    ],
    start: Annotated[bool, typer.Option(help="Start it at once.")] = False,
) -> None:
    """Create a rollout from a JSON file.

    Example file: `{"bundle": "fw-1-1-0", "failure_action": "FAILURE_ACTION_ROLL_BACK", "stages": [{"display_name":
    "canary", "cohort": "canary", "max_in_flight": 5, "gate": {"min_sample": 5, "failure_limit": 3, "soak": "8s",
    "dark_after": "6s"}}]}`
    """
    state = session(context)
    wanted = rollout_pb2.Rollout()
    try:
        ParseDict(json.loads(file.read_text()), wanted)
    except (ParseError, ValueError) as error:
        raise typer.BadParameter(f"{file} is not a rollout: {error}") from None
    wanted.bundle = state.name_in_product("bundles", wanted.bundle)
    for stage in wanted.stages:
        stage.cohort = state.name_in_product("cohorts", stage.cohort)
    created = state.client.rollout.CreateRollout(
        rollout_pb2.CreateRolloutRequest(parent=state.product_name(), rollout_id=rollout_id, rollout=wanted)
    )
    if start:
        created = state.client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=created.name))
    state.output.one(created)


@rollout.command("start")
def rollout_start(context: typer.Context, name: str) -> None:
    """Start a draft."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=full)))


@rollout.command("pause")
def rollout_pause(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Stop grants; devices that have not got `go` wait."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.PauseRollout(rollout_pb2.PauseRolloutRequest(name=full, reason=reason)))


@rollout.command("resume")
def rollout_resume(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Go on after a pause or a halt."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.ResumeRollout(rollout_pb2.ResumeRolloutRequest(name=full, reason=reason)))


@rollout.command("abort")
def rollout_abort(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """End it: nothing more is offered, updated devices stay."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.AbortRollout(rollout_pb2.AbortRolloutRequest(name=full, reason=reason)))


@rollout.command("roll-back")
def rollout_roll_back(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Retract the release and bring devices back to where they came from."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    request = rollout_pb2.RollBackRolloutRequest(name=full, reason=reason)
    state.output.one(state.client.rollout.RollBackRollout(request))


@rollout.command("advance")
def rollout_advance(context: typer.Context, name: str, reason: ReasonOption = "") -> None:
    """Pass a stage that awaits approval or is stalled."""
    state = session(context)
    full = state.name_in_product("rollouts", name)
    state.output.one(state.client.rollout.AdvanceStage(rollout_pb2.AdvanceStageRequest(name=full, reason=reason)))


@rollout.command("watch")
def rollout_watch(
    context: typer.Context,
    name: str,
    until_end: Annotated[bool, typer.Option(help="Leave when the rollout has ended.")] = True,
) -> None:
    """Follow a rollout live. With `--output json`: one line per change."""
    state = session(context)
    request = rollout_pb2.WatchRolloutRequest(name=state.name_in_product("rollouts", name))
    updates = state.client.stream(state.client.rollout.WatchRollout, request)
    if state.form == "json":
        for update in updates:
            sys.stdout.write(json.dumps(to_dict(update)) + "\n")
            sys.stdout.flush()
            if until_end and update.rollout.state in ENDED:
                return
        return
    with Live(console=state.output.console, refresh_per_second=8) as live:
        for update in updates:
            live.update(render(update))
            if until_end and update.rollout.state in ENDED:
                return


def render(update: rollout_pb2.WatchRolloutResponse) -> Table:
    """The rollout as a table, one row a stage."""
    now = update.rollout
    title = f"{now.name.rsplit('/', 1)[-1]}  {now.version}  {State.Name(now.state).removeprefix('STATE_')}"
    if now.state_reason:
        title += f" ({now.state_reason})"
    table = Table(title=title, caption=f"observations {update.observation_lag_s:.1f} s behind", title_justify="left")
    for column in ("stage", "state", "in flight", "confirmed", "soaked", "failed", "reverted", "dark", "back", "held"):
        table.add_column(column)
    kinds = rollout_pb2.StageStatus.State
    for stage, status in zip(now.stages, now.stage_statuses, strict=False):
        table.add_row(
            stage.display_name,
            kinds.Name(status.state).removeprefix("STATE_"),
            f"{status.in_flight}/{stage.max_in_flight or 100} (peak {status.peak_in_flight})",
            *(
                str(value)
                for value in (
                    status.confirmed,
                    status.soaked,
                    status.failed,
                    status.reverted,
                    status.dark,
                    status.rolled_back,
                    status.held,
                )
            ),
        )
    return table


@explain.command("device")
def explain_device(context: typer.Context, name: str) -> None:
    """Why a device runs what it runs, and why not something else, from stored receipts alone."""
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
    if answer.HasField("last_check_in"):
        receipt = answer.last_check_in
        write(f"\nlast check-in: answered [bold]{receipt.answer}[/bold]")
        for entry in receipt.steps:
            _print_reason(state, entry)
        views = ", ".join(f"{view.service}@{view.public_seq}" for view in receipt.views)
        write(f"  decided on views {views}", highlight=False)


def _print_reason(state: Session, entry: device_pb2.Reason) -> None:
    mark = "x" if entry.blocking else "-"
    subject = f" ({entry.subject})" if entry.subject else ""
    state.output.console.print(f"  {mark} {entry.code}: {entry.message}{subject}", markup=False, highlight=False)
