"""Promotion, graphs, supposed devices, explanations and edits of overrides, through the servicer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.registry.v1 import registry_pb2
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from libs.resolution import Code
from libs.resolution.convert import reason_of
from libs.rpc.identity import Principal, set_caller
from services.releases.explain import REMEDIES
from tests.unit.releases.world import (
    COHORT,
    NOW,
    PRODUCT,
    ROLLOUT,
    World,
    bundle_image,
    bundle_of,
    device_image,
    name_of,
    refusal,
    rollout_image,
    world,
)
from tests.unit.resolution.test_codes import EXAMPLES

BETA = f"{PRODUCT}/cohorts/beta"
FOREIGN = "organizations/acme/products/other/cohorts/beta"


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        made.references.cohorts |= {BETA, FOREIGN}
        yield made


async def has_device(here: World, serial: str, **reported: Any) -> str:
    device = device_image(serial, **reported)
    await here.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    return device.name


async def has_bundles(here: World, *bundles: str, offerable: bool = True) -> None:
    for name in bundles:
        image = bundle_image(name, "1.0.0", offerable=offerable)
        await here.hear("artifacts", image.name, artifacts_events.BundleChanged(bundle=image))


def promotion(release: str, **fields: Any) -> pb.PromoteReleaseRequest:
    return pb.PromoteReleaseRequest(**{"name": name_of(release), "cohort": BETA} | fields)


async def test_a_release_is_promoted_to_another_cohort_once(here: World) -> None:
    here.references.bundles[bundle_of("b0")].security_version = 3
    await here.create("a", version="1.0.0", version_requirement="< 1.0.0", required=True, description="why")
    made = await here.public.PromoteRelease(promotion("a", phase=pb.Phase(share_ppm=1000)), here.context)
    assert made.name == f"{BETA}/releases/a"
    assert (made.bundle, made.version, made.version_requirement) == (bundle_of("b0"), "1.0.0", "< 1.0.0")
    assert (made.security_version, made.required, made.description) == (3, True, "why")
    assert made.phase.share_ppm == 1000
    assert made.uid != (await here.public.GetRelease(pb.GetReleaseRequest(name=name_of("a")), here.context)).uid
    here.references.bundles[bundle_of("b0")].offerable = False
    assert await here.public.PromoteRelease(promotion("a"), here.context) == made
    assert await refusal(here.public.PromoteRelease(promotion("a", release_id="x"), here.context)) == (
        "BUNDLE_NOT_OFFERABLE"
    )


async def test_promotions_that_are_refused(here: World) -> None:
    await here.create("a", version="1.0.0")
    await here.managed("m")
    assert await refusal(here.public.PromoteRelease(promotion("nowhere"), here.context)) == "RESOURCE_NOT_FOUND"
    unknown = promotion("a", cohort=f"{PRODUCT}/cohorts/unknown")
    assert await refusal(here.public.PromoteRelease(unknown, here.context)) == "RESOURCE_NOT_FOUND"
    other = promotion("a", cohort=FOREIGN)
    assert await refusal(here.public.PromoteRelease(other, here.context)) == "INVALID_FIELD"
    assert await refusal(here.public.PromoteRelease(promotion("a", cohort=COHORT, release_id="m"), here.context)) == (
        "RELEASE_CONFLICT"
    )
    await here.create("d", disabled=True)
    assert await refusal(here.public.PromoteRelease(promotion("d"), here.context)) == "RELEASE_DISABLED"
    await here.internal.RetractRelease(pb.RetractReleaseRequest(name=name_of("m"), rollout=ROLLOUT), here.context)
    assert await refusal(here.public.PromoteRelease(promotion("m"), here.context)) == "RELEASE_RETRACTED"
    await here.public.PromoteRelease(promotion("a", phase=pb.Phase(count=1)), here.context)
    again = promotion("a", release_id="b")
    assert await refusal(here.public.PromoteRelease(again, here.context)) == "LATEST_IS_PHASED"


async def test_a_key_of_one_cohort_promotes_into_no_other(here: World) -> None:
    await here.create("a")
    key = Principal("organizations/acme/apiKeys/ci", "api_key", "acme", "m", "owner", ("*",), COHORT)
    set_caller(key)
    assert await refusal(here.public.PromoteRelease(promotion("a"), here.context)) == "RESOURCE_NOT_FOUND"
    foreign = promotion("a", cohort=BETA.replace("acme", "other"))
    assert await refusal(here.public.PromoteRelease(foreign, here.context)) == "RESOURCE_NOT_FOUND"


async def test_a_graph_shows_who_stands_where_and_what_is_wrong(here: World) -> None:
    await has_bundles(here, "b0", "b1")
    await has_bundles(here, "b2", offerable=False)
    await here.create("a", "b0", version="1.0.0", version_requirement="< 1.0.0")
    await here.create("b", "b1", version="1.1.0", disabled=True)
    await here.create("c", "b2", version="1.2.0", phase=pb.Phase(count=3))
    for serial, reported in (
        ("s1", {"release": name_of("a")}),
        ("s2", {"bundle": bundle_of("b1")}),
        ("s3", {"version": "0.1.0"}),
        ("s4", {"version": "7.0.0"}),
        ("s5", {}),
    ):
        await has_device(here, serial, **reported)
    await has_device(here, "s1", release=name_of("b"))
    graph = await here.public.GetGraph(pb.GetGraphRequest(cohort=COHORT), here.context)
    state = pb.GraphNode.State
    assert [
        (node.release.name, state.Name(node.state), node.steps_to_latest, node.devices, node.devices_entering)
        for node in graph.nodes
    ] == [
        (name_of("a"), "STATE_OPEN", 2, 0, 1),
        (name_of("b"), "STATE_DISABLED", 1, 2, 0),
        (name_of("c"), "STATE_NOT_OFFERABLE", 0, 0, 0),
    ]
    assert (graph.devices, graph.devices_unplaced) == (5, 2)
    assert [(one.code, one.release, one.devices) for one in graph.warnings] == [
        ("LATEST_NOT_OFFERABLE", name_of("c"), 3)
    ]


async def test_a_cohort_without_releases_has_an_empty_graph_and_an_unknown_one_none(here: World) -> None:
    graph = await here.public.GetGraph(pb.GetGraphRequest(cohort=BETA), here.context)
    assert graph == pb.Graph(cohort=BETA)
    unknown = pb.GetGraphRequest(cohort=f"{COHORT}x")
    assert await refusal(here.public.GetGraph(unknown, here.context)) == "RESOURCE_NOT_FOUND"


async def test_devices_are_resolved_as_they_might_be(here: World) -> None:
    await has_bundles(here, "b0", "b1")
    await here.create("a", "b0", version="1.0.0", version_requirement="< 1.0.0")
    soon = Timestamp(seconds=NOW // 1000 + 10**9)
    await here.create("b", "b1", version="1.1.0", schedule_time=soon, phase=pb.Phase(tags=["lab"]))
    device = await has_device(here, "SN-1", version="0.9.0")
    running = registry_pb2.ReportedState(release=name_of("a"))
    supposed = [
        pb.SupposedDevice(device=device, running=running, tag_set=pb.SupposedDevice.TagSet(tags=["lab"])),
        pb.SupposedDevice(device=device, cohort=""),
        pb.SupposedDevice(device=device, target="odd"),
        pb.SupposedDevice(cohort=COHORT, target="board", running=registry_pb2.ReportedState(version="0.1.0")),
    ]
    request = pb.ResolveDevicesRequest(parent=PRODUCT, devices=[device], supposed_devices=supposed, at_time=soon)
    answer = await here.public.ResolveDevices(request, here.context)
    assert [[one.release for one in found.candidates] for found in answer.resolutions] == [
        [name_of("a")],
        [name_of("b")],
        [],
        [],
        [name_of("a")],
    ]
    assert [found.device for found in answer.resolutions] == [device, device, device, device, ""]
    assert answer.resolutions[2].steps[0].code == "NO_COHORT"
    assert (answer.view.service, answer.view.public_seq > 0) == ("releases", True)
    request.ClearField("at_time")
    answer = await here.public.ResolveDevices(request, here.context)
    assert answer.resolutions[1].steps[-1].code == "NOT_YET_SCHEDULED"


async def test_what_is_kept_for_dry_runs_follows_every_change(here: World) -> None:
    await has_bundles(here, "b0", "b1")
    device = await has_device(here, "SN-1", version="0.9.0")

    async def offered() -> list[str]:
        (found,) = await here.resolve("SN-1")
        return [one.release or one.bundle_override for one in found.candidates]

    assert await offered() == []
    await here.create("a", "b0", version="1.0.0", version_requirement="< 1.0.0")
    assert await offered() == [name_of("a")]
    await here.create("b", "b1", version="1.1.0")
    assert await offered() == [name_of("b"), name_of("a")]
    disable = pb.UpdateReleaseRequest(
        release=pb.Release(name=name_of("b"), disabled=True), update_mask=FieldMask(paths=["disabled"])
    )
    await here.public.UpdateRelease(disable, here.context)
    assert await offered() == [name_of("a")]
    create = pb.CreateBundleOverrideRequest(
        parent=PRODUCT,
        bundle_override_id="lab",
        bundle_override=pb.BundleOverride(bundle=bundle_of("b1"), devices=[device]),
    )
    made = await here.public.CreateBundleOverride(create, here.context)
    assert await offered() == [made.name]
    await here.public.RemoveDevices(pb.RemoveDevicesRequest(name=made.name, devices=[device]), here.context)
    assert await offered() == [name_of("a")]


async def test_suppositions_that_are_refused(here: World) -> None:
    device = await has_device(here, "SN-1")
    other = "organizations/other/products/thermostat/devices/SN-1"

    async def reason(*supposed: pb.SupposedDevice, devices: int = 0) -> str:
        request = pb.ResolveDevicesRequest(parent=PRODUCT, devices=[device] * devices, supposed_devices=supposed)
        return await refusal(here.public.ResolveDevices(request, here.context))

    assert await reason() == "INVALID_FIELD"
    assert await reason(*([pb.SupposedDevice(cohort=COHORT)] * 300), devices=201) == "INVALID_FIELD"
    assert await reason(pb.SupposedDevice(device=other)) == "INVALID_FIELD"
    assert await reason(pb.SupposedDevice(device=f"{device}x")) == "RESOURCE_NOT_FOUND"
    assert await reason(pb.SupposedDevice(cohort=FOREIGN)) == "INVALID_FIELD"
    assert await reason(pb.SupposedDevice(cohort=ROLLOUT)) == "INVALID_FIELD"


async def test_an_explanation_names_the_first_block_and_what_changes_it(here: World) -> None:
    await has_bundles(here, "b0")
    await here.create("a", "b0", version="1.0.0", version_requirement="< 1.0.0", disabled=True)
    plan = rollout_image(rollout_pb2.Rollout.STATE_PAUSED, True, True)
    await here.hear("rollout", ROLLOUT, rollout_events.RolloutChanged(rollout=plan))
    device = await has_device(here, "SN-1", version="0.9.0")
    found = await here.public.ExplainDevice(pb.ExplainDeviceRequest(name=device), here.context)
    assert (found.device, found.cohort, found.running.version) == (device, COHORT, "0.9.0")
    assert [step.code for step in found.steps] == ["MATCHED_BY_VERSION", "RELEASE_DISABLED", "ROLLOUT_PAUSED"]
    assert found.first_blocking == found.steps[1]
    assert found.remedy == pb.Remedy(
        sentence=found.steps[1].message,
        method="groundswell.releases.v1.ReleasesService/UpdateRelease",
        resource=name_of("a"),
        fields={"release.disabled": "false"},
    )
    running = registry_pb2.ReportedState(version="0.9.0", security_version=5)
    supposed = await here.public.ExplainDevice(pb.ExplainDeviceRequest(name=device, running=running), here.context)
    assert supposed.running == running
    enable = pb.UpdateReleaseRequest(release=pb.Release(name=name_of("a")), update_mask=FieldMask(paths=["disabled"]))
    await here.public.UpdateRelease(enable, here.context)
    found = await here.public.ExplainDevice(pb.ExplainDeviceRequest(name=device, running=running), here.context)
    assert found.first_blocking.code == "SECURITY_VERSION_BELOW_FLOOR"
    gone = pb.ExplainDeviceRequest(name=f"{device}x")
    assert await refusal(here.public.ExplainDevice(gone, here.context)) == "RESOURCE_NOT_FOUND"


def test_every_code_that_can_block_has_a_remedy() -> None:
    blocking = {step.code for found in EXAMPLES.values() for step in found.steps if step.blocking}
    assert blocking == set(REMEDIES)
    assert blocking < set(Code)


def test_every_remedy_names_a_method_that_exists() -> None:
    for code, made in REMEDIES.items():
        step = next(s for found in EXAMPLES.values() for s in found.steps if s.code is code)
        remedy = made(reason_of(step), "dev")
        assert remedy.sentence == step.message
        if remedy.method:
            service, _, method = remedy.method.partition("/")
            asked = descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
            for path in remedy.fields:
                message = asked.input_type
                for part in path.split("."):
                    field = message.fields_by_name[part]
                    message = field.message_type


async def test_an_override_is_edited_over_the_api(here: World) -> None:
    name = f"{PRODUCT}/bundleOverrides/lab"
    create = pb.CreateBundleOverrideRequest(
        parent=PRODUCT, bundle_override_id="lab", bundle_override=pb.BundleOverride(bundle=bundle_of("b0"))
    )
    made = await here.public.CreateBundleOverride(create, here.context)
    devices = [f"{PRODUCT}/devices/{serial}" for serial in "ab"]
    added = await here.public.AddDevices(pb.AddDevicesRequest(name=name, devices=devices, etag=made.etag), here.context)
    assert list(added.devices) == devices
    for known, reason in ((f"{PRODUCT}/devices/x", "RESOURCE_NOT_FOUND"), (COHORT, "INVALID_FIELD")):
        wrong = pb.AddDevicesRequest(name=name, devices=[known])
        assert await refusal(here.public.AddDevices(wrong, here.context)) == reason
        image = pb.BundleOverride(name=name, devices=[known])
        mask = FieldMask(paths=["devices"])
        edit = pb.UpdateBundleOverrideRequest(bundle_override=image, update_mask=mask)
        assert await refusal(here.public.UpdateBundleOverride(edit, here.context)) == reason
        create.bundle_override_id, create.bundle_override.devices[:] = "other", [known]
        assert await refusal(here.public.CreateBundleOverride(create, here.context)) == reason
    stale = pb.RemoveDevicesRequest(name=name, devices=devices, etag=made.etag)
    assert await refusal(here.public.RemoveDevices(stale, here.context)) == "ETAG_MISMATCH"
    left = await here.public.RemoveDevices(pb.RemoveDevicesRequest(name=name, devices=devices[:1]), here.context)
    assert list(left.devices) == devices[1:]

    def update(bundle: str) -> pb.UpdateBundleOverrideRequest:
        image = pb.BundleOverride(name=name, bundle=bundle_of(bundle))
        return pb.UpdateBundleOverrideRequest(bundle_override=image, update_mask=FieldMask(paths=["bundle"]))

    assert (await here.public.UpdateBundleOverride(update("b1"), here.context)).bundle == bundle_of("b1")
    here.references.bundles[bundle_of("b2")].offerable = False
    assert await refusal(here.public.UpdateBundleOverride(update("b2"), here.context)) == "BUNDLE_NOT_OFFERABLE"
    assert await refusal(here.public.UpdateBundleOverride(update("unknown"), here.context)) == "RESOURCE_NOT_FOUND"
