"""pki beside the real registry, on the real log, over both of their ports."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.pki.v1 import pki_pb2, pki_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc

from deploy.local.credentials import ensure_all
from deploy.local.settings import ROOT
from deploy.local.settings import Settings as StackSettings
from libs.errors import GroundswellError
from libs.eventlog import Deadline
from libs.rpc import RpcServer, channel, error_of
from libs.settings import Settings
from services.pki.app import build as build_pki
from services.registry.app import build as build_registry
from tests.conftest import KafkaEnv
from tests.ports import free_address
from tests.unit.pki.factory import Ca, csr, der

ORG = "organizations/acme"
PRODUCT = "organizations/acme/products/thermostat"


def settings_of(kafka: KafkaEnv, folder: Path) -> Settings:
    stack = StackSettings(ROOT, folder, folder, 19000, {"GROUNDSWELL_KEYSTORE_DIR": str(folder / "keystore")})
    ensure_all(stack)
    ports = {f"{service}_{port}": free_address() for service in ("registry", "pki") for port in ("internal", "public")}
    return Settings(
        env=kafka.env,
        kafka=kafka.bootstrap,
        partitions=kafka.partitions,
        tls_dir=stack.tls_dir,
        keystore_dir=stack.keystore_dir,
        **ports,  # type: ignore[arg-type]
    )


@dataclass
class Site:
    """Registry and pki, and who talks to them."""

    settings: Settings
    keys: dict[str, str]

    @contextlib.asynccontextmanager
    async def public(self, service: str, key: str) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
        credentials = grpc.ssl_channel_credentials(self.settings.ca)
        options = (("grpc.ssl_target_name_override", "localhost"),)
        address = self.settings.address(service, "public")
        async with grpc.aio.secure_channel(address, credentials, options=options) as opened:
            yield opened, (("authorization", f"Bearer {key}"),)

    async def admit(self, leaf: Any) -> pki_pb2.DeviceCertificate:
        async with channel(self.settings, "pki", identity="gateway") as opened:
            stub = pki_pb2_grpc.PkiInternalServiceStub(opened)
            request = pki_pb2.AdmitCertificateRequest(organization="acme", leaf_der=der(leaf))
            try:
                return (await stub.AdmitCertificate(request, timeout=20)).device_certificate
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    async def register(self, ca: Ca, organization: str, ca_id: str) -> pki_pb2.CaCertificate:
        parent = f"organizations/{organization}"
        async with self.public("pki", self.keys[organization]) as (opened, metadata):
            stub = pki_pb2_grpc.PkiServiceStub(opened)
            code = await stub.CreateVerificationCode(
                pki_pb2.CreateVerificationCodeRequest(parent=parent, verification_code_id=ca_id),
                metadata=metadata,
                timeout=20,
            )
            request = pki_pb2.RegisterCaCertificateRequest(
                parent=f"{parent}/products/thermostat",
                ca_certificate_id=ca_id,
                certificate_pem=ca.pem,
                verification_certificate_pem=ca.proof(code.code),
                ca_certificate=pki_pb2.CaCertificate(jitp=pki_pb2.JitpSettings(enabled=True, target="board")),
            )
            try:
                return await stub.RegisterCaCertificate(request, metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                raise error_of(error) from error

    async def device(self, name: str) -> registry_pb2.Device:
        async with channel(self.settings, "registry", identity="gateway") as opened:
            stub = registry_pb2_grpc.RegistryInternalServiceStub(opened)
            return await stub.LookupDevice(registry_pb2.GetDeviceRequest(name=name), timeout=20)

    async def issue(self, current: pki_pb2.DeviceCertificate, request: bytes) -> pki_pb2.IssueCertificateResponse:
        async with channel(self.settings, "pki", identity="gateway") as opened:
            stub = pki_pb2_grpc.PkiInternalServiceStub(opened)
            asked = pki_pb2.IssueCertificateRequest(
                organization="acme", fingerprint=current.fingerprint, csr_der=request
            )
            return await stub.IssueCertificate(asked, timeout=20)

    async def call(self, method: str, request: Any) -> Any:
        """A method of the public API, as acme's owner."""
        async with self.public("pki", self.keys["acme"]) as (opened, metadata):
            return await getattr(pki_pb2_grpc.PkiServiceStub(opened), method)(request, metadata=metadata, timeout=20)

    async def revoke(self, name: str) -> pki_pb2.RevokeDeviceCertificateResponse:
        async with self.public("pki", self.keys["acme"]) as (opened, metadata):
            stub = pki_pb2_grpc.PkiServiceStub(opened)
            request = pki_pb2.RevokeDeviceCertificateRequest(name=name, reason="stolen")
            return await stub.RevokeDeviceCertificate(request, metadata=metadata, timeout=20)


