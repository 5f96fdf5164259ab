"""Imports: the same rows twice, out of order, resumed, judged, made once, stopped, and gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from groundswell.registry.v1 import device_imports_pb2 as imports_pb
from groundswell.registry.v1 import registry_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.sdk.device_import import CsvError, read_rows
from libs.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from libs.rpc import page_in_order
from services.registry import domain as ask
from services.registry import views
from services.registry.domain import Quotas, Registry, find, imports
from services.registry.domain.state import PROBLEMS_KEPT, shelf
from tests.unit.registry.world import ORG, PUMP, World, furnished

Image = imports_pb.DeviceImport
Row = imports_pb.DeviceImportRow
NAME = f"{PUMP}/deviceImports/batch-7"
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def world() -> World:
    return furnished()


def rows(count: int, begin: int = 0) -> list[Row]:
    return [Row(identifier=f"SN-{number}", tags=["b", "a"], cohort="canary") for number in range(begin, begin + count)]


def create(world: World, count: int, import_id: str = "batch-7") -> Image:
    made: Image = world.do(ask.CreateDeviceImport(PUMP, import_id, Image(row_count=count, display_name="b.csv")))
    return made


def append(world: World, first: int, given_rows: list[Row]) -> Image:
    image: Image = world.do(ask.AppendDeviceImportRows(NAME, first, tuple(given_rows)))
    return image


def judged(world: World) -> Image:
    world.do(ask.ValidateDeviceImport(NAME, ""))
    world.work()
    return now(world)


def committed(world: World, *, skip_problems: bool = False) -> Image:
    world.do(ask.CommitDeviceImport(NAME, "", skip_problems))
    world.work()
    return now(world)


def now(world: World, name: str = NAME) -> Image:
    found = find(world.state.imports, name)
    assert found is not None
    return found


def verdicts(world: World, *, all_rows: bool = False) -> list[tuple[int, str]]:
    request = imports_pb.ListDeviceImportVerdictsRequest(parent=NAME, page_size=2)
    found: list[tuple[int, str]] = []
    while True:
        walk = views.verdicts(world.state, now(world), all_rows=all_rows)
        page, request.page_token = page_in_order(walk, request)
        found += [(one.row, one.code) for one in page]
        if not request.page_token:
            return found


def made(world: World) -> dict[str, pb.Device]:
    return {device.identifier: device for device in shelf(world.state.devices, f"{PUMP}/devices").values()}


def test_rows_become_devices_once(world: World) -> None:
    image = create(world, 3)
    assert (image.state, image.next_row, image.etag) == (Image.STATE_UPLOADING, 0, "1")
    assert append(world, 0, rows(3)).next_row == 3
    image = judged(world)
    assert (image.state, image.validated_count, image.problem_count) == (Image.STATE_VALIDATED, 3, 0)
    assert not made(world), "a dry run creates nothing"
    image = committed(world)
    assert (image.state, image.created_count, image.failed_count) == (Image.STATE_COMPLETED, 3, 0)
    device = made(world)["SN-1"]
    assert (list(device.tags), device.cohort) == (["a", "b"], f"{PUMP}/cohorts/canary")
    assert world.changes()[-3:] == ["device.created"] * 3
    assert len({one.uid for one in made(world).values()}) == 3
    seen = world.events
    world.do(ask.CommitDeviceImport(NAME, "", skip_problems=False))
    assert world.events == seen, "a repeated commit changes nothing"
    assert not world.state.uploads[NAME].rows, "rows do not stay in the state"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_arrive_in_any_order_and_any_number_of_times(data: st.DataObject) -> None:
    """Whatever ranges are sent, in whatever order, and wherever the commit breaks off: each row is made once."""
    world = furnished()
    count = data.draw(st.integers(1, 12))
    sent = rows(count)
    create(world, count)
    arrived: set[int] = set()
    ranges = st.tuples(st.integers(0, count - 1), st.integers(1, count)).map(lambda r: (r[0], min(count, r[0] + r[1])))
    for begin, end in data.draw(st.lists(ranges, max_size=10)):
        image = append(world, begin, sent[begin:end])
        arrived.update(range(begin, end))
        assert image.received_count == len(arrived)
        assert image.next_row == next(number for number in range(count + 1) if number not in arrived)
    if len(arrived) < count:
        error = world.refused(FailedPreconditionError, "IMPORT_INCOMPLETE", ask.ValidateDeviceImport(NAME, ""))
        first = int(error.metadata["next_row"])
        assert first not in arrived
        while (image := now(world)).next_row < count:
            append(world, image.next_row, sent[image.next_row : image.next_row + 5])
    assert judged(world).problem_count == 0
    world.do(ask.CommitDeviceImport(NAME, "", skip_problems=False))
    task = next(iter(world.tasks.values()))
    for _ in range(data.draw(st.integers(1, 4))):
        # A task that is run again after a fail-over asks for a run that may be done already.
        world.do(ask.AdvanceDeviceImport(task.payload.decode()), "task")
    world.work()
    assert sorted(made(world)) == sorted(row.identifier for row in sent)
    assert world.changes().count("device.created") == count
    assert now(world).created_count == count


def test_long_imports_go_on_in_runs_of_at_most_500_events(world: World) -> None:
    count = 2 * imports.MADE_AT_ONCE + 3
    create(world, count)
    for begin in range(0, count, 400):
        append(world, begin, rows(count)[begin : begin + 400])
    judged(world)
    world.do(ask.CommitDeviceImport(NAME, "", skip_problems=False))
    runs = []
    while world.tasks:
        before = world.events
        world.do(ask.AdvanceDeviceImport(NAME), "task")
        runs.append(world.events - before)
    assert runs == [500, 500, 4]
    assert len(made(world)) == count


def test_other_words_for_a_row_are_refused(world: World) -> None:
    create(world, 3)
    append(world, 0, rows(2))
    error = world.refused(
        AlreadyExistsError, "IMPORT_ROWS_CONFLICT", ask.AppendDeviceImportRows(NAME, 1, tuple(rows(2, begin=5)))
    )
    assert error.metadata["row"] == "1"
    beyond = ask.AppendDeviceImportRows(NAME, 2, tuple(rows(2)))
    world.refused(InvalidArgumentError, "INVALID_FIELD", beyond)
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.AppendDeviceImportRows(NAME, 0, ()))
    absent = ask.AppendDeviceImportRows(f"{PUMP}/deviceImports/none", 0, tuple(rows(1)))
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", absent)


def problematic(world: World) -> list[Row]:
    world.do(ask.CreateDevice(f"{ORG}/products/valve", "taken", pb.Device()))
    world.do(ask.CreateDevice(PUMP, "there", pb.Device(tags=["x"], description="d")))
    world.do(ask.CreateDevice(PUMP, "differs", pb.Device(tags=["x"])))
    world.do(ask.CreateDevice(PUMP, "gone", pb.Device()))
    world.do(ask.RetireDevice(f"{PUMP}/devices/gone", ""))
    return [
        Row(identifier="good"),
        Row(identifier="no spaces"),
        Row(identifier="good", target="again"),
        Row(identifier="tagged", tags=["not a tag"]),
        Row(identifier="aimed", target="not/a/target"),
        Row(identifier="lost", cohort="nowhere"),
        Row(identifier="strayed", cohort=f"{ORG}/products/valve/cohorts/other"),
        Row(identifier="taken"),
        Row(identifier="there", tags=["x"], description="d"),
        Row(identifier="differs"),
        Row(identifier="gone"),
        Row(identifier="", description="nobody"),
    ]


CODES = [
    "OK",
    "INVALID_FIELD",
    "DUPLICATE_ROW",
    "INVALID_FIELD",
    "INVALID_FIELD",
    "RESOURCE_NOT_FOUND",
    "INVALID_FIELD",
    "DEVICE_IDENTIFIER_TAKEN",
    "UNCHANGED",
    "DEVICE_EXISTS",
    "DEVICE_RETIRED",
    "INVALID_FIELD",
]


def test_every_row_has_its_verdict(world: World) -> None:
    given_rows = problematic(world)
    create(world, len(given_rows))
    append(world, 0, given_rows)
    image = judged(world)
    assert (image.problem_count, image.unchanged_count) == (10, 1)
    assert verdicts(world, all_rows=True) == list(enumerate(CODES))
    assert verdicts(world) == [(row, code) for row, code in enumerate(CODES) if code not in ("OK", "UNCHANGED")]
    error = world.refused(
        FailedPreconditionError, "IMPORT_HAS_PROBLEMS", ask.CommitDeviceImport(NAME, "", skip_problems=False)
    )
    assert error.metadata["problems"] == "10"
    image = committed(world, skip_problems=True)
    assert (image.created_count, image.unchanged_count, image.failed_count) == (1, 1, 10)
    assert sorted(made(world)) == ["differs", "gone", "good", "there"]
    assert len(verdicts(world)) == 10, "problems stay to be read"
    error = world.refused_view(lambda: verdicts(world, all_rows=True))
    assert error.reason == "WRONG_STATE"


def test_the_commit_judges_the_fleet_as_it_is_then(world: World) -> None:
    create(world, 2)
    append(world, 0, rows(2))
    judged(world)
    world.do(ask.CreateDevice(PUMP, "SN-0", pb.Device()))
    image = committed(world)
    assert (image.created_count, image.failed_count) == (1, 1)
    assert verdicts(world) == [(0, "DEVICE_EXISTS")]


def test_a_second_import_of_the_same_rows_changes_nothing(world: World) -> None:
    create(world, 2)
    append(world, 0, rows(2))
    judged(world)
    committed(world)
    before = made(world)
    world.do(ask.DeleteDeviceImport(NAME, ""))
    create(world, 2)
    append(world, 0, rows(2))
    assert judged(world).unchanged_count == 2
    assert (committed(world).created_count, made(world)) == (0, before)


def test_a_dry_run_may_be_repeated_after_putting_things_right(world: World) -> None:
    create(world, 1)
    append(world, 0, [Row(identifier="SN-0", cohort="late")])
    assert judged(world).problem_count == 1
    world.do(ask.CreateCohort(PUMP, "late", pb.Cohort()))
    assert judged(world).problem_count == 0
    assert verdicts(world) == []


def test_the_quota_of_devices_holds_for_rows(world: World) -> None:
    world.registry = Registry(Quotas(devices=3))
    world.do(ask.CreateDevice(PUMP, "there", pb.Device()))
    create(world, 4)
    append(world, 0, rows(4))
    assert judged(world).problem_count == 2
    assert verdicts(world) == [(2, "QUOTA_EXCEEDED"), (3, "QUOTA_EXCEEDED")]
    assert committed(world, skip_problems=True).created_count == 2
    assert world.state.active_devices["acme"] == 3


def test_only_a_judged_import_is_committed(world: World) -> None:
    create(world, 1)
    append(world, 0, rows(1))
    early = ask.CommitDeviceImport(NAME, "", skip_problems=True)
    world.refused(FailedPreconditionError, "WRONG_STATE", early)
    world.do(ask.ValidateDeviceImport(NAME, ""))
    world.refused(FailedPreconditionError, "WRONG_STATE", early)
    assert append(world, 0, rows(1)).state == Image.STATE_VALIDATING, "what is there already changes nothing"
    world.work()
    world.refused(AbortedError, "ETAG_MISMATCH", ask.CommitDeviceImport(NAME, "1", skip_problems=True))


@pytest.mark.parametrize("when", ["uploading", "validating", "validated", "committing"])
def test_an_import_is_stopped_at_any_time(world: World, when: str) -> None:
    count = imports.MADE_AT_ONCE + 1
    create(world, count)
    append(world, 0, rows(count))
    if when != "uploading":
        world.do(ask.ValidateDeviceImport(NAME, ""))
    if when in ("validated", "committing"):
        world.work()
    if when == "committing":
        world.do(ask.CommitDeviceImport(NAME, "", skip_problems=False))
        world.do(ask.AdvanceDeviceImport(NAME), "task")
    image = world.do(ask.CancelDeviceImport(NAME, "", "the wrong file"))
    assert (image.state, image.state_reason) == (Image.STATE_CANCELLED, "the wrong file")
    assert not world.tasks
    assert not world.state.uploads[NAME].rows
    seen = world.events
    world.do(ask.AdvanceDeviceImport(NAME), "task")
    assert world.do(ask.CancelDeviceImport(NAME, "", "again")) == image
    assert world.events == seen
    assert len(made(world)) == (imports.MADE_AT_ONCE if when == "committing" else 0)
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.AppendDeviceImportRows(NAME, 0, tuple(rows(1))))
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.ValidateDeviceImport(NAME, ""))


def test_what_has_ended_is_not_stopped_and_what_has_not_is_not_deleted(world: World) -> None:
    create(world, 1)
    append(world, 0, rows(1))
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.DeleteDeviceImport(NAME, ""))
    judged(world)
    committed(world)
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.CancelDeviceImport(NAME, "", ""))
    world.refused(AbortedError, "ETAG_MISMATCH", ask.DeleteDeviceImport(NAME, "1"))
    world.do(ask.DeleteDeviceImport(NAME, ""))
    assert NAME not in world.state.uploads
    assert not world.timers
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.DeleteDeviceImport(NAME, ""))


def test_an_import_that_nobody_commits_ends_and_is_forgotten(world: World) -> None:
    create(world, 2)
    append(world, 0, rows(1))
    world.wait(7 * DAY_MS - 1)
    assert now(world).state == Image.STATE_UPLOADING
    world.wait(1)
    assert (now(world).state, now(world).state_reason.split(":")[0]) == (Image.STATE_CANCELLED, "expired")
    world.wait(30 * DAY_MS)
    assert find(world.state.imports, NAME) is None
    assert not world.timers


def test_only_some_of_the_problems_stay_for_good(world: World) -> None:
    count = PROBLEMS_KEPT + 10
    create(world, count)
    for begin in range(0, count, 500):
        append(world, begin, [Row(identifier="same")] * min(500, count - begin))
    assert judged(world).problem_count == count - 1
    assert len(world.state.uploads[NAME].problems) == count - 1
    assert committed(world, skip_problems=True).failed_count == count - 1
    assert len(world.state.uploads[NAME].problems) == PROBLEMS_KEPT


def test_imports_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, imports.ROWS_MOST + 1):
        command = ask.CreateDeviceImport(PUMP, "x", Image(row_count=count))
        world.refused(InvalidArgumentError, "INVALID_FIELD", command)
    world.registry = Registry(Quotas(device_imports=1))
    create(world, 3)
    again = ask.CreateDeviceImport(PUMP, "batch-7", Image(row_count=3))
    world.refused(AlreadyExistsError, "ALREADY_EXISTS", again)
    second = ask.CreateDeviceImport(PUMP, "second", Image(row_count=3))
    error = world.refused(ResourceExhaustedError, "QUOTA_EXCEEDED", second)
    assert error.metadata["quota"] == "device_imports"
    monkeypatch.setattr(imports, "BYTES_MOST", 2 * rows(1)[0].ByteSize())
    append(world, 0, rows(2))
    third = ask.AppendDeviceImportRows(NAME, 2, tuple(rows(1)))
    error = world.refused(ResourceExhaustedError, "QUOTA_EXCEEDED", third)
    assert error.metadata["quota"] == "device_import_bytes"


def test_large_rows_are_spread_over_events(world: World) -> None:
    wide = [Row(identifier=f"SN-{n}", description="d" * 1000, tags=["t" * 120] * 60) for n in range(200)]
    create(world, 200)
    before = world.events
    image = append(world, 0, wide)
    assert world.events - before == -(-sum(row.ByteSize() for row in wide) // imports.EVENT_BYTES)
    assert (image.received_count, now(world).etag) == (200, image.etag)


def test_an_archived_product_takes_no_import(world: World) -> None:
    create(world, 1)
    append(world, 0, rows(1))
    judged(world)
    world.do(ask.ArchiveProduct(PUMP, "", archived=True))
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.CreateDeviceImport(PUMP, "x", Image(row_count=1)))
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.CommitDeviceImport(NAME, "", skip_problems=False))


# The file.


def test_a_file_is_read_as_people_write_it(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text('\ufeffidentifier,tags,description,cohort\nSN-1, a ; b;,"in the, cellar",beta\nSN-2,,,\n')
    assert read_rows(file) == [
        Row(identifier="SN-1", tags=["a", "b"], description="in the, cellar", cohort="beta"),
        Row(identifier="SN-2"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "identifier"),
        ("identifier\n", "0 rows"),
        ("name\nx\n", "does not know 'name'"),
        ("tags\nx\n", "identifier"),
        ("identifier,identifier\nx,y\n", "each column once"),
        ("identifier,tags\nSN-1\n", "line 2"),
        ("identifier\nSN-1,more\n", "line 2"),
        ('identifier\n"SN-1\n', "not CSV"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "devices.csv"
    file.write_text(text)
    with pytest.raises(CsvError, match=problem):
        read_rows(file)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_bytes("identifier,description\nSN-1,Küche\n".encode("latin-1"))
    with pytest.raises(CsvError, match="UTF-8"):
        read_rows(file)
