"""Imports of devices: rows are uploaded, judged, and then made devices.

Rules:

* A row stands at its index. The same row at the same index changes nothing, another one is refused, and the order in
  which rows arrive does not matter: an upload that broke off is simply repeated.
* The dry run judges every row and creates nothing. A commit judges again, because the fleet may have changed since.
* Work goes on in runs that a task asks for, one after another. A run's devices and the import's own progress are one
  transaction, so a leader that dies in the middle goes on where it was and no row is made twice.
* Rows are gone from the state once the import has ended; at most 1,000 of its problems stay. An import that nobody
  commits is cancelled after a week, and one that has ended is forgotten after a month.

Of two rows with one identifier the one with the lower index counts, whichever came first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from google.protobuf.empty_pb2 import Empty
from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import AlreadyExistsError, DomainError, FailedPreconditionError, ResourceExhaustedError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Task, Timer
from libs.names import organization_of, parent_of
from services.registry.domain import commands as ask
from services.registry.domain import rules
from services.registry.domain.devices import existing, new_device, next_etag, open_product, refuse_existing
from services.registry.domain.quarantine import device_event
from services.registry.domain.rules import Quotas, check_quota, check_text, invalid, timestamp, wrong_state
from services.registry.domain.state import ENDED, State, Upload, find, is_active, shelf

Image = imports_pb.DeviceImport
Row = imports_pb.DeviceImportRow
Verdict = imports_pb.DeviceImportVerdict

ROWS_MOST: Final = 100_000
BYTES_MOST: Final = 32 * 1024 * 1024
EVENT_BYTES: Final = 500_000
"""Rows of one event; a record may have 900,000 bytes."""
JUDGED_AT_ONCE: Final = 1_000
MADE_AT_ONCE: Final = 499
"""With the import's own event 500: what a transaction holds."""
OPEN_FOR_MS: Final = 7 * 24 * 3600 * 1000
KEPT_FOR_MS: Final = 30 * 24 * 3600 * 1000
TASK_KIND: Final = "device-import"
TIMER_KIND: Final = "device-import-expiry"
OK: Final = "OK"
UNCHANGED: Final = "UNCHANGED"
DETAIL_LIMIT: Final = 200


def _copy(image: Image) -> Image:
    copied = Image()
    copied.CopyFrom(image)
    return copied


def _task(image: Image) -> str:
    """One id for each phase, so that one phase's task never stands for another's."""
    return f"{TASK_KIND}/{Image.State.Name(image.state)}/{image.name}"


def _timer(name: str, at_ms: int) -> Timer:
    return Timer(f"{TIMER_KIND}/{name}", TIMER_KIND, at_ms, name.encode())


def _event(image: Image) -> NewEvent:
    return NewEvent(organization_of(image.name), image.name, ev.DeviceImportSaved(device_import=image))


def _checked(state: State, name: str, etag: str) -> Image:
    current = existing(state.imports, name)
    check_etag(etag, current.etag, name)
    return current


def _refuse_state(image: Image, why: str) -> FailedPreconditionError:
    return wrong_state(image.name, f"is {Image.State.Name(image.state)}: {why}", state=Image.State.Name(image.state))


def create(state: State, command: ask.CreateDeviceImport, ctx: Context, quotas: Quotas) -> Decision:
    """An import that takes rows."""
    open_product(state, command.parent)
    wanted = command.device_import
    check_text("device_import.display_name", wanted.display_name, rules.TEXT_LIMIT)
    if not 1 <= wanted.row_count <= ROWS_MOST:
        raise invalid("device_import.row_count", f"must be between 1 and {ROWS_MOST}")
    name = f"{command.parent}/deviceImports/{command.device_import_id}"
    known = shelf(state.imports, f"{command.parent}/deviceImports")
    refuse_existing(known, name)
    check_quota("device_imports", sum(one.state not in ENDED for one in known.values()), quotas.device_imports)
    image = Image(
        name=name,
        display_name=wanted.display_name,
        row_count=wanted.row_count,
        state=Image.STATE_UPLOADING,
        create_time=timestamp(ctx.now_ms),
        etag=next_etag(ctx, name),
    )
    return Decision(events=(_event(image),), result=image, set_timers=(_timer(name, ctx.now_ms + OPEN_FOR_MS),))


