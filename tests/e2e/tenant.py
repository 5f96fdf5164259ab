"""An organization of a test's own with everything a rollout needs, made through the public API."""

from __future__ import annotations

import hashlib
import secrets
import ssl
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.device.v1 import device_pb2
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2

from clients.sdk import ApiError, Client
from clients.sdk.signing import generate_key, public_bytes, sign_bundle, sign_digest
from clients.sdk.upload import Upload, upload_binary
from demo.factory import Factory, Identity
from demo.firmware import archive
from demo.fleet import DevicePlan, Fleet, Site
from demo.steps import wait_until
from tests.e2e.device import RawDevice
from tests.e2e.stack import Stack

TARGET = "board-a"
PRODUCT = "pump"
FACTORY_VERSION = "1.0.0"
POLL_S = 0.5
COHORTS = ("canary", "main")
RUN = """#!/bin/sh
# Comes up after {boot_s} s, and is always well.
case $1 in
--boot) sleep {boot_s} ;;
esac
"""
Rollout = rollout_pb2.Rollout
StageStatus = rollout_pb2.StageStatus
ENDED = (Rollout.STATE_COMPLETED, Rollout.STATE_ABORTED, Rollout.STATE_ROLLED_BACK, Rollout.STATE_HALTED)


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def is_admitted(device: RawDevice) -> bool:
    """Whether a check-in is answered. Until the gateway has heard of the CA, the handshake ends instead."""
    try:
        return device.check_in().status == 200
    except (ssl.SSLError, ConnectionError):
        return False


def _fresh_id() -> str:
    return f"t-{secrets.token_hex(4)}"


def _partition(stack: Stack, organization: str) -> int:
    return zlib.crc32(organization.encode()) % stack.settings.partitions


