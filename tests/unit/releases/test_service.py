"""The servicers over a running log in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from groundswell.artifacts.v1 import events_pb2 as artifacts_events
from groundswell.registry.v1 import events_pb2 as registry_events
from groundswell.releases.v1 import releases_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events
from groundswell.rollout.v1 import rollout_pb2

from tests.unit.releases.world import (
    COHORT,
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


@pytest.fixture
async def here() -> AsyncIterator[World]:
    async with world() as made:
        yield made


async def test_a_release_takes_only_what_its_creator_chooses(here: World) -> None:
    here.references.bundles[bundle_of("b0")] = bundle_image("b0", "1.0.0", security_version=4)
    made = await here.create("a", security_version=9, rollout=ROLLOUT, retracted=True, uid="x", required=True)
    assert (made.name, made.security_version, made.rollout, made.retracted) == (name_of("a"), 4, "", False)
    assert made.required
    assert made.etag == "1"
    assert len(made.uid) == 36
    assert await here.public.GetRelease(pb.GetReleaseRequest(name=made.name), here.context) == made


async def test_references_are_checked_before_anything_is_decided(here: World) -> None:
    here.references.bundles[bundle_of("raw")] = bundle_image("raw", "1.0.0", offerable=False)
    assert await refusal(here.create("a", "nowhere")) == "RESOURCE_NOT_FOUND"
    assert await refusal(here.create("a", "raw")) == "BUNDLE_NOT_OFFERABLE"
    foreign = pb.Release(bundle="organizations/acme/products/other/bundles/b0")
    request = pb.CreateReleaseRequest(parent=COHORT, release_id="a", release=foreign)
    assert await refusal(here.public.CreateRelease(request, here.context)) == "INVALID_FIELD"
    request = pb.CreateReleaseRequest(parent=f"{COHORT}x", release_id="a", release=pb.Release(bundle=bundle_of("b0")))
    assert await refusal(here.public.CreateRelease(request, here.context)) == "RESOURCE_NOT_FOUND"
    listed = await here.public.ListReleases(pb.ListReleasesRequest(parent=COHORT), here.context)
    assert list(listed.releases) == []
    assert await refusal(here.public.ListReleases(pb.ListReleasesRequest(parent=f"{COHORT}x"), here.context)) == (
        "RESOURCE_NOT_FOUND"
    )


async def test_the_dry_run_of_a_rollout_writes_nothing(here: World) -> None:
    assert (await here.managed("m", validate_only=True)).name == name_of("m")
    assert await refusal(here.public.GetRelease(pb.GetReleaseRequest(name=name_of("m")), here.context)) == (
        "RESOURCE_NOT_FOUND"
    )
    await here.create("a", phase=pb.Phase(count=1))
    assert await refusal(here.managed("m", validate_only=True)) == "LATEST_IS_PHASED"
    assert await refusal(here.managed("a", validate_only=True)) == "RELEASE_CONFLICT"
    assert await refusal(here.managed("m", validate_only=True, security_version=1)) == "INVALID_FIELD"
    assert await refusal(here.managed("m", validate_only=True, rollout="")) == "INVALID_FIELD"
    assert await refusal(here.managed("m", validate_only=True, name=f"{COHORT}/releases/a/b")) == "INVALID_FIELD"


async def test_a_managed_release_is_answered_again_whatever_became_of_its_bundle(here: World) -> None:
    first = await here.managed("m", disabled=True, description="x" * 300)
    assert (first.disabled, len(first.description)) == (False, 256)
    here.references.bundles[bundle_of("b1")].offerable = False
    assert await here.managed("m") == first
    assert await refusal(here.managed("n")) == "BUNDLE_NOT_OFFERABLE"


async def test_a_device_is_resolved_from_what_the_neighbours_said(here: World) -> None:
    for index in range(2):
        image = bundle_image(f"b{index}", f"1.{index}.0")
        await here.hear("artifacts", image.name, artifacts_events.BundleChanged(bundle=image))
        await here.create(f"r{index}", f"b{index}", version=f"1.{index}.0", version_requirement=f"< 1.{index}.0")
    plan = rollout_image(rollout_pb2.Rollout.STATE_RUNNING, True, False)
    await here.hear("rollout", ROLLOUT, rollout_events.RolloutChanged(rollout=plan))
    for device in (
        device_image("factory", version="0.9.0"),
        device_image("first", release=name_of("r0"), bundle=bundle_of("b0"), version="1.0.0"),
        device_image("last", release=name_of("r1"), version="1.1.0"),
    ):
        await here.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    last, factory, first = await here.resolve("last", "factory", "first")
    assert [one.release for one in factory.candidates] == [name_of("r1"), name_of("r0")]
    assert [one.release for one in first.candidates] == [name_of("r1")]
    assert [step.code for step in last.steps] == ["CURRENT_BY_RELEASE", "UP_TO_DATE", "STAGE_NOT_OPEN"]
    assert last.steps[-1].metadata["version"] == "2.0.0"
    assert last.steps[-1].metadata["current_stage"] == "first"


async def test_an_override_shows_in_the_dry_run_at_once(here: World) -> None:
    device = device_image("SN-1")
    await here.hear("registry", device.name, registry_events.DeviceChanged(device=device))
    image = bundle_image("b1", "1.1.0")
    await here.hear("artifacts", image.name, artifacts_events.BundleChanged(bundle=image))
    request = pb.CreateBundleOverrideRequest(
        parent=PRODUCT,
        bundle_override_id="lab",
        bundle_override=pb.BundleOverride(bundle=bundle_of("b1"), devices=[device.name]),
    )
    made = await here.public.CreateBundleOverride(request, here.context)
    (found,) = await here.resolve("SN-1")
    assert [one.bundle_override for one in found.candidates] == [made.name]
    await here.public.DeleteBundleOverride(pb.DeleteBundleOverrideRequest(name=made.name), here.context)
    (found,) = await here.resolve("SN-1")
    assert [step.code for step in found.steps] == ["NO_RELEASES"]


async def test_devices_that_are_not_of_the_product_are_refused(here: World) -> None:
    assert await refusal(here.resolve("unknown")) == "RESOURCE_NOT_FOUND"
    other = "organizations/other/products/thermostat/devices/SN-1"
    request = pb.ResolveDevicesRequest(parent=PRODUCT, devices=[other])
    assert await refusal(here.public.ResolveDevices(request, here.context)) == "INVALID_FIELD"