def append(state: State, command: ask.AppendDeviceImportRows, ctx: Context, _quotas: Quotas) -> Decision:
    """Rows at their index."""
    current = existing(state.imports, command.name)
    if not command.rows or command.first_row + len(command.rows) > current.row_count:
        raise invalid("rows", f"must be within the {current.row_count} rows of the import", row_count=current.row_count)
    upload = state.uploads.get(command.name, Upload())
    fresh: list[tuple[int, Row]] = []
    for index, row in enumerate(command.rows, command.first_row):
        known = upload.rows.get(index)
        if known is None:
            fresh.append((index, row))
        elif known != row:
            raise AlreadyExistsError(
                "IMPORT_ROWS_CONFLICT", f"row {index} is there already and says something else", row=index
            )
    if not fresh and current.state not in ENDED:
        return Decision(result=current)
    if current.state != Image.STATE_UPLOADING:
        raise _refuse_state(current, "it takes no more rows")
    size = sum(row.ByteSize() for _, row in fresh)
    if upload.size + size > BYTES_MOST:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"an import holds at most {BYTES_MOST} bytes",
            quota="device_import_bytes",
            limit=BYTES_MOST,
        )
    arrived = {index for index, _ in fresh}
    image = _copy(current)
    image.received_count += len(fresh)
    while image.next_row in arrived or image.next_row in upload.rows:
        image.next_row += 1
    events = []
    for number, part in enumerate(_parts(fresh)):
        image = _copy(image)
        image.etag = str(ctx.version(image.name) + 1 + number)
        payload = ev.DeviceImportRowsAppended(
            device_import=image, indexes=[index for index, _ in part], rows=[row for _, row in part]
        )
        events.append(NewEvent(ctx.organization, image.name, payload))
    return Decision(events=tuple(events), result=image)