@dataclass(slots=True)
class Tenant:
    """An organization `t-…` with the product, cohorts `canary` and `main`, a factory CA and a signing key."""

    stack: Stack
    directory: Path
    organization: str
    api_key: str
    client: Client
    request_ids: list[str]
    factory: Factory
    signing_key: Any = None
    codes: dict[str, str] = field(default_factory=dict)
    """Verification codes by their ids: shown while they are not used."""
    fleet: Fleet = field(init=False)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.directory / "devices")

    @classmethod
    def create(cls, stack: Stack, directory: Path, beside: Tenant | None = None) -> Tenant:
        """A fresh organization; `beside` another one when it must share that one's partition."""
        directory.mkdir(parents=True, exist_ok=True)
        organization = _fresh_id()
        while beside is not None and _partition(stack, organization) != _partition(stack, beside.organization):
            organization = _fresh_id()
        secret = secrets.token_hex(24)
        stack.platform.registry.CreateOrganization(
            registry_pb2.CreateOrganizationRequest(
                organization_id=organization,
                organization=registry_pb2.Organization(display_name=organization),
                owner_key_id="owner",
                owner_key_sha256=hashlib.sha256(secret.encode()).digest(),
            )
        )
        acknowledged: list[str] = []
        key = f"gsw_{organization}_owner_{secret}"
        client = stack.client(key, on_acknowledged=lambda _, request: acknowledged.append(request))
        factory = Factory(f"factory of {organization}", directory / "factory")
        tenant = cls(stack, directory, organization, key, client, acknowledged, factory)
        tenant._furnish()
        return tenant

    def close(self) -> None:
        self.fleet.stop()
        self.client.close()

    # Names.

    @property
    def name(self) -> str:
        return f"organizations/{self.organization}"

    @property
    def product(self) -> str:
        return f"{self.name}/products/{PRODUCT}"

    def cohort(self, cohort_id: str) -> str:
        return f"{self.product}/cohorts/{cohort_id}"

    def device_name(self, device_id: str) -> str:
        return f"{self.product}/devices/{device_id}"

    def rollout_name(self, rollout_id: str) -> str:
        return f"{self.product}/rollouts/{rollout_id}"

    @property
    def server_name(self) -> str:
        return f"{self.organization}.{self.stack.profile.gateway_domain}"

    # What it is made of.

    def _furnish(self) -> None:
        registry = self.client.registry
        registry.CreateProduct(
            registry_pb2.CreateProductRequest(
                parent=self.name,
                product_id=PRODUCT,
                product=registry_pb2.Product(
                    policy=registry_pb2.ConfigurationPolicy(poll_interval=seconds(POLL_S), poll_jitter=seconds(0.05))
                ),
            )
        )
        for cohort_id in COHORTS:
            registry.CreateCohort(
                registry_pb2.CreateCohortRequest(
                    parent=self.product, cohort_id=cohort_id, cohort=registry_pb2.Cohort(display_name=cohort_id)
                )
            )
        self.register_ca(self.factory, "factory")

    def code(self, code_id: str) -> str:
        self.codes[code_id] = self.client.pki.CreateVerificationCode(
            pki_pb2.CreateVerificationCodeRequest(parent=self.name, verification_code_id=code_id)
        ).code
        return self.codes[code_id]

    def ca_request(self, factory: Factory, ca_id: str, proof: Path) -> pki_pb2.RegisterCaCertificateRequest:
        rules = [pki_pb2.CohortRule(common_name_pattern="canary-*", cohort=self.cohort("canary"))]
        jitp = pki_pb2.JitpSettings(
            enabled=True, cohort=self.cohort("main"), cohort_rules=rules, target=TARGET, tags=["made"]
        )
        return pki_pb2.RegisterCaCertificateRequest(
            parent=self.product,
            ca_certificate_id=ca_id,
            certificate_pem=factory.certificate_file.read_text(),
            verification_certificate_pem=proof.read_text(),
            ca_certificate=pki_pb2.CaCertificate(environment=pki_pb2.CaCertificate.ENVIRONMENT_PRODUCTION, jitp=jitp),
        )

    def register_ca(self, factory: Factory, ca_id: str) -> pki_pb2.CaCertificate:
        proof = factory.proof(self.code(ca_id))
        found = self.client.pki.RegisterCaCertificate(self.ca_request(factory, ca_id, proof))
        name = found.name
        return wait_until(
            f"{name} to be active",
            20,
            lambda: (
                (now := self.client.pki.GetCaCertificate(pki_pb2.GetCaCertificateRequest(name=name))).state
                == pki_pb2.CaCertificate.STATE_ACTIVE
                and now
            ),
            0.1,
        )

    # Firmware.

    def key(self) -> Any:
        """The organization's signing key, registered at first use."""
        if self.signing_key is None:
            self.signing_key = generate_key(self.directory / "release.pem")
            self.client.artifacts.CreateSigningKey(
                artifacts_pb2.CreateSigningKeyRequest(
                    parent=self.product,
                    signing_key_id="release",
                    signing_key=artifacts_pb2.SigningKey(public_key=public_bytes(self.signing_key)),
                )
            )
        return self.signing_key

    def program(self, version: str, boot_s: float) -> Path:
        path = self.directory / f"pump-{version}.tar.gz"
        # The version makes every file another one: a binary is known by its digest.
        files = {
            "run": (RUN.format(boot_s=boot_s).encode(), 0o755),
            "version": (f"{self.organization} {version}".encode(), 0o644),
        }
        path.write_bytes(archive(files))
        return path

    def upload(self, version: str, path: Path) -> artifacts_pb2.Binary:
        """Uploaded, hashed by the server, signed here."""
        done = upload_binary(
            self.client,
            Upload(
                path=path,
                artifact=f"{self.product}/artifacts/main",
                version=version,
                binary_id=TARGET,
                target=TARGET,
                metadata='{"role": "program"}',
            ),
        )
        signature = sign_digest(self.key(), done.sha256)
        return self.client.artifacts.SignBinary(artifacts_pb2.SignBinaryRequest(name=done.name, signature=signature))

    def bundle(
        self, version: str, *, security_version: int = 1, boot_s: float = 1.0, sign: bool = True
    ) -> artifacts_pb2.Bundle:
        """A bundle of one program, offerable when signed."""
        binary = self.upload(version, self.program(version, boot_s))
        created = self.client.artifacts.CreateBundle(
            artifacts_pb2.CreateBundleRequest(
                parent=self.product,
                bundle_id=f"fw-{version.replace('.', '-')}",
                version=version,
                security_version=security_version,
                entries=[artifacts_pb2.BundleEntrySpec(binary=binary.name)],
            )
        )
        if not sign:
            return created
        signature = sign_bundle(self.key(), created)
        signed = self.client.artifacts.SignBundle(
            artifacts_pb2.SignBundleRequest(name=created.name, signature=signature)
        )
        assert signed.offerable, signed.not_offerable_reason
        return signed

    # Devices.

    def start_agents(self, *device_ids: str, identity: Identity | None = None) -> None:
        """Real agents as processes; returns when the registry knows them all. One may come with another identity."""
        site = Site(
            gateway=self.stack.profile.gateway,
            server_name=self.server_name,
            ca_file=self.stack.profile.ca.resolve(),
            product=self.product,
            target=TARGET,
            trusted_keys=[public_bytes(self.key()).hex()],
            factory_version=FACTORY_VERSION,
        )
        for number, device_id in enumerate(device_ids):
            self.fleet.add(DevicePlan(device_id, identity or self.factory.device(device_id), f"{number:04d}"), site)
            self.fleet.devices[device_id].start()
        wanted = set(device_ids)
        wait_until("the agents to enrol", 40, lambda: wanted <= set(self.devices()), 0.2)

    def devices(self) -> dict[str, registry_pb2.Device]:
        request = registry_pb2.ListDevicesRequest(parent=self.product)
        return {
            device.identifier: device
            for device in self.client.pages(self.client.registry.ListDevices, request, "devices")
        }

    def issuing_ca(self, ca_id: str = "one") -> pki_pb2.IssuingCa:
        """The CA that signs operational certificates."""
        request = pki_pb2.CreateIssuingCaRequest(parent=self.name, issuing_ca_id=ca_id)
        return self.client.pki.CreateIssuingCa(request)

    def certificates(self, device_id: str) -> list[pki_pb2.DeviceCertificate]:
        """A device's certificates, oldest first."""
        request = pki_pb2.ListDeviceCertificatesRequest(
            parent=self.name, filter=f'device = "{self.device_name(device_id)}"'
        )
        found = self.client.pages(self.client.pki.ListDeviceCertificates, request, "device_certificates")
        return sorted(found, key=lambda one: one.create_time.ToNanoseconds())

    def raw_device(self, identity: Identity) -> RawDevice:
        return RawDevice(self.stack.profile.gateway, self.server_name, self.stack.profile.ca, identity)

    def enrolled(self, device_id: str) -> RawDevice:
        """A device without an agent, known to the installation."""
        device = self.raw_device(self.factory.device(device_id))
        wait_until(f"{device_id} to be admitted", 60, lambda: is_admitted(device), 0.2)
        # The gateway reads the registry; the rollout service hears of the device in its own time.
        wait_until(f"{device_id} to be known to rollouts", 20, lambda: self.is_known_to_rollouts(device_id), 0.1)
        return device

    def is_known_to_rollouts(self, device_id: str) -> bool:
        try:
            self.explain(device_id)
        except ApiError as error:
            if error.reason == "RESOURCE_NOT_FOUND":
                return False
            raise
        return True

    def explain(self, device_id: str) -> rollout_pb2.ExplainDeviceResponse:
        return self.client.rollout.ExplainDevice(rollout_pb2.ExplainDeviceRequest(name=self.device_name(device_id)))

    def runs(self, device_id: str) -> str:
        """Version that the device last reported, as rollout knows it; empty while it has not heard of the device."""
        try:
            return self.explain(device_id).running.version
        except ApiError as error:
            if error.code != "NOT_FOUND":
                raise
            return ""

    # Rollouts.

    def start_rollout(
        self,
        bundle: artifacts_pb2.Bundle,
        *,
        cohorts: Sequence[tuple[str, int]],
        soak_s: float = 1.0,
        dark_after_s: float = 60.0,
        tags: Sequence[str] = (),
    ) -> str:
        """Create and start; `cohorts` are the stages, each with the devices that must confirm. Its name."""
        rollout_id = f"to-{bundle.version.replace('.', '-')}"
        stages = [
            rollout_pb2.Stage(
                display_name=cohort,
                cohort=self.cohort(cohort),
                tags=tags,
                max_in_flight=10,
                gate=rollout_pb2.Gate(
                    min_sample=size,
                    soak=seconds(soak_s),
                    dark_after=seconds(dark_after_s),
                    stall_after=seconds(600),
                ),
            )
            for cohort, size in cohorts
        ]
        created = self.client.rollout.CreateRollout(
            rollout_pb2.CreateRolloutRequest(
                parent=self.product,
                rollout_id=rollout_id,
                rollout=Rollout(
                    bundle=bundle.name,
                    stages=stages,
                    failure_action=Rollout.FAILURE_ACTION_PAUSE,
                    attempt_policy=rollout_pb2.AttemptPolicy(lease=seconds(60), go_valid=seconds(10)),
                ),
            )
        )
        started = self.client.rollout.StartRollout(
            rollout_pb2.StartRolloutRequest(name=created.name, request_id=str(uuid.uuid4()))
        )
        return started.name

    def update_device(self, device_id: str, **values: Any) -> registry_pb2.Device:
        """Change these fields of a device."""
        wanted = registry_pb2.Device(name=self.device_name(device_id), **values)
        return self.client.registry.UpdateDevice(
            registry_pb2.UpdateDeviceRequest(device=wanted, update_mask=FieldMask(paths=list(values)))
        )

    def rollout(self, name: str) -> rollout_pb2.Rollout:
        return self.client.rollout.GetRollout(rollout_pb2.GetRolloutRequest(name=name))

    def attempts(self, name: str) -> list[rollout_pb2.Attempt]:
        request = rollout_pb2.ListAttemptsRequest(parent=name)
        return list(self.client.pages(self.client.rollout.ListAttempts, request, "attempts"))

    def await_rollout(
        self, name: str, what: str, holds: Callable[[rollout_pb2.Rollout], Any], within_s: float = 60.0
    ) -> rollout_pb2.Rollout:
        """Until the condition holds; a rollout that ends otherwise fails at once."""

        def look() -> rollout_pb2.Rollout | None:
            now = self.rollout(name)
            if holds(now):
                return now
            assert now.state not in ENDED, f"waited for {what}, but: {now}\n{self.attempts(name)}"
            return None

        return wait_until(f"{name}: {what}", within_s, look, 0.05)

    def await_completion(self, name: str, within_s: float = 90.0) -> rollout_pb2.Rollout:
        return self.await_rollout(name, "completed", lambda now: now.state == Rollout.STATE_COMPLETED, within_s)

    def await_attempt(self, name: str, *states: str, within_s: float = 60.0) -> rollout_pb2.Attempt:
        """Until an attempt of the rollout is seen in one of the states."""
        wanted = {device_pb2.AttemptState.Value(f"ATTEMPT_STATE_{state}") for state in states}
        return wait_until(
            f"an attempt of {name} to be {' or '.join(states)}",
            within_s,
            lambda: next((attempt for attempt in self.attempts(name) if attempt.state in wanted), None),
            0.05,
        )