async def serving(server: RpcServer) -> None:
    """Started, and leading all partitions."""
    await server.start()
    deadline = Deadline.after(30)
    await server._runtime.wait_ready(deadline)
    await server._runtime.wait_leading(deadline)


async def organization(site: Site, name: str, platform_key: str) -> None:
    """An organization with its owner's key and a product."""
    secret = secrets.token_hex(16)
    site.keys[name] = f"gsw_{name}_owner_{secret}"
    create = registry_pb2.CreateOrganizationRequest(
        organization_id=name, owner_key_id="owner", owner_key_sha256=hashlib.sha256(secret.encode()).digest()
    )
    async with site.public("registry", platform_key) as (opened, metadata):
        stub = registry_pb2_grpc.RegistryServiceStub(opened)
        await stub.CreateOrganization(create, metadata=metadata, timeout=20)
    async with site.public("registry", site.keys[name]) as (opened, metadata):
        stub = registry_pb2_grpc.RegistryServiceStub(opened)
        product = registry_pb2.CreateProductRequest(
            parent=f"organizations/{name}", product_id="thermostat", product=registry_pb2.Product(display_name="T")
        )
        await stub.CreateProduct(product, metadata=metadata, timeout=20)


@pytest.fixture
async def site(kafka_env: KafkaEnv, tmp_path: Path) -> AsyncIterator[Site]:
    settings = settings_of(kafka_env, tmp_path / "local")
    registry = await build_registry(settings)
    await serving(registry)
    secret = secrets.token_hex(16)
    try:
        async with channel(settings, "registry", identity="registry") as opened:
            bootstrap = registry_pb2.BootstrapRequest(
                api_key_id="bootstrap", secret_sha256=hashlib.sha256(secret.encode()).digest()
            )
            await registry_pb2_grpc.RegistryInternalServiceStub(opened).Bootstrap(bootstrap, timeout=20)
        made = Site(settings, {})
        for name in ("acme", "beta"):
            await organization(made, name, f"gsw_platform_bootstrap_{secret}")
        yield made
    finally:
        await registry.stop()


async def test_from_proof_to_device_to_revocation_and_over_a_restart(site: Site) -> None:
    ca = Ca()
    leaf = ca.leaf("SN-0042")
    first = await build_pki(site.settings)
    await serving(first)
    try:
        registered = await site.register(ca, "acme", "factory")
        assert registered.state == pki_pb2.CaCertificate.STATE_ACTIVE
        answers = await asyncio.gather(*(site.admit(leaf) for _ in range(5)))
        assert all(answer == answers[0] for answer in answers)
        device = await site.device(f"{PRODUCT}/devices/SN-0042")
        assert (device.uid, device.target) == (answers[0].device_uid, "board")
        assert device.provisioned_by == registered.name
        with pytest.raises(GroundswellError) as taken:
            await site.register(Ca("Copy", key=ca.key), "beta", "stolen")
        assert taken.value.reason == "CA_KEY_TAKEN"
    finally:
        await first.stop()

    second = await build_pki(site.settings)
    await serving(second)
    try:
        assert await site.admit(leaf) == answers[0]
        revoked = await site.revoke(answers[0].name)
        assert revoked.device_certificate.state == pki_pb2.DeviceCertificate.STATE_REVOKED
        with pytest.raises(GroundswellError) as refused:
            await site.admit(leaf)
        assert refused.value.reason == "CERTIFICATE_REVOKED"
        with pytest.raises(GroundswellError) as stranger:
            await site.admit(Ca("Stranger").leaf("SN-1"))
        assert (stranger.value.reason, stranger.value.status) == ("CA_UNKNOWN", "PERMISSION_DENIED")
    finally:
        await second.stop()


