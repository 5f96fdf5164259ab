"""Rules of single decisions."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import events_pb2 as events
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.eventlog import Event
from services.releases.domain import CreateRelease, DeleteRelease, Promote, SetManaged, UpdateRelease
from services.releases.overrides import ChangeDevices, CreateOverride, DeleteOverride, UpdateOverride
from tests.unit.releases.world import (
    COHORT,
    NOW,
    PRODUCT,
    ROLLOUT,
    Fold,
    bundle_image,
    bundle_of,
    device_image,
    links,
    name_of,
    rollout_image,
)

SOON = Timestamp(seconds=NOW // 1000 + 60)
SHARE = pb.Phase(share_ppm=100_000)


@pytest.fixture
def fold() -> Fold:
    return Fold()


def create(name: str, previous: str = "", ahead: str = "", **fields: Any) -> CreateRelease:
    release = pb.Release(**{"name": name_of(name), "bundle": bundle_of("b")} | fields)
    release.next = name_of(ahead) if ahead else ""
    return CreateRelease(release, name_of(previous) if previous else "")


def update(name: str, *paths: str, **fields: Any) -> UpdateRelease:
    return UpdateRelease(pb.Release(name=name_of(name), **fields), paths)


def chain(fold: Fold, *names: str) -> None:
    for name in names:
        fold.do(create(name))


def test_insert_with_neither_pointer_becomes_the_latest(fold: Fold) -> None:
    chain(fold, "a", "b", "c")
    assert links(fold.graph) == {"a": "b", "b": "c", "c": ""}


def test_insert_with_next_goes_before_it(fold: Fold) -> None:
    chain(fold, "a", "b")
    fold.do(create("x", ahead="b"))
    assert links(fold.graph) == {"a": "b", "x": "b", "b": ""}


def test_insert_with_next_and_previous_goes_between(fold: Fold) -> None:
    chain(fold, "a", "b")
    fold.do(create("x", "a", "b"))
    assert links(fold.graph) == {"a": "x", "x": "b", "b": ""}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (create("x", ahead="nowhere"), "NEXT_UNKNOWN"),
        (create("x", previous="a"), "INVALID_FIELD"),
        (create("x", "a", "c"), "PREVIOUS_NOT_ADJACENT"),
        (create("x", "nowhere", "c"), "PREVIOUS_NOT_ADJACENT"),
        (create("x", ahead="c", phase=SHARE), "ONLY_LATEST_PHASED"),
        (create("x", ahead="c", schedule_time=SOON), "ONLY_LATEST_PHASED"),
        (create("a"), "ALREADY_EXISTS"),
        (create("x", version="1.0"), "INVALID_FIELD"),
        (create("x", version_requirement=">=1.0.0"), "INVALID_FIELD"),
        (create("x", phase=pb.Phase()), "INVALID_FIELD"),
        (create("x", phase=pb.Phase(share_ppm=1, count=1)), "INVALID_FIELD"),
        (create("x", phase=pb.Phase(share_ppm=1_000_001)), "INVALID_FIELD"),
        (create("x", phase=pb.Phase(count=1_000_000_001)), "INVALID_FIELD"),
        (create("x", phase=pb.Phase(tags=[""])), "INVALID_FIELD"),
        (create("x", description="x" * 257), "INVALID_FIELD"),
        (create("x", schedule_time=Timestamp(seconds=-1)), "INVALID_FIELD"),
        (create("x", rollout=ROLLOUT, phase=SHARE), "INVALID_FIELD"),
        (create("x", rollout=ROLLOUT, schedule_time=SOON), "INVALID_FIELD"),
        (update("a", "next", next=name_of("a")), "GRAPH_WOULD_BREAK"),
        (update("c", "next", next=name_of("a")), "GRAPH_WOULD_BREAK"),
        (update("a", "next"), "GRAPH_WOULD_BREAK"),
        (update("a", "next", next=name_of("nowhere")), "GRAPH_WOULD_BREAK"),
        (update("a", "phase", phase=SHARE), "ONLY_LATEST_PHASED"),
        (update("a", "schedule_time", schedule_time=SOON), "ONLY_LATEST_PHASED"),
        (update("a", "bundle", bundle="x"), "INVALID_FIELD"),
        (update("a"), "INVALID_FIELD"),
        (update("nowhere", "required"), "RESOURCE_NOT_FOUND"),
        (DeleteRelease(name_of("nowhere"), "", force=False, reason=""), "RESOURCE_NOT_FOUND"),
    ],
)
def test_refusals_change_nothing(fold: Fold, command: object, reason: str) -> None:
    chain(fold, "a", "b", "c")
    assert fold.refused(command) == reason


@pytest.mark.parametrize("limit", [{"phase": SHARE}, {"schedule_time": SOON}, {"phase": pb.Phase(tags=["lab"])}])
def test_no_newer_release_while_the_latest_is_phased_or_scheduled(fold: Fold, limit: dict[str, Any]) -> None:
    fold.do(create("a", **limit))
    assert fold.refused(create("b")) == "LATEST_IS_PHASED"
    assert fold.refused(create("b", rollout=ROLLOUT)) == "LATEST_IS_PHASED"
    fold.do(update("a", "phase", "schedule_time"))
    fold.do(create("b"))


def test_a_schedule_that_has_passed_holds_nothing_back(fold: Fold) -> None:
    fold.do(create("a", schedule_time=SOON))
    fold.inputs.now_ms = SOON.ToMilliseconds()
    fold.do(create("b"))
    assert links(fold.graph) == {"a": "b", "b": ""}


def test_a_share_of_all_is_final(fold: Fold) -> None:
    fold.do(create("a", phase=SHARE))
    fold.do(update("a", "phase", phase=pb.Phase(count=5)))
    fold.do(update("a", "phase", phase=pb.Phase(share_ppm=1_000_000)))
    assert fold.refused(update("a", "phase", phase=SHARE)) == "PHASE_IS_FINAL"
    assert fold.refused(update("a", "phase")) == "PHASE_IS_FINAL"
    fold.do(update("a", "phase", "required", phase=pb.Phase(share_ppm=1_000_000), required=True))
    fold.do(create("b"))


def test_an_update_that_changes_nothing_writes_nothing(fold: Fold) -> None:
    fold.do(create("a", description="why"))
    assert fold.do(update("a", "description", "disabled", description="why")).events == ()


def test_lowering_a_share_to_nothing_does_not_open_the_release_to_all(fold: Fold) -> None:
    fold.do(create("a", phase=SHARE))
    assert fold.refused(update("a", "phase", phase=pb.Phase(share_ppm=0))) == "INVALID_FIELD"


def test_delete_relinks_what_led_to_it(fold: Fold) -> None:
    chain(fold, "a", "b", "c")
    fold.do(create("x", ahead="b"))
    decision = fold.do(DeleteRelease(name_of("b"), "", force=False, reason=""))
    assert links(fold.graph) == {"a": "c", "x": "c", "c": ""}
    public = decision.events[0].public[0].payload
    assert isinstance(public, events.GraphChanged)
    assert (public.change, public.subject, len(public.releases)) == ("release.deleted", name_of("b"), 3)


def test_delete_of_the_latest_moves_it_back_unless_two_lead_to_it(fold: Fold) -> None:
    chain(fold, "a", "b")
    fold.do(DeleteRelease(name_of("b"), "", force=False, reason=""))
    assert links(fold.graph) == {"a": ""}
    chain(fold, "b")
    fold.do(create("x", ahead="b"))
    assert fold.refused(DeleteRelease(name_of("b"), "", force=False, reason="")) == "GRAPH_WOULD_BREAK"


def test_a_required_release_with_devices_behind_it_is_deleted_only_by_force_with_a_reason(fold: Fold) -> None:
    fold.do(create("o"))
    fold.do(create("a", required=True))
    chain(fold, "b")
    device = device_image("SN-1", release=name_of("o"))
    fold.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    for force, reason in ((False, ""), (True, ""), (False, "because")):
        assert fold.refused(DeleteRelease(name_of("a"), "", force, reason)) == "RELEASE_REQUIRED"
    decision = fold.do(DeleteRelease(name_of("a"), "", force=True, reason="never shipped"))
    saved = decision.events[0].payload
    assert isinstance(saved, events.ReleasesSaved)
    assert saved.reason == "never shipped"


def test_a_required_release_that_all_devices_have_passed_is_deleted_like_any_other(fold: Fold) -> None:
    fold.do(create("o", version="1.0.0", version_requirement="< 1.0.0"))
    fold.do(create("a", required=True))
    fold.do(create("m", required=True))
    chain(fold, "b")
    delete = DeleteRelease(name_of("m"), "", force=False, reason="")
    device = device_image("SN-1", version="0.1.0")
    for reported in ({"version": "0.1.0"}, {"release": name_of("o")}, {"release": name_of("a")}):
        device.reported.CopyFrom(registry_pb2.ReportedState(**reported))
        fold.hear("registry", device.name, registry_events.DeviceChanged(device=device))
        assert fold.refused(delete) == "RELEASE_REQUIRED"
    device.reported.CopyFrom(registry_pb2.ReportedState(release=name_of("m")))
    fold.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    fold.do(delete)
    assert links(fold.graph) == {"o": "a", "a": "b", "b": ""}


def test_a_retired_device_and_one_of_another_cohort_hold_no_release_back(fold: Fold) -> None:
    chain(fold, "o")
    fold.do(create("a", required=True))
    for serial, fields in (("SN-1", {"state": registry_pb2.Device.STATE_RETIRED}), ("SN-2", {"cohort": f"{COHORT}x"})):
        device = device_image(serial, release=name_of("o"))
        fold.hear("registry", device.name, registry_events.DeviceChanged(device=device))
        device.MergeFrom(registry_pb2.Device(**fields))
        fold.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    fold.do(DeleteRelease(name_of("a"), "", force=False, reason=""))


def test_the_last_release_may_go_and_come_again(fold: Fold) -> None:
    chain(fold, "a")
    fold.do(DeleteRelease(name_of("a"), "", force=False, reason=""))
    assert fold.graph == {}
    chain(fold, "a")


def test_a_stale_etag_is_refused(fold: Fold) -> None:
    chain(fold, "a")
    assert fold.refused(update("a", "required", required=True, etag="7")) == "ETAG_MISMATCH"
    assert fold.refused(DeleteRelease(name_of("a"), "7", force=False, reason="")) == "ETAG_MISMATCH"


def test_the_public_record_is_the_whole_graph(fold: Fold) -> None:
    chain(fold, "a")
    event = fold.do(create("b")).events[0]
    (public,) = event.public
    assert public.resource == event.resource == COHORT
    assert isinstance(public.payload, events.GraphChanged)
    assert {one.name: one.next for one in public.payload.releases} == {name_of("a"): name_of("b"), name_of("b"): ""}
    assert public.payload.change == "release.created"
    assert all(one.uid for one in public.payload.releases)


def test_a_graph_stays_small_enough_to_be_published_whole(fold: Fold) -> None:
    count = 1000
    images = [
        pb.Release(
            name=name_of(f"r{index}"),
            bundle=bundle_of("b"),
            description="x" * 1000,
            next=name_of(f"r{index + 1}") if index + 1 < count else "",
        )
        for index in range(count)
    ]
    saved = events.ReleasesSaved(cohort=COHORT, releases=images)
    fold.state = fold.domain.evolve(fold.state, Event("acme", COHORT, 1, saved, NOW, "test"))
    assert fold.refused(create("more")) == "QUOTA_EXCEEDED"
    fold.state = fold.domain.evolve(
        fold.state,
        Event(
            "acme",
            COHORT,
            2,
            events.ReleasesSaved(cohort=COHORT, deleted=[image.name for image in images[:500]]),
            NOW,
            "test",
        ),
    )
    fold.do(create("more"))


# Managed releases.


def test_creating_a_managed_release_again_is_the_same_fact_and_another_is_a_conflict(fold: Fold) -> None:
    chain(fold, "a")
    command = create("m", rollout=ROLLOUT, version="2.0.0", security_version=1)
    first = fold.do(command)
    again = fold.do(command)
    assert again.events == ()
    assert again.result == first.result
    assert fold.refused(create("m", rollout=ROLLOUT, version="2.0.1", security_version=1)) == "RELEASE_CONFLICT"
    assert fold.refused(create("m", rollout=f"{ROLLOUT}x", version="2.0.0", security_version=1)) == "RELEASE_CONFLICT"
    assert fold.refused(create("a", rollout=ROLLOUT)) == "RELEASE_CONFLICT"


def test_only_its_rollout_steers_a_managed_release(fold: Fold) -> None:
    fold.do(create("m", rollout=ROLLOUT))
    chain(fold, "p")
    assert fold.refused(update("m", "disabled", disabled=True)) == "RELEASE_MANAGED"
    assert fold.refused(DeleteRelease(name_of("m"), "", force=True, reason="x")) == "RELEASE_MANAGED"
    assert fold.refused(SetManaged(name_of("m"), f"{ROLLOUT}x", "retract")) == "NOT_YOUR_RELEASE"
    assert fold.refused(SetManaged(name_of("p"), ROLLOUT, "retract")) == "NOT_YOUR_RELEASE"
    assert fold.refused(SetManaged(name_of("nowhere"), ROLLOUT, "retract")) == "RESOURCE_NOT_FOUND"


def test_retract_implies_disabled_and_is_idempotent(fold: Fold) -> None:
    fold.do(create("m", rollout=ROLLOUT))
    decision = fold.do(SetManaged(name_of("m"), ROLLOUT, "retract"))
    assert (fold.graph["m"].retracted, fold.graph["m"].disabled) == (True, True)
    public = decision.events[0].public[0].payload
    assert isinstance(public, events.GraphChanged)
    assert public.change == "release.retracted"
    again = fold.do(SetManaged(name_of("m"), ROLLOUT, "retract"))
    assert (again.events, again.result) == ((), fold.graph["m"])


def test_disable_and_hand_over_are_idempotent(fold: Fold) -> None:
    fold.do(create("m", rollout=ROLLOUT))
    for action in ("disable", "release"):
        assert len(fold.do(SetManaged(name_of("m"), ROLLOUT, action)).events) == 1
        assert fold.do(SetManaged(name_of("m"), ROLLOUT, action)).events == ()
        if action == "disable":
            assert fold.graph["m"].disabled
    assert fold.graph["m"].rollout == ""
    fold.do(update("m", "disabled"))
    assert not fold.graph["m"].disabled


def test_a_retracted_release_stays_disabled_when_it_has_become_a_plain_one(fold: Fold) -> None:
    fold.do(create("m", rollout=ROLLOUT))
    fold.do(SetManaged(name_of("m"), ROLLOUT, "retract"))
    fold.do(SetManaged(name_of("m"), ROLLOUT, "release"))
    assert fold.refused(update("m", "disabled")) == "RELEASE_RETRACTED"
    fold.do(update("m", "description", description="why"))
    assert fold.graph["m"].retracted


# Overrides.


def override(name: str = "o", **fields: Any) -> CreateOverride:
    image = pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/{name}", bundle=bundle_of("b"), **fields)
    return CreateOverride(image)


def test_an_override_begins_now_unless_said_otherwise(fold: Fold) -> None:
    devices = [f"{PRODUCT}/devices/{serial}" for serial in ("b", "a", "b")]
    decision = fold.do(override(devices=devices))
    (made,) = fold.state.overrides.values()
    assert made.start_time.ToMilliseconds() == NOW
    assert list(made.devices) == sorted(set(devices))
    public = decision.events[0].public[0].payload
    assert isinstance(public, events.BundleOverrideChanged)
    assert (public.change, public.deleted, public.bundle_override) == ("bundle_override.created", False, made)
    gone = fold.do(DeleteOverride(made.name, ""))
    assert len(fold.state.overrides) == 0
    assert gone.events[0].public[0].payload.deleted  # type: ignore[attr-defined]
    assert fold.refused(DeleteOverride(made.name, "")) == "RESOURCE_NOT_FOUND"


@pytest.mark.parametrize(
    "fields",
    [
        {"start_time": SOON, "end_time": SOON},
        {"end_time": Timestamp(seconds=NOW // 1000)},
        {"end_time": Timestamp(seconds=253_402_300_800)},
        {"devices": ["organizations/acme/products/other/devices/a"]},
        {"devices": [f"{PRODUCT}/cohorts/a"]},
        {"devices": [f"{PRODUCT}/devices/"]},
    ],
)
def test_overrides_that_are_refused(fold: Fold, fields: dict[str, Any]) -> None:
    assert fold.refused(override(**fields)) == "INVALID_FIELD"


def test_an_override_exists_once(fold: Fold) -> None:
    fold.do(override())
    assert fold.refused(override()) == "ALREADY_EXISTS"


def test_an_override_stays_small_enough_to_be_published(fold: Fold) -> None:
    devices = [f"{PRODUCT}/devices/{index:0100}" for index in range(8000)]
    assert fold.refused(override(devices=devices)) == "QUOTA_EXCEEDED"


def change(**fields: Any) -> UpdateOverride:
    image = pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/o", **fields)
    return UpdateOverride(image, tuple(path for path in fields if path != "etag"))


def test_every_field_of_an_override_is_edited_at_any_time(fold: Fold) -> None:
    fold.do(override(devices=[f"{PRODUCT}/devices/a"], end_time=SOON))
    fold.inputs.now_ms = SOON.ToMilliseconds() + 1
    later, end = Timestamp(seconds=SOON.seconds + 9), Timestamp(seconds=SOON.seconds + 10)
    devices = [f"{PRODUCT}/devices/{serial}" for serial in ("c", "b", "b")]
    decision = fold.do(change(bundle=bundle_of("b2"), start_time=later, end_time=end, devices=devices))
    (made,) = fold.state.overrides.values()
    assert (made.bundle, made.start_time, made.end_time) == (bundle_of("b2"), later, end)
    assert list(made.devices) == sorted(set(devices))
    assert made.create_time.ToMilliseconds() == NOW
    assert decision.events[0].public[0].payload.change == "bundle_override.updated"  # type: ignore[attr-defined]
    fold.do(UpdateOverride(pb.BundleOverride(name=made.name), ("end_time", "devices")))
    (made,) = fold.state.overrides.values()
    assert (made.HasField("end_time"), list(made.devices), made.bundle) == (False, [], bundle_of("b2"))


def test_a_mask_changes_only_what_it_names(fold: Fold) -> None:
    fold.do(override(devices=[f"{PRODUCT}/devices/a"]))
    image = pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/o", bundle=bundle_of("b2"), create_time=SOON)
    fold.do(UpdateOverride(image, ("bundle",)))
    (made,) = fold.state.overrides.values()
    assert (made.bundle, list(made.devices)) == (bundle_of("b2"), [f"{PRODUCT}/devices/a"])
    assert made.create_time.ToMilliseconds() == NOW
    assert fold.do(UpdateOverride(image, ("bundle",))).events == ()


def test_devices_are_added_and_removed_one_by_one(fold: Fold) -> None:
    fold.do(override())
    a, b, c = (f"{PRODUCT}/devices/{serial}" for serial in "abc")
    name = f"{PRODUCT}/bundleOverrides/o"

    def devices() -> list[str]:
        return list(fold.state.overrides[name].devices)

    fold.do(ChangeDevices(name, "", add=(b, a)))
    assert devices() == [a, b]
    assert fold.do(ChangeDevices(name, "", add=(a,))).events == ()
    fold.do(ChangeDevices(name, "", add=(c,)))
    fold.do(ChangeDevices(name, "", remove=(a, b)))
    assert devices() == [c]
    assert fold.do(ChangeDevices(name, "", remove=(a,))).events == ()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (change(etag="7", bundle=bundle_of("b")), "ETAG_MISMATCH"),
        (change(end_time=Timestamp(seconds=NOW // 1000)), "INVALID_FIELD"),
        (change(devices=["organizations/acme/products/other/devices/a"]), "INVALID_FIELD"),
        (UpdateOverride(pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/o"), ()), "INVALID_FIELD"),
        (UpdateOverride(pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/o"), ("name",)), "INVALID_FIELD"),
        (UpdateOverride(pb.BundleOverride(name=f"{PRODUCT}/bundleOverrides/x"), ("bundle",)), "RESOURCE_NOT_FOUND"),
        (ChangeDevices(f"{PRODUCT}/bundleOverrides/o", "7", add=(f"{PRODUCT}/devices/a",)), "ETAG_MISMATCH"),
        (ChangeDevices(f"{PRODUCT}/bundleOverrides/o", "", add=(f"{PRODUCT}/devices/a/b",)), "INVALID_FIELD"),
        (ChangeDevices(f"{PRODUCT}/bundleOverrides/o", "", remove=(COHORT,)), "INVALID_FIELD"),
        (ChangeDevices(f"{PRODUCT}/bundleOverrides/x", "", add=(f"{PRODUCT}/devices/a",)), "RESOURCE_NOT_FOUND"),
    ],
)
def test_edits_of_an_override_that_are_refused(fold: Fold, command: object, reason: str) -> None:
    fold.do(override())
    assert fold.refused(command) == reason


# Promotion.


def test_promoting_again_is_the_same_fact_whatever_was_edited_since(fold: Fold) -> None:
    chain(fold, "a")
    wanted = pb.Release(name=name_of("p"), bundle=bundle_of("b"), version="2.0.0", required=True, phase=SHARE)
    first = fold.do(Promote(wanted))
    assert fold.graph["p"].phase == SHARE
    fold.do(update("p", "phase", "description", description="open to all"))
    again = fold.do(Promote(wanted))
    assert (again.events, first.result.name) == ((), name_of("p"))  # type: ignore[union-attr]
    assert fold.refused(Promote(pb.Release(name=name_of("p"), bundle=bundle_of("b2")))) == "RELEASE_CONFLICT"
    fold.do(update("p", "phase", phase=SHARE))
    assert fold.refused(Promote(pb.Release(name=name_of("q"), bundle=bundle_of("b")))) == "LATEST_IS_PHASED"


# What neighbours say.


def test_only_what_decides_is_taken_in(fold: Fold) -> None:
    device = device_image("SN-1", version="1.0.0")
    assert len(fold.hear("registry", device.name, registry_events.DeviceChanged(device=device)).events) == 1
    device.description = "renamed"
    assert fold.hear("registry", device.name, registry_events.DeviceChanged(device=device)).events == ()
    device.quarantined = True
    assert len(fold.hear("registry", device.name, registry_events.DeviceChanged(device=device)).events) == 1
    assert fold.state.devices[device.name].quarantined
    image = bundle_image("b", "1.0.0")
    assert len(fold.hear("artifacts", image.name, artifacts_events.BundleChanged(bundle=image)).events) == 1
    image.etag = "9"
    assert fold.hear("artifacts", image.name, artifacts_events.BundleChanged(bundle=image)).events == ()
    plan = rollout_image(rollout_pb2.Rollout.STATE_RUNNING, True, False)
    assert len(fold.hear("rollout", ROLLOUT, rollout_events.RolloutChanged(rollout=plan)).events) == 1
    plan.stage_statuses[0].confirmed = 7
    assert fold.hear("rollout", ROLLOUT, rollout_events.RolloutChanged(rollout=plan)).events == ()


def test_all_other_records_of_neighbours_are_understood_and_ignored(fold: Fold) -> None:
    before = fold.state
    for service, types in fold.domain.sources.items():
        for kind in types:
            if kind.DESCRIPTOR.name not in ("DeviceChanged", "BundleChanged", "RolloutChanged"):
                assert fold.hear(service, "organizations/acme", kind()).events == ()
    assert fold.state is before
