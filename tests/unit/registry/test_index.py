"""Devices in the order of names: the index says what sorting would, and a page costs what it shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from groundswell.registry.v1 import registry_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgumentError
from libs.rpc import page, page_in_order
from libs.rpc.commands import MAX_EXAMINED
from services.registry import domain as ask
from services.registry import views
from services.registry.domain import State
from services.registry.domain.index import RUN_LIMIT, DeviceIndex, Names, keys_of
from services.registry.domain.state import shelf
from tests.unit.registry.world import ORG, PUMP, furnished

COLLECTION = f"{PUMP}/devices"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60))), st.integers(-1, 61))
def test_names_are_a_sorted_set(steps: list[tuple[bool, int]], after: int) -> None:
    names, expected = Names(), set[str]()
    for add, number in steps:
        name = f"n{number:02d}"
        names = names.add(name) if add else names.remove(name)
        (expected.add if add else expected.discard)(name)
    assert list(names.after("")) == sorted(expected)
    assert names.size == len(expected)
    token = f"n{after:02d}" if after >= 0 else ""
    assert list(names.after(token)) == [name for name in sorted(expected) if name > token]


@pytest.mark.parametrize("step", [1, -1, 7919])
def test_runs_stay_short_and_what_was_read_stays(step: int) -> None:
    count = 3 * RUN_LIMIT
    names = Names()
    order = [f"{(number * step) % count:06d}" for number in range(count)]
    for name in order:
        names = names.add(name)
    assert list(names.after("")) == sorted(order)
    assert max(map(len, names.runs)) <= RUN_LIMIT
    read = names.after("")
    first = next(read)
    for name in order[:100]:
        names = names.remove(name)
    assert [first, *read] == sorted(order), "a reader's page does not move under it"
    assert list(names.after("")) == sorted(order[100:])


devices = st.builds(
    pb.Device,
    cohort=st.sampled_from(["", "one", "two"]),
    tags=st.lists(st.sampled_from("abc"), unique=True).map(sorted),
    quarantined=st.booleans(),
    state=st.sampled_from([pb.Device.STATE_ACTIVE, pb.Device.STATE_RETIRED]),
    reported=st.builds(pb.ReportedState, version=st.sampled_from(["", "1.0.0", "2.0.0"])),
)


@given(st.lists(st.tuples(st.integers(0, 9), devices)), st.sampled_from(["", "one", "two"]))
def test_each_index_holds_what_its_key_says(steps: list[tuple[int, pb.Device]], cohort: str) -> None:
    index, now = DeviceIndex(), dict[str, pb.Device]()
    for number, device in steps:
        name = f"{COLLECTION}/d{number}"
        index = index.moved(name, now.get(name), device)
        now[name] = device
    expected: dict[tuple[str, str, str], list[str]] = {}
    for name, device in sorted(now.items()):
        for key in keys_of(device, COLLECTION):
            expected.setdefault(key, []).append(name)
    assert {key: list(names.after("")) for key, names in index.names.items()} == expected
    clauses = [("cohort", "=", cohort), ("quarantined", "=", "true")]
    assert index.shortest(COLLECTION, clauses).size <= index.of((COLLECTION, "", "")).size


@pytest.fixture(scope="module")
def fleet() -> State:
    world = furnished()
    for number in range(600):
        world.do(ask.CreateDevice(PUMP, f"SN-{number * 7919 % 600:04d}", pb.Device(tags=[f"t{number % 50}"])))
    for number in range(0, 600, 100):
        world.do(ask.RetireDevice(f"{COLLECTION}/SN-{number:04d}", ""))
    cohort = f"{PUMP}/cohorts/canary"
    for number in range(0, 600, 60):
        name = f"{COLLECTION}/SN-{number + 1:04d}"
        wanted = pb.Device(name=name, cohort=cohort, quarantined=number == 0, quarantine_reason="smoke")
        world.do(ask.UpdateDevice(wanted, ("cohort", "quarantined", "quarantine_reason")))
    return world.state


FILTERS = [
    "",
    'cohort = "{}/cohorts/canary"',
    "tags : t7",
    'tags = t7 AND cohort = "{}/cohorts/canary"',
    "state = RETIRED",
    "state = ACTIVE",
    "quarantined = true",
    "quarantined = false",
    'reported.version = ""',
    'description : "x"',
    "tags : nothing",
    'cohort = ""',
]


@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_indexed_list_is_what_a_sorted_one_would_be(fleet: State, filter_: str, size: int) -> None:
    request = pb.ListDevicesRequest(parent=PUMP, page_size=1000, filter=filter_.format(PUMP))
    sorted_list, _ = page(shelf(fleet.devices, COLLECTION).items(), request)
    request.page_size = size
    found: list[pb.Device] = []
    while True:
        devices_, request.page_token = page_in_order(views.devices(fleet, request), request)
        assert len(devices_) <= size
        found += devices_
        if not request.page_token:
            break
    assert found == sorted_list


def counted(names: Iterator[tuple[str, pb.Device]], seen: list[str]) -> Iterator[tuple[str, pb.Device]]:
    for name, device in names:
        seen.append(name)
        yield name, device


@pytest.mark.parametrize(("filter_", "most"), [("", 11), ("tags : t7", 12), ("quarantined = true", 1)])
def test_a_page_walks_no_further_than_it_shows(fleet: State, filter_: str, most: int) -> None:
    request = pb.ListDevicesRequest(parent=PUMP, page_size=10, filter=filter_)
    walk, seen = views.devices(fleet, request), list[str]()
    page_in_order(lambda after: counted(walk(after), seen), request)
    assert len(seen) <= most


def test_a_filter_that_nothing_matches_holds_nobody_up() -> None:
    request = pb.ListDevicesRequest(parent=PUMP, filter="description = x")
    seen = list[str]()

    def walk(after: str) -> Iterator[tuple[str, pb.Device]]:
        numbers = itertools.count(int(after) + 1 if after else 0)
        many = ((f"{number:09d}", pb.Device()) for number in numbers)
        return counted(itertools.takewhile(lambda item: item[0] < f"{2 * MAX_EXAMINED:09d}", many), seen)

    found, token = page_in_order(walk, request)
    assert (found, len(seen)) == ([], MAX_EXAMINED + 1)
    request.page_token = token
    assert page_in_order(walk, request)[0] == []
    assert seen[MAX_EXAMINED + 1] == seen[MAX_EXAMINED], "the token goes on where the page ended"


def test_a_token_is_checked() -> None:
    request = pb.ListDevicesRequest(parent=ORG, page_token="ä")
    with pytest.raises(InvalidArgumentError):
        page_in_order(lambda _: iter(()), request)
