"""The registry as its callers meet it: both ports over TLS, on the real broker."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from groundswell.audit.v1 import audit_pb2, audit_pb2_grpc
from groundswell.registry.v1 import registry_pb2 as pb
from groundswell.registry.v1 import registry_pb2_grpc as pb_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.registry.running import Running, Tenant, reason, status_of


@pytest.fixture
def tenant(running: Running) -> Tenant:
    return running.organization()


def test_bootstrap_repeats_and_writes_a_private_profile(running: Running) -> None:
    before = running.profile
    assert running.bootstrap().returncode == 0
    assert running.profile == before
    path = running.settings.local_dir / "profile.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert (path.parent / before["ca"]).read_bytes() == running.settings.ca
    assert before["endpoints"]["registry"] == running.settings.registry_public
    platform = Tenant(running, "platform", before["platform_key"])
    assert platform.call("GetOrganization", pb.GetOrganizationRequest(name="organizations/platform")).uid


def test_no_log_line_holds_a_secret(running: Running, tenant: Tenant) -> None:
    secret = tenant.key.rpartition("_")[2]
    tenant.product()
    Tenant(running, tenant.organization, tenant.key + "x").refused(
        "GetOrganization", pb.GetOrganizationRequest(name=tenant.name)
    )
    text = running.log.read_text()
    assert secret not in text
    assert running.profile["platform_key"].split("_", 3)[3] not in text


def test_an_organization_its_product_and_its_devices(tenant: Tenant) -> None:
    product = tenant.product()
    assert tenant.call("GetProduct", pb.GetProductRequest(name=product.name)) == product
    cohort = tenant.call("CreateCohort", pb.CreateCohortRequest(parent=product.name, cohort_id="c", cohort=pb.Cohort()))
    for number in range(3):
        request = pb.CreateDeviceRequest(
            parent=product.name, device_id=f"SN-{number}", device=pb.Device(cohort=cohort.name, tags=[f"t{number % 2}"])
        )
        tenant.call("CreateDevice", request)
    first = tenant.call("ListDevices", pb.ListDevicesRequest(parent=product.name, page_size=2))
    rest = tenant.call("ListDevices", pb.ListDevicesRequest(parent=product.name, page_token=first.next_page_token))
    assert [item.identifier for item in [*first.devices, *rest.devices]] == ["SN-0", "SN-1", "SN-2"]
    tagged = tenant.call("ListDevices", pb.ListDevicesRequest(parent=product.name, filter='tags:"t0"'))
    assert [item.identifier for item in tagged.devices] == ["SN-0", "SN-2"]
    found = tenant.call("ListOrganizations", pb.ListOrganizationsRequest())
    assert [item.name for item in found.organizations] == [tenant.name]


def test_a_foreign_organization_does_not_exist(running: Running, tenant: Tenant) -> None:
    other = running.organization()
    theirs = other.product().name
    absent = theirs + "-never-made"
    answers = [tenant.refused("GetProduct", pb.GetProductRequest(name=name)) for name in (theirs, absent)]
    assert answers == [
        ("NOT_FOUND", "RESOURCE_NOT_FOUND", {"resource": theirs}),
        ("NOT_FOUND", "RESOURCE_NOT_FOUND", {"resource": absent}),
    ]
    written = pb.CreateProductRequest(parent=other.name, product_id="mine", product=pb.Product())
    assert tenant.refused("CreateProduct", written)[0] == "NOT_FOUND"
    changed = pb.UpdateProductRequest(
        product=pb.Product(name=theirs, display_name="x"), update_mask=FieldMask(paths=["display_name"])
    )
    assert tenant.refused("UpdateProduct", changed)[0] == "NOT_FOUND"
    assert tenant.refused("ListProducts", pb.ListProductsRequest(parent=other.name))[0] == "NOT_FOUND"


def test_a_resource_without_a_name_is_authorized_for_nobody(tenant: Tenant) -> None:
    request = pb.UpdateDeviceRequest(device=pb.Device(), update_mask=FieldMask(paths=["target"]))
    assert tenant.refused("UpdateDevice", request)[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD")


def test_a_missing_scope_or_role_is_named(tenant: Tenant) -> None:
    request = pb.CreateProductRequest(parent=tenant.name, product_id="p", product=pb.Product())
    scoped = tenant.with_key("scoped", scopes=("registry.devices.*",))
    viewer = tenant.with_key("viewer", role="viewer")
    for key in (scoped, viewer):
        status, why, metadata = key.refused("CreateProduct", request)
        assert (status, why) == ("PERMISSION_DENIED", "PERMISSION_MISSING")
        assert metadata["permission"] == "registry.products.create"
    assert viewer.call("GetOrganization", pb.GetOrganizationRequest(name=tenant.name)).name == tenant.name


def test_outside_its_prefix_a_key_sees_nothing(tenant: Tenant) -> None:
    pump, valve = tenant.product("pump"), tenant.product("valve")
    limited = tenant.with_key("limited", prefix=pump.name)
    assert limited.call("GetProduct", pb.GetProductRequest(name=pump.name)).name == pump.name
    assert limited.refused("GetProduct", pb.GetProductRequest(name=valve.name))[0] == "NOT_FOUND"
    assert limited.refused("ListProducts", pb.ListProductsRequest(parent=tenant.name))[0] == "NOT_FOUND"
    assert not limited.call("ListOrganizations", pb.ListOrganizationsRequest()).organizations


def test_a_tenant_creates_no_organizations(tenant: Tenant) -> None:
    request = pb.CreateOrganizationRequest(organization_id="another", owner_key_id="k", owner_key_sha256=bytes(32))
    assert tenant.refused("CreateOrganization", request)[:2] == ("PERMISSION_DENIED", "PERMISSION_MISSING")


def test_keys_that_do_not_count(running: Running, tenant: Tenant) -> None:
    request = pb.GetOrganizationRequest(name=tenant.name)
    spare = tenant.with_key("spare")
    assert spare.call("GetOrganization", request).name == tenant.name
    tenant.call("RevokeApiKey", pb.RevokeApiKeyRequest(name=f"{tenant.name}/apiKeys/spare"))
    wrong = Tenant(running, tenant.organization, tenant.key[:-1] + "_")
    malformed = Tenant(running, tenant.organization, "nothing")
    assert [key.refused("GetOrganization", request)[:2] for key in (spare, wrong, malformed)] == [
        ("UNAUTHENTICATED", "API_KEY_REVOKED"),
        ("UNAUTHENTICATED", "API_KEY_UNKNOWN"),
        ("UNAUTHENTICATED", "CREDENTIALS_MALFORMED"),
    ]
    with running.public() as channel, pytest.raises(grpc.RpcError) as error:
        pb_grpc.RegistryServiceStub(channel).GetOrganization(request, timeout=10)
    assert reason(error.value)[1] == "CREDENTIALS_MISSING"


def test_a_stale_etag_is_refused_and_changes_nothing(tenant: Tenant) -> None:
    product = tenant.product()
    mask = FieldMask(paths=["display_name"])
    one = pb.UpdateProductRequest(product=pb.Product(name=product.name, display_name="one", etag="1"), update_mask=mask)
    assert tenant.call("UpdateProduct", one).etag == "2"
    two = pb.UpdateProductRequest(product=pb.Product(name=product.name, display_name="two", etag="1"), update_mask=mask)
    status, why, metadata = tenant.refused("UpdateProduct", two)
    assert (status, why, metadata["current"]) == ("ABORTED", "ETAG_MISMATCH", "2")
    assert tenant.call("GetProduct", pb.GetProductRequest(name=product.name)).display_name == "one"


def test_a_request_id_makes_a_retry_the_same_call(tenant: Tenant) -> None:
    request = pb.CreateProductRequest(
        parent=tenant.name, product_id="once", product=pb.Product(), request_id=str(uuid.uuid4())
    )
    assert tenant.call("CreateProduct", request) == tenant.call("CreateProduct", request)
    request.product.display_name = "another body"
    assert tenant.refused("CreateProduct", request)[1] == "REQUEST_ID_REUSED"


def test_every_wrong_field_is_named(tenant: Tenant) -> None:
    request = pb.CreateProductRequest(parent="nonsense", product_id="NO", request_id="not-a-uuid")
    with pytest.raises(grpc.RpcError) as error:
        tenant.call("CreateProduct", request)
    assert reason(error.value)[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD")
    bad = error_details_pb2.BadRequest()
    status = status_of(error.value)
    assert status is not None
    assert [detail.Unpack(bad) for detail in status.details].count(True) == 1
    assert {violation.field for violation in bad.field_violations} == {"parent", "product_id", "product", "request_id"}


def test_an_oversized_request_is_refused(tenant: Tenant) -> None:
    huge = pb.Product(display_name="x" * (4 * 1024 * 1024 + 1))
    request = pb.CreateProductRequest(parent=tenant.name, product_id="huge", product=huge)
    assert tenant.refused("CreateProduct", request)[0] == "RESOURCE_EXHAUSTED"
    assert not tenant.call("ListProducts", pb.ListProductsRequest(parent=tenant.name)).products


def test_a_token_of_another_log_is_refused(tenant: Tenant) -> None:
    tenant.product()
    service, partition, _, position, sequence = tenant.tokens[-1].split("/")
    tenant.tokens = [f"{service}/{partition}/another-log/{position}/{sequence}"]
    request = pb.ListProductsRequest(parent=tenant.name)
    assert tenant.refused("ListProducts", request)[:2] == ("FAILED_PRECONDITION", "LOG_RESET")
    tenant.tokens = ["artifacts/0/some-log/1/1"]
    assert tenant.call("ListProducts", request).products


def provision(product: str) -> pb.ProvisionDeviceRequest:
    return pb.ProvisionDeviceRequest(
        parent=product,
        device_id="SN-7",
        certificate_fingerprint="ab" * 32,
        provisioned_by=f"{product}/caCertificates/c",
    )


def test_the_internal_port_takes_only_named_services(running: Running, tenant: Tenant) -> None:
    request = provision(tenant.product().name)
    with running.internal("pki") as channel:
        stub = pb_grpc.RegistryInternalServiceStub(channel)
        assert stub.ProvisionDevice(request, timeout=10) == stub.ProvisionDevice(request, timeout=10)
    with running.internal("rollout") as channel, pytest.raises(grpc.RpcError) as error:
        pb_grpc.RegistryInternalServiceStub(channel).ProvisionDevice(request, timeout=10)
    assert reason(error.value)[:2] == ("PERMISSION_DENIED", "CALLER_NOT_ALLOWED")
    with running.internal(None) as channel, pytest.raises(grpc.RpcError) as error:
        pb_grpc.RegistryInternalServiceStub(channel).ProvisionDevice(request, timeout=5)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert tenant.refused("ProvisionDevice", request, stub=pb_grpc.RegistryInternalServiceStub)[0] == "UNIMPLEMENTED"


def test_a_gateway_enrols_itself(running: Running) -> None:
    request = pb.CreateGatewayRequest(
        parent="organizations/platform", gateway_id="g1", gateway=pb.Gateway(public_key=bytes(range(32)))
    )
    with running.internal("gateway") as channel:
        stub = pb_grpc.RegistryInternalServiceStub(channel)
        first = stub.EnrolGateway(request, timeout=10)
        assert stub.EnrolGateway(request, timeout=10) == first
        request.gateway.public_key = bytes(32)
        with pytest.raises(grpc.RpcError) as error:
            stub.EnrolGateway(request, timeout=10)
    assert reason(error.value)[1] == "GATEWAY_KEY_CONFLICT"


def test_the_audit_chain_is_whole_and_only_ones_own(tenant: Tenant) -> None:
    tenant.product()
    records = []
    token = ""
    while True:
        request = audit_pb2.ListAuditRecordsRequest(parent=tenant.name, page_size=2, page_token=token)
        answer = tenant.call("ListAuditRecords", request, stub=audit_pb2_grpc.AuditServiceStub)
        records += answer.audit_records
        token = answer.next_page_token
        if not token:
            break
    assert [record.event_type.rpartition(".")[2] for record in records] == [
        "OrganizationCreated",
        "MemberSaved",
        "ApiKeySaved",
        "ProductSaved",
    ]
    assert all(later.previous_hash == earlier.hash for earlier, later in itertools.pairwise(records))
    assert records[-1].principal == f"{tenant.name}/apiKeys/owner"


def test_reflection_asks_for_a_key(running: Running, tenant: Tenant) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with running.public() as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        metadata = [("authorization", f"Bearer {tenant.key}")]
        answer = next(iter(stub.ServerReflectionInfo(iter([ask]), metadata=metadata, timeout=10)))
        names = {service.name for service in answer.list_services_response.service}
        with pytest.raises(grpc.RpcError) as error:
            next(iter(stub.ServerReflectionInfo(iter([ask]), timeout=10)))
    assert "groundswell.registry.v1.RegistryService" in names
    assert "groundswell.registry.v1.RegistryInternalService" not in names
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
