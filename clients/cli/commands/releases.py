"""Releases of a cohort's graph: create, change, promote, draw; dry runs of what devices would get."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2

from clients.cli.context import Session, session

release = typer.Typer(help="Releases of a cohort.", no_args_is_help=True)
graph = typer.Typer(help="The release graph of a cohort.", no_args_is_help=True)

CohortOption = Annotated[str, typer.Option(help="Cohort, for a short release name.")]
PhaseShare = Annotated[int, typer.Option(help="Share of the cohort, parts per million; 1000000 is final.")]
PhaseCount = Annotated[int, typer.Option(help="First to ask, at most this many devices.")]
PhaseTags = Annotated[list[str] | None, typer.Option("--tag", help="Only devices with any of these tags.")]
Schedule = Annotated[str, typer.Option(help="Not before this time, such as 2031-05-01T06:00:00Z.")]
STATE = releases_pb2.GraphNode.State


def register(app: typer.Typer) -> None:
    """Add the groups and `resolve`."""
    app.add_typer(release, name="release")
    app.add_typer(graph, name="graph")
    app.command("resolve")(resolve)


def moment(text: str) -> Timestamp:
    """A time as people write it; without a zone it is UTC."""
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a time such as 2031-05-01T06:00:00Z") from None
    stamp = Timestamp()
    stamp.FromDatetime(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))
    return stamp


def release_name(state: Session, name: str, cohort: str) -> str:
    """Full name of a release from a full name, or an id and its cohort."""
    if name.startswith("organizations/"):
        return name
    if not cohort:
        raise typer.BadParameter(f"'{name}' is short: name its cohort with --cohort, or give the full name")
    return f"{state.name_in_product('cohorts', cohort)}/releases/{name}"


def _phase(share_ppm: int, count: int, tags: list[str] | None) -> releases_pb2.Phase | None:
    if not (share_ppm or count or tags):
        return None
    return releases_pb2.Phase(share_ppm=share_ppm, count=count, tags=tags or ())


@release.command("create")
def release_create(
    context: typer.Context,
    release_id: str,
    cohort: Annotated[str, typer.Option(help="Cohort.")],
    bundle: Annotated[str, typer.Option(help="Bundle.")],
    version: Annotated[str, typer.Option(help="SemVer, for devices that report only a version.")] = "",
    version_requirement: Annotated[str, typer.Option(help="Requirement on the device's version.")] = "",
    required: Annotated[bool, typer.Option(help="Must be passed through.")] = False,
    share_ppm: PhaseShare = 0,
    count: PhaseCount = 0,
    tag: PhaseTags = None,
    schedule: Schedule = "",
    next_: Annotated[str, typer.Option("--next", help="Place it before this release; default: the latest.")] = "",
    previous: Annotated[str, typer.Option(help="With --next: place it between both.")] = "",
    description: Annotated[str, typer.Option(help="For people.")] = "",
) -> None:
    """Create a plain release: the latest of its cohort, or before `--next`.

    Example: `swell release create 1-1-0 --cohort beta --bundle fw-1-1-0 --version 1.1.0
    --version-requirement '< 1.1.0'`
    """
    state = session(context)
    wanted = releases_pb2.Release(
        bundle=state.name_in_product("bundles", bundle),
        version=version,
        version_requirement=version_requirement,
        required=required,
        phase=_phase(share_ppm, count, tag),
        schedule_time=moment(schedule) if schedule else None,
        next=release_name(state, next_, cohort) if next_ else "",
        description=description,
    )
    request = releases_pb2.CreateReleaseRequest(
        parent=state.name_in_product("cohorts", cohort),
        release_id=release_id,
        release=wanted,
        previous=release_name(state, previous, cohort) if previous else "",
    )
    state.output.one(state.client.releases.CreateRelease(request))


@release.command("list")
def release_list(
    context: typer.Context,
    cohort: str,
    filter_: Annotated[str, typer.Option("--filter", help='`field = "value"`, joined by AND.')] = "",
) -> None:
    """Releases of a cohort. Example: `swell release list beta --filter 'disabled = false'`."""
    state = session(context)
    request = releases_pb2.ListReleasesRequest(
        parent=state.name_in_product("cohorts", cohort), filter=filter_, page_size=500
    )
    found = state.client.pages(state.client.releases.ListReleases, request, "releases")
    state.output.many(found, ("name", "version", "version_requirement", "required", "disabled", "retracted", "rollout"))


@release.command("get")
def release_get(context: typer.Context, name: str, cohort: CohortOption = "") -> None:
    """Read one release. Example: `swell release get 1-1-0 --cohort beta`."""
    state = session(context)
    request = releases_pb2.GetReleaseRequest(name=release_name(state, name, cohort))
    state.output.one(state.client.releases.GetRelease(request))


@release.command("update")
def release_update(
    context: typer.Context,
    name: str,
    cohort: CohortOption = "",
    version: Annotated[str | None, typer.Option(help="SemVer; empty takes it away.")] = None,
    version_requirement: Annotated[str | None, typer.Option(help="Requirement; empty takes it away.")] = None,
    required: Annotated[bool | None, typer.Option(help="Must be passed through.")] = None,
    disabled: Annotated[bool | None, typer.Option(help="Never the target.")] = None,
    description: Annotated[str | None, typer.Option(help="For people.")] = None,
    next_: Annotated[str | None, typer.Option("--next", help="Release that follows.")] = None,
    share_ppm: PhaseShare = 0,
    count: PhaseCount = 0,
    tag: PhaseTags = None,
    no_phase: Annotated[bool, typer.Option("--no-phase", help="Open it to every device.")] = False,
    schedule: Annotated[str | None, typer.Option(help="Not before this time; empty means at once.")] = None,
    etag: Annotated[str, typer.Option(help="Refuse when it has changed since it was read.")] = "",
) -> None:
    """Change a release; only what is given changes.

    Example: `swell release update 1-1-0 --cohort beta --share-ppm 250000`
    """
    state = session(context)
    given: dict[str, Any] = {
        "version": version,
        "version_requirement": version_requirement,
        "required": required,
        "disabled": disabled,
        "description": description,
        "next": None if next_ is None else release_name(state, next_, cohort) if next_ else "",
    }
    given = {path: value for path, value in given.items() if value is not None}
    wanted = releases_pb2.Release(name=release_name(state, name, cohort), etag=etag, **given)
    paths = list(given)
    phase = _phase(share_ppm, count, tag)
    if phase is not None and no_phase:
        raise typer.BadParameter("--no-phase goes with no other option of the phase")
    if phase is not None or no_phase:
        paths.append("phase")
    if phase is not None:
        wanted.phase.CopyFrom(phase)
    if schedule is not None:
        paths.append("schedule_time")
    if schedule:
        wanted.schedule_time.CopyFrom(moment(schedule))
    if not paths:
        raise typer.BadParameter("say what to change, see --help")
    request = releases_pb2.UpdateReleaseRequest(release=wanted, update_mask=FieldMask(paths=paths))
    state.output.one(state.client.releases.UpdateRelease(request))


@release.command("delete")
def release_delete(
    context: typer.Context,
    name: str,
    cohort: CohortOption = "",
    force: Annotated[bool, typer.Option(help="Although devices are behind a required release.")] = False,
    reason: Annotated[str, typer.Option(help="Why; needed with --force.")] = "",
    etag: Annotated[str, typer.Option(help="Refuse when it has changed since it was read.")] = "",
) -> None:
    """Take a release out of its graph; what led to it leads to its next.

    Example: `swell release delete 1-1-0 --cohort beta`
    """
    state = session(context)
    full = release_name(state, name, cohort)
    state.client.releases.DeleteRelease(
        releases_pb2.DeleteReleaseRequest(name=full, force=force, reason=reason, etag=etag)
    )
    state.output.text(f"deleted {full}", deleted=full)


@release.command("promote")
def release_promote(
    context: typer.Context,
    name: str,
    to: Annotated[str, typer.Option(help="Cohort of the same product that gets it.")],
    cohort: CohortOption = "",
    release_id: Annotated[str, typer.Option(help="Id of the new release; default: the same.")] = "",
    share_ppm: PhaseShare = 0,
    count: PhaseCount = 0,
    tag: PhaseTags = None,
    schedule: Schedule = "",
) -> None:
    """Make the same firmware the latest release of another cohort. Promoting again answers the same release.

    Example: `swell release promote 1-1-0 --cohort beta --to production --share-ppm 100000`
    """
    state = session(context)
    request = releases_pb2.PromoteReleaseRequest(
        name=release_name(state, name, cohort),
        cohort=state.name_in_product("cohorts", to),
        release_id=release_id,
        phase=_phase(share_ppm, count, tag),
        schedule_time=moment(schedule) if schedule else None,
    )
    state.output.one(state.client.releases.PromoteRelease(request))


@release.command("disable")
def release_disable(
    context: typer.Context,
    name: str,
    cohort: CohortOption = "",
    enable: Annotated[bool, typer.Option("--enable", help="Enable it again.")] = False,
) -> None:
    """Take a release out of resolution, or put it back. Example: `swell release disable 1-1-0 --cohort beta`."""
    state = session(context)
    request = releases_pb2.UpdateReleaseRequest(
        release=releases_pb2.Release(name=release_name(state, name, cohort), disabled=not enable),
        update_mask=FieldMask(paths=["disabled"]),
    )
    state.output.one(state.client.releases.UpdateRelease(request))


@graph.command("show")
def graph_show(context: typer.Context, cohort: str) -> None:
    """Draw a cohort's graph: who stands where, and what is wrong with it.

    Example: `swell -O acme -P thermostat graph show beta`
    """
    state = session(context)
    request = releases_pb2.GetGraphRequest(cohort=state.name_in_product("cohorts", cohort))
    found = state.client.releases.GetGraph(request)
    if state.form == "json":
        state.output.one(found)
        return
    for line in drawn(found):
        state.output.console.print(line, markup=False, highlight=False, soft_wrap=True)


def drawn(found: releases_pb2.Graph) -> list[str]:
    """The graph as text: the latest on top, below each release those that lead to it."""
    lines = [f"{found.cohort}: {found.devices} devices, {found.devices_unplaced} without a place in the graph"]
    before: dict[str, list[releases_pb2.GraphNode]] = {}
    lengths: dict[str, int] = {}
    for node in found.nodes:  # each before its next, so its own length is known by then
        ways = before.setdefault(node.release.name, [])
        lengths[node.release.name] = 1 + max((lengths[one.release.name] for one in ways), default=0)
        before.setdefault(node.release.next, []).append(node)
    _draw(before, lengths, "", "", lines)
    lines.extend(
        f"! {warning.code}: {_last(warning.release)}: {warning.message}"
        + (f" ({warning.devices} devices)" if warning.devices else "")
        for warning in found.warnings
    )
    return lines


def _draw(
    before: dict[str, list[releases_pb2.GraphNode]], lengths: dict[str, int], name: str, indent: str, lines: list[str]
) -> None:
    """Straight down the longest way; every shorter one stands beside it."""
    while ways := before.get(name):
        *beside, main = sorted(ways, key=lambda node: lengths[node.release.name])
        for node in beside:
            lines.append(f"{indent}├─ {_described(node)}")
            _draw(before, lengths, node.release.name, f"{indent}│  ", lines)
        if name:
            lines.append(f"{indent}│")
        lines.append(f"{indent}{_described(main)}")
        name = main.release.name


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _described(node: releases_pb2.GraphNode) -> str:
    words = [_last(node.release.name), STATE.Name(node.state).removeprefix("STATE_").lower().replace("_", " ")]
    words += [node.release.version] if node.release.version else []
    words += [f"[{node.release.version_requirement}]"] if node.release.version_requirement else []
    words += ["required"] if node.release.required else []
    words += [f"by {_last(node.release.rollout)}"] if node.release.rollout else []
    words.append(f"{node.devices} devices")
    words += [f"{node.devices_entering} begin here"] if node.devices_entering else []
    return "  ".join(words)


def resolve(
    context: typer.Context,
    devices: Annotated[list[str] | None, typer.Argument(help="Devices.")] = None,
    explain: Annotated[bool, typer.Option(help="Also what would have to change, one device at a time.")] = False,
    release_: Annotated[str, typer.Option("--release", help="As if they ran this release (full name).")] = "",
    bundle: Annotated[str, typer.Option(help="As if they ran this bundle.")] = "",
    version: Annotated[str, typer.Option(help="As if they ran this version.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="As if they had these tags.")] = None,
    cohort: Annotated[str, typer.Option(help="As if they were in this cohort.")] = "",
    target: Annotated[str, typer.Option(help="As if they were this hardware.")] = "",
    at: Annotated[str, typer.Option(help="As if it were then.")] = "",
) -> None:
    """Dry run: what devices would be offered now, and why. Without a device: what one like that would be.

    Example: `swell resolve SN-0042`, `swell resolve --cohort beta --version 1.0.0 --target board-a`
    """
    state = session(context)
    names = [state.name_in_product("devices", name) for name in devices or ()]
    running = registry_pb2.ReportedState(
        release=release_, bundle=state.name_in_product("bundles", bundle) if bundle else "", version=version
    )
    runs = running if running.ByteSize() else None
    if explain:
        if tag or cohort or target or at or not names:
            raise typer.BadParameter("--explain takes devices, and of suppositions only what they run")
        for name in names:
            answer = state.client.releases.ExplainDevice(releases_pb2.ExplainDeviceRequest(name=name, running=runs))
            _show_explanation(state, answer)
        return
    supposed = releases_pb2.SupposedDevice(running=runs)
    if tag:
        supposed.tag_set.tags.extend(tag)
    if cohort:
        supposed.cohort = state.name_in_product("cohorts", cohort)
    if target:
        supposed.target = target
    request = releases_pb2.ResolveDevicesRequest(parent=state.product_name(), at_time=moment(at) if at else None)
    if not supposed.ByteSize():
        if not names:
            raise typer.BadParameter("name a device, or suppose one: see --help")
        request.devices.extend(names)
    for name in names if supposed.ByteSize() else ():
        like = request.supposed_devices.add(device=name)
        like.MergeFrom(supposed)
    if supposed.ByteSize() and not names:
        request.supposed_devices.append(supposed)
    found = state.client.releases.ResolveDevices(request).resolutions
    if state.form == "json":
        state.output.many(found, ())
        return
    for resolution in found:
        _show(state, resolution)


def _show(state: Session, answer: Any) -> None:
    write = state.output.console.print
    offered = ", ".join(
        _last(one.release or one.bundle) or f"back from {_last(one.rollback_of)}" for one in answer.candidates
    )
    write(f"{answer.device or 'a device like that'}: {offered or 'nothing'}", markup=False, highlight=False)
    for step in answer.steps:
        subject = f" ({step.subject})" if step.subject else ""
        mark = "x" if step.blocking else "-"
        write(f"  {mark} {step.code}: {step.message}{subject}", markup=False, highlight=False)


def _show_explanation(state: Session, answer: releases_pb2.ExplainDeviceResponse) -> None:
    if state.form == "json":
        state.output.one(answer)
        return
    _show(state, answer)
    if answer.HasField("remedy"):
        remedy = answer.remedy
        state.output.console.print(f"  to change it: {remedy.sentence}", markup=False, highlight=False)
        if remedy.method:
            fields = ", ".join(f"{path} = {value or '…'}" for path, value in sorted(remedy.fields.items()))
            call = f"    {remedy.method} {remedy.resource} {fields}".rstrip()
            state.output.console.print(call, markup=False, highlight=False)