async def test_two_organizations_race_for_one_key_on_the_real_log(site: Site) -> None:
    server = await build_pki(site.settings)
    await serving(server)
    try:
        ca = Ca()
        results = await asyncio.gather(
            site.register(ca, "acme", "factory"),
            site.register(Ca("Copy", key=ca.key), "beta", "factory"),
            return_exceptions=True,
        )
        won = [result for result in results if isinstance(result, pki_pb2.CaCertificate)]
        lost = [getattr(result, "reason", result) for result in results if result not in won]
        assert [ca.state for ca in won] == [pki_pb2.CaCertificate.STATE_ACTIVE]
        assert lost == ["CA_KEY_TAKEN"]
    finally:
        await server.stop()


async def test_a_certificate_is_issued_confirmed_and_rotated_on_the_real_log_and_over_a_restart(site: Site) -> None:
    factory = Ca()
    leaf = factory.leaf("SN-0042")
    first = await build_pki(site.settings)
    await serving(first)
    try:
        await site.register(factory, "acme", "factory")
        current = await site.admit(leaf)
        issuing = await site.call("CreateIssuingCa", pki_pb2.CreateIssuingCaRequest(parent=ORG, issuing_ca_id="one"))
        request = csr("SN-0042")
        answers = await asyncio.gather(*(site.issue(current, request) for _ in range(4)))
        assert {one.issuing_ca_der for one in answers} == {issuing.der}
        (issued,) = {one.device_certificate.name: one.device_certificate for one in answers}.values()
        assert issued.state == pki_pb2.DeviceCertificate.STATE_NEXT
    finally:
        await first.stop()

    second = await build_pki(site.settings)
    await serving(second)
    try:
        assert (await site.issue(current, request)).device_certificate == issued
        confirmed = await site.admit(x509.load_der_x509_certificate(issued.der))
        assert confirmed.state == pki_pb2.DeviceCertificate.STATE_ACTIVE
        with pytest.raises(GroundswellError) as superseded:
            await site.admit(leaf)
        assert superseded.value.reason == "CERTIFICATE_SUPERSEDED"
        rotate = pki_pb2.RotateIssuingCaRequest(name=issuing.name, successor_id="two")
        successor = await site.call("RotateIssuingCa", rotate)
        # The key of the first was made by the process before: both sign from one key store.
        following = await site.issue(confirmed, csr("SN-0042"))
        assert following.issuing_ca_der == successor.der
        x509.load_der_x509_certificate(following.device_certificate.der).verify_directly_issued_by(
            x509.load_der_x509_certificate(successor.der)
        )
        listed = await site.call(
            "ListDeviceCertificates",
            pki_pb2.ListDeviceCertificatesRequest(parent=ORG, filter=f'device = "{PRODUCT}/devices/SN-0042"'),
        )
        states = sorted(one.state for one in listed.device_certificates)
        kinds = pki_pb2.DeviceCertificate
        assert states == sorted([kinds.STATE_RETIRED, kinds.STATE_ACTIVE, kinds.STATE_NEXT])
    finally:
        await second.stop()


async def test_a_products_policy_comes_through_the_inbox(site: Site) -> None:
    server = await build_pki(site.settings)
    await serving(server)
    try:
        factory = Ca()
        await site.register(factory, "acme", "factory")
        await site.call("CreateIssuingCa", pki_pb2.CreateIssuingCaRequest(parent=ORG, issuing_ca_id="one"))
        current = await site.admit(factory.leaf("SN-1"))
        product = registry_pb2.Product(name=PRODUCT)
        product.policy.certificate_policy.validity.FromSeconds(30 * 24 * 3600)
        async with site.public("registry", site.keys["acme"]) as (opened, metadata):
            update = registry_pb2.UpdateProductRequest(
                product=product, update_mask=FieldMask(paths=["policy.certificate_policy"])
            )
            call = registry_pb2_grpc.RegistryServiceStub(opened).UpdateProduct(update, metadata=metadata, timeout=20)
            await call
        noted = Deadline.after(20)
        while PRODUCT not in server._runtime.snapshot("acme").state.policies:
            await server._runtime.changed("acme", noted)
        issued = (await site.issue(current, csr("SN-1"))).device_certificate
        life_s = issued.not_after.seconds - issued.not_before.seconds
        assert life_s == 30 * 24 * 3600 + 300
    finally:
        await server.stop()