def _parts(rows: list[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """As many rows at a time as fit into one event."""
    part: list[tuple[int, Row]] = []
    size = 0
    for index, row in rows:
        if part and size + row.ByteSize() > EVENT_BYTES:
            yield part
            part, size = [], 0
        part.append((index, row))
        size += row.ByteSize()
    if part:
        yield part


def validate(state: State, command: ask.ValidateDeviceImport, ctx: Context, _quotas: Quotas) -> Decision:
    """Begin the dry run; it may be repeated after something was put right elsewhere."""
    current = _checked(state, command.name, command.etag)
    if current.state == Image.STATE_VALIDATING:
        return Decision(result=current)
    if current.state not in (Image.STATE_UPLOADING, Image.STATE_VALIDATED):
        raise _refuse_state(current, "it cannot be judged any more")
    if current.next_row < current.row_count:
        raise FailedPreconditionError(
            "IMPORT_INCOMPLETE",
            f"row {current.next_row} has not arrived: {current.received_count} of {current.row_count} have",
            resource=current.name,
            next_row=current.next_row,
            received=current.received_count,
            row_count=current.row_count,
        )
    image = _copy(current)
    image.state = Image.STATE_VALIDATING
    image.validated_count = image.problem_count = image.unchanged_count = 0
    return _begun(image, ctx)


def commit(state: State, command: ask.CommitDeviceImport, ctx: Context, _quotas: Quotas) -> Decision:
    """Begin to make devices; a repeat changes nothing."""
    current = existing(state.imports, command.name)
    if current.state in (Image.STATE_COMMITTING, Image.STATE_COMPLETED):
        return Decision(result=current)
    check_etag(command.etag, current.etag, current.name)
    if current.state != Image.STATE_VALIDATED:
        raise _refuse_state(current, "validate it first, and wait for the verdicts")
    open_product(state, parent_of(current.name))
    if current.problem_count and not command.skip_problems:
        raise FailedPreconditionError(
            "IMPORT_HAS_PROBLEMS",
            f"{current.problem_count} of {current.row_count} rows have problems: put them right, or leave them out",
            resource=current.name,
            problems=current.problem_count,
        )
    image = _copy(current)
    image.state = Image.STATE_COMMITTING
    image.committed_count = image.created_count = image.failed_count = image.unchanged_count = 0
    return _begun(image, ctx)


def _begun(image: Image, ctx: Context) -> Decision:
    image.etag = next_etag(ctx, image.name)
    task = Task(_task(image), TASK_KIND, image.name.encode())
    return Decision(events=(_event(image),), result=image, open_tasks=(task,))


def cancel(state: State, command: ask.CancelDeviceImport, ctx: Context, _quotas: Quotas) -> Decision:
    """Stop; a repeat changes nothing."""
    current = existing(state.imports, command.name)
    if current.state == Image.STATE_CANCELLED:
        return Decision(result=current)
    check_etag(command.etag, current.etag, current.name)
    check_text("reason", command.reason, rules.REASON_LIMIT)
    if current.state == Image.STATE_COMPLETED:
        raise _refuse_state(current, "there is nothing left to stop")
    return _cancelled(current, command.reason or "cancelled by an operator", ctx)


def _cancelled(current: Image, reason: str, ctx: Context) -> Decision:
    image = _copy(current)
    image.state, image.state_reason = Image.STATE_CANCELLED, reason
    image.end_time.CopyFrom(timestamp(ctx.now_ms))
    image.etag = next_etag(ctx, image.name)
    return Decision(
        events=(_event(image),),
        result=image,
        close_tasks=(_task(current),),
        set_timers=(_timer(image.name, ctx.now_ms + KEPT_FOR_MS),),
    )


def delete(state: State, command: ask.DeleteDeviceImport, ctx: Context, _quotas: Quotas) -> Decision:
    """Forget one that has ended."""
    current = _checked(state, command.name, command.etag)
    if current.state not in ENDED:
        raise _refuse_state(current, "cancel it first")
    return Decision(events=(_deleted(current, ctx),), result=Empty(), clear_timers=(f"{TIMER_KIND}/{current.name}",))


def _deleted(current: Image, ctx: Context) -> NewEvent:
    return NewEvent(ctx.organization, current.name, ev.DeviceImportDeleted(device_import=current))


def expired(state: State, name: str, ctx: Context) -> Decision:
    """Nobody committed it in a week, or it ended a month ago. One that is being committed is let be."""
    current = find(state.imports, name)
    if current is None or current.state == Image.STATE_COMMITTING:
        return Decision()
    if current.state in ENDED:
        return Decision(events=(_deleted(current, ctx),))
    return _cancelled(current, "expired: it was not committed in 7 days", ctx)


def advance(state: State, command: ask.AdvanceDeviceImport, ctx: Context, quotas: Quotas) -> Decision:
    """The next run of rows; without one, the task is done."""
    current = find(state.imports, command.name)
    if current is None or current.state not in (Image.STATE_VALIDATING, Image.STATE_COMMITTING):
        phases = (Image.STATE_VALIDATING, Image.STATE_COMMITTING)
        return Decision(close_tasks=tuple(_task(Image(name=command.name, state=phase)) for phase in phases))
    image = _copy(current)
    if current.state == Image.STATE_VALIDATING:
        made: tuple[NewEvent, ...] = ()
        problems = _judge_run(state, image, ctx, quotas)
    else:
        made, problems = _make_run(state, image, ctx, quotas)
    done = image.state != current.state
    image.etag = next_etag(ctx, image.name)
    advanced = ev.DeviceImportAdvanced(device_import=image, problems=problems)
    return Decision(
        events=(*made, NewEvent(ctx.organization, image.name, advanced)),
        close_tasks=(_task(current),) if done else (),
        set_timers=(_timer(image.name, ctx.now_ms + KEPT_FOR_MS),) if image.state in ENDED else (),
    )


def _judge_run(state: State, image: Image, ctx: Context, quotas: Quotas) -> list[Verdict]:
    """Judge the next rows, in place on the caller's own image."""
    problems: list[Verdict] = []
    upload = state.uploads[image.name]
    for index in range(image.validated_count, min(image.validated_count + JUDGED_AT_ONCE, image.row_count)):
        planned = image.validated_count - image.problem_count - image.unchanged_count
        verdict, _ = judge(state, upload, image.name, index, ctx, _left(quotas, planned))
        image.validated_count += 1
        image.unchanged_count += verdict.code == UNCHANGED
        if verdict.code not in (OK, UNCHANGED):
            image.problem_count += 1
            problems.append(verdict)
    if image.validated_count == image.row_count:
        image.state = Image.STATE_VALIDATED
    return problems


def _make_run(state: State, image: Image, ctx: Context, quotas: Quotas) -> tuple[tuple[NewEvent, ...], list[Verdict]]:
    """Make devices of the next rows, in place on the caller's own image."""
    events: list[NewEvent] = []
    problems: list[Verdict] = []
    upload = state.uploads[image.name]
    for index in range(image.committed_count, min(image.committed_count + MADE_AT_ONCE, image.row_count)):
        verdict, device = judge(state, upload, image.name, index, ctx, _left(quotas, len(events)))
        image.committed_count += 1
        image.unchanged_count += verdict.code == UNCHANGED
        if device is not None:
            device.etag = next_etag(ctx, device.name)
            events.append(device_event(device, "device.created"))
            image.created_count += 1
        elif verdict.code != UNCHANGED:
            image.failed_count += 1
            problems.append(verdict)
    if image.committed_count == image.row_count:
        image.state = Image.STATE_COMPLETED
        image.end_time.CopyFrom(timestamp(ctx.now_ms))
    return tuple(events), problems


def _left(quotas: Quotas, planned: int) -> Quotas:
    """What the quota leaves beside devices that are decided but not in the state."""
    return Quotas(devices=quotas.devices - planned)


def judge(
    state: State, upload: Upload, name: str, index: int, ctx: Context, quotas: Quotas
) -> tuple[Verdict, pb.Device | None]:
    """What a row would become now: its verdict, and the new device if it is one."""
    row = upload.rows[index]
    product = parent_of(name)

    def verdict(code: str, detail: str = "", /) -> Verdict:
        return Verdict(row=index, identifier=row.identifier[:128], code=code, detail=detail[:DETAIL_LIMIT])

    first = upload.first_of[row.identifier]
    if first != index:
        return verdict("DUPLICATE_ROW", f"row {first} has this identifier"), None
    given = pb.Device(cohort=_cohort(row.cohort, product), tags=row.tags, target=row.target)
    given.description = row.description
    holder = state.identifiers.get((ctx.organization, row.identifier))
    try:
        if holder is not None:
            return _known(state, holder, f"{product}/devices/{row.identifier}", given, verdict), None
        open_product(state, product)
        return verdict(OK), new_device(state, product, row.identifier, given, ctx, quotas)
    except DomainError as error:
        return verdict(error.reason, error.message), None


def is_unchanged(state: State, upload: Upload, index: int, organization: str) -> bool:
    """Whether a row that was judged good is a device already."""
    return (organization, upload.rows[index].identifier) in state.identifiers


def _cohort(given: str, product: str) -> str:
    return given if not given or "/" in given else f"{product}/cohorts/{given}"


class _Say(Protocol):
    """Makes the verdict of a row."""

    def __call__(self, code: str, detail: str = "", /) -> Verdict: ...


def _known(state: State, holder: str, name: str, given: pb.Device, verdict: _Say) -> Verdict:
    """A row whose identifier is taken: by the very device it describes, or not."""
    device = existing(state.devices, holder)
    if holder != name:
        return verdict("DEVICE_IDENTIFIER_TAKEN", "another product has a device of this identifier")
    if not is_active(device):
        return verdict("DEVICE_RETIRED", "the device of this identifier was retired for good")
    rules.clean_device(given)
    same = all(getattr(device, field) == getattr(given, field) for field in ("cohort", "target", "description"))
    if same and list(device.tags) == list(given.tags):
        return verdict(UNCHANGED)
    return verdict("DEVICE_EXISTS", "the device exists and differs from this row: change it by an update")
