"""The registry's decisions, by their rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from groundswell.registry.v1 import events_pb2 as ev
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.rollout.v1 import events_pb2 as rollout_events

from libs.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from libs.eventlog import Foreign
from libs.settings import Settings
from services.registry import domain as ask
from services.registry.bootstrap import BootstrapError, read_secret, write_profile
from services.registry.domain import Quotas, Registry, find
from tests.unit.registry.world import ORG, OWNER, PRINT, PUMP, SHA, World, furnished


@pytest.fixture
def world() -> World:
    return furnished()


def provision(**changes: Any) -> ask.ProvisionDevice:
    values: dict[str, Any] = {
        "parent": PUMP,
        "device_id": "SN-1",
        "certificate_fingerprint": PRINT,
        "provisioned_by": f"{PUMP}/caCertificates/c",
        "device": pb.Device(tags=["b", "a", "b"]),
        "development": False,
    }
    return ask.ProvisionDevice(**{**values, **changes})


def test_an_organization_begins_with_an_owner_and_its_key(world: World) -> None:
    key = find(world.state.api_keys, OWNER)
    assert key is not None
    member = find(world.state.members, key.member)
    assert member is not None
    assert (member.role, list(key.scopes), key.secret_sha256, key.etag) == ("owner", ["*"], SHA, "1")


def test_organization_ids_are_unique_and_platform_is_reserved(world: World) -> None:
    world.refused(AlreadyExistsError, "ALREADY_EXISTS", ask.CreateOrganization("acme", "", "k", SHA))
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.CreateOrganization("platform", "", "k", SHA))


def test_bootstrap_repeats_without_a_trace_and_mends_a_lost_secret() -> None:
    world = World()
    first = world.do(ask.Bootstrap("bootstrap", SHA))
    seen = len(world.published)
    assert world.do(ask.Bootstrap("bootstrap", SHA)) == first
    assert len(world.published) == seen
    other = hashlib.sha256(b"new").digest()
    assert world.do(ask.Bootstrap("bootstrap", other)).api_key.secret_sha256 == other
    world.refused(AlreadyExistsError, "ALREADY_BOOTSTRAPPED", ask.Bootstrap("second", SHA))


def test_public_records_are_whole_after_images_with_their_change(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device(tags=["z", "a"], cohort=f"{PUMP}/cohorts/canary")))
    image = world.published[-1]
    assert isinstance(image, ev.DeviceChanged)
    assert (image.device, image.change) == (device, "device.created")
    assert (list(device.tags), device.identifier, device.etag) == (["a", "z"], "SN-1", "1")


def test_an_identifier_is_unique_in_the_organization_and_never_used_again(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    world.refused(AlreadyExistsError, "ALREADY_EXISTS", ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    other = ask.CreateDevice(f"{ORG}/products/valve", "SN-1", pb.Device())
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", other)
    world.do(ask.RetireDevice(device.name, ""))
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", other)


def test_a_cohort_belongs_to_the_devices_product(world: World) -> None:
    foreign = pb.Device(cohort=f"{ORG}/products/valve/cohorts/other")
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.CreateDevice(PUMP, "SN-1", foreign))
    missing = pb.Device(cohort=f"{PUMP}/cohorts/nothing")
    world.refused(NotFoundError, "RESOURCE_NOT_FOUND", ask.CreateDevice(PUMP, "SN-1", missing))
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    moved = pb.Device(name=device.name, cohort=foreign.cohort)
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.UpdateDevice(moved, ("cohort",)))


def test_only_masked_fields_change(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device(description="old", target="t1", tags=["a"])))
    wanted = pb.Device(name=device.name, etag=device.etag, description="new", target="ignored", quarantined=True)
    changed = world.do(ask.UpdateDevice(wanted, ("description", "quarantined", "tags")))
    assert (changed.description, changed.target, changed.quarantined, list(changed.tags)) == ("new", "t1", True, [])
    assert changed.etag == "2"
    freed = world.do(ask.UpdateDevice(pb.Device(name=device.name), ("quarantined",)))
    assert not freed.quarantined
    assert freed.quarantine_reason == ""


def test_an_update_without_a_difference_writes_nothing(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device(description="same")))
    again = pb.Device(name=device.name, description="same")
    assert world.do(ask.UpdateDevice(again, ("description",))).etag == device.etag


@pytest.mark.parametrize("paths", [(), ("uid",), ("name",), ("reported.version",), ("cohort", "state")])
def test_a_mask_names_only_what_may_change(world: World, paths: tuple[str, ...]) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    error = world.refused(InvalidArgumentError, "INVALID_FIELD", ask.UpdateDevice(pb.Device(name=device.name), paths))
    assert error.field == "update_mask"


def test_one_field_of_a_policy_changes_alone(world: World) -> None:
    wanted = pb.Product(name=PUMP)
    wanted.policy.poll_interval.FromSeconds(5)
    wanted.policy.allow_development_ca = True
    changed = world.do(ask.UpdateProduct(wanted, ("policy.poll_interval",)))
    assert (changed.policy.poll_interval.seconds, changed.policy.allow_development_ca) == (5, False)
    assert changed.display_name == "Pump"


def test_a_stale_etag_is_refused(world: World) -> None:
    wanted = pb.Product(name=PUMP, display_name="x", etag="7")
    world.refused(AbortedError, "ETAG_MISMATCH", ask.UpdateProduct(wanted, ("display_name",)))


def test_retired_is_for_good(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    assert world.do(ask.RetireDevice(device.name, "")).state == pb.Device.STATE_RETIRED
    world.refused(FailedPreconditionError, "WRONG_STATE", ask.RetireDevice(device.name, ""))
    changed = ask.UpdateDevice(pb.Device(name=device.name, target="x"), ("target",))
    world.refused(FailedPreconditionError, "WRONG_STATE", changed)


def test_provisioning_is_idempotent_by_fingerprint(world: World) -> None:
    first = world.do(provision())
    assert world.do(provision()) == first
    assert first.certificate_fingerprint == PRINT
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", provision(certificate_fingerprint="cd" * 32))
    world.refused(AlreadyExistsError, "DEVICE_IDENTIFIER_TAKEN", provision(parent=f"{ORG}/products/valve"))


def test_a_development_ca_needs_the_products_leave(world: World) -> None:
    world.refused(FailedPreconditionError, "DEVELOPMENT_CA_NOT_ALLOWED", provision(development=True))
    allowed = pb.Product(name=PUMP, policy=pb.ConfigurationPolicy(allow_development_ca=True))
    world.do(ask.UpdateProduct(allowed, ("policy.allow_development_ca",)))
    assert world.do(provision(development=True)).identifier == "SN-1"


@pytest.mark.parametrize("changes", [{"device_id": "a/b"}, {"device_id": ""}, {"certificate_fingerprint": "AB" * 32}])
def test_what_a_certificate_says_is_checked(world: World, changes: dict[str, str]) -> None:
    world.refused(InvalidArgumentError, "INVALID_FIELD", provision(**changes))


def test_undoing_retires_once_and_only_what_was_made_for_the_certificate(world: World) -> None:
    device = world.do(provision())
    wrong = ask.UndoProvisioning(device.name, "cd" * 32)
    world.refused(FailedPreconditionError, "CERTIFICATE_MISMATCH", wrong)
    undo = ask.UndoProvisioning(device.name, PRINT)
    assert world.do(undo) == world.do(undo)
    world.refused(FailedPreconditionError, "DEVICE_RETIRED", provision())


@pytest.mark.parametrize(
    ("quota", "command"),
    [
        ("products", lambda n: ask.CreateProduct(ORG, f"p{n}", pb.Product())),
        ("cohorts", lambda n: ask.CreateCohort(PUMP, f"c{n}", pb.Cohort())),
        ("devices", lambda n: ask.CreateDevice(PUMP, f"d{n}", pb.Device())),
        ("members", lambda n: ask.CreateMember(ORG, f"m{n}", pb.Member(role="viewer"))),
        ("api_keys", lambda n: ask.CreateApiKey(ORG, f"k{n}", pb.ApiKey(scopes=["*"], secret_sha256=SHA))),
        ("gateways", lambda n: ask.CreateGateway(ORG, f"g{n}", pb.Gateway(public_key=bytes([n]) * 32))),
    ],
)
def test_quotas_are_named(world: World, quota: str, command: Callable[[int], object]) -> None:
    limit = 4
    world.registry = Registry(Quotas(**{quota: limit}))
    refused = []
    for number in range(limit + 1):
        try:
            world.do(command(number))
        except ResourceExhaustedError as error:
            refused.append((number, error.reason, error.metadata["quota"]))
    assert {entry[1:] for entry in refused} == {("QUOTA_EXCEEDED", quota)}
    assert min(refused)[0] > 0


def test_a_retired_device_gives_its_quota_back(world: World) -> None:
    world.registry = Registry(Quotas(devices=1))
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    world.refused(ResourceExhaustedError, "QUOTA_EXCEEDED", ask.CreateDevice(PUMP, "SN-2", pb.Device()))
    world.do(ask.RetireDevice(device.name, ""))
    assert world.do(ask.CreateDevice(PUMP, "SN-2", pb.Device())).identifier == "SN-2"


def test_nobody_gives_a_role_above_their_own(world: World) -> None:
    admin = world.key("a", "admin")
    owner = ask.CreateMember(ORG, "boss", pb.Member(role="owner"))
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", owner, admin)
    owners_key = ask.CreateApiKey(ORG, "k", pb.ApiKey(member=f"{ORG}/members/owner", scopes=["*"], secret_sha256=SHA))
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", owners_key, admin)
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.RevokeApiKey(OWNER, ""), admin)
    world.refused(PermissionDeniedError, "ROLE_ABOVE_OWN", ask.CreateMember(ORG, "p", pb.Member(role="platform")))
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.CreateMember(ORG, "r", pb.Member(role="root")))


def test_a_key_gives_no_scope_and_no_reach_that_it_lacks(world: World) -> None:
    narrow = world.key("n", "owner", ("registry.apiKeys.*",))
    wide = ask.CreateApiKey(ORG, "k", pb.ApiKey(scopes=["registry.*"], secret_sha256=SHA))
    world.refused(PermissionDeniedError, "SCOPE_ABOVE_OWN", wide, narrow)
    same = ask.CreateApiKey(ORG, "k", pb.ApiKey(scopes=["registry.apiKeys.list"], secret_sha256=SHA))
    assert world.do(same, narrow).member == f"{ORG}/members/m-n"
    outside = pb.ApiKey(scopes=["*"], secret_sha256=SHA, resource_prefix="organizations/other")
    world.refused(InvalidArgumentError, "INVALID_FIELD", ask.CreateApiKey(ORG, "o", outside))


@pytest.mark.parametrize("scope", ["", "registry", "registry.devices.get.more", "[a]*", "re?istry.*", "a.b c"])
def test_scopes_are_permission_patterns(world: World, scope: str) -> None:
    made = ask.CreateApiKey(ORG, "k", pb.ApiKey(scopes=[scope], secret_sha256=SHA))
    world.refused(InvalidArgumentError, "INVALID_FIELD", made)


def test_the_last_key_of_an_owner_stays(world: World) -> None:
    world.refused(FailedPreconditionError, "LAST_OWNER_KEY", ask.RevokeApiKey(OWNER, ""))
    world.do(ask.CreateApiKey(ORG, "spare", pb.ApiKey(scopes=["*"], secret_sha256=SHA)))
    assert world.do(ask.RevokeApiKey(OWNER, "")).revoked
    assert world.do(ask.RevokeApiKey(OWNER, "")).revoked
    world.refused(FailedPreconditionError, "LAST_OWNER_KEY", ask.RevokeApiKey(f"{ORG}/apiKeys/spare", ""))


def test_a_gateway_enrols_by_its_key(world: World) -> None:
    first = world.do(ask.EnrolGateway("g-1", bytes(32)))
    assert first.name == "organizations/platform/gateways/g-1"
    assert first.key_id == hashlib.sha256(bytes(32)).hexdigest()
    assert world.do(ask.EnrolGateway("g-1", bytes(32))) == first
    world.refused(AlreadyExistsError, "GATEWAY_KEY_CONFLICT", ask.EnrolGateway("g-1", b"x" * 32))
    world.refused(AlreadyExistsError, "GATEWAY_KEY_TAKEN", ask.EnrolGateway("g-2", bytes(32)))


def report(device: str, version: str, change: str = "device.release_changed") -> Foreign:
    payload = rollout_events.DeviceReported(device=device, running=pb.ReportedState(version=version), change=change)
    return Foreign("rollout", "t", 0, 1, 1, "acme", device, payload, 0)


def test_what_a_device_reports_is_taken_in_once(world: World) -> None:
    device = world.do(ask.CreateDevice(PUMP, "SN-1", pb.Device()))
    world.do(report(device.name, "1.2.3"))
    stored = find(world.state.devices, device.name)
    assert stored is not None
    assert (stored.reported.version, world.published[-1].change) == ("1.2.3", "")
    seen = len(world.published)
    world.do(report(device.name, "1.2.3"))
    world.do(report(device.name, "9", change="identity.cloned"))
    world.do(report(f"{PUMP}/devices/unknown", "1"))
    assert len(world.published) == seen


def test_decisions_never_change_what_they_were_given(world: World) -> None:
    device = pb.Device(tags=["b", "a"], quarantine_reason="kept by the caller")
    command = ask.CreateDevice(PUMP, "SN-1", device)
    before = device.SerializeToString(deterministic=True)
    world.do(command)
    assert device.SerializeToString(deterministic=True) == before


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "bootstrap.secret"
    secret.write_text("x" * 43)
    secret.chmod(0o640)
    with pytest.raises(BootstrapError, match="others may read"):
        read_secret(secret)
    secret.chmod(0o600)
    assert read_secret(secret) == "x" * 43
    secret.write_text("short")
    with pytest.raises(BootstrapError, match="shorter"):
        read_secret(secret)


def test_the_profile_is_private_and_keeps_what_people_put_in(tmp_path: Path) -> None:
    settings = Settings(local_dir=tmp_path, tls_dir=tmp_path / "tls")
    (tmp_path / "profile.json").write_text('{"keys": {"acme": "kept"}, "current": "acme"}')
    written = write_profile(settings, "y" * 43)
    text = written.read_text()
    assert written.stat().st_mode & 0o777 == 0o600
    assert '"kept"' in text
    assert f"gsw_platform_bootstrap_{'y' * 43}" in text
    assert '"ca": "tls/ca.pem"' in text
