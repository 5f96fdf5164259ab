"""Commands that are refused, each with its stable reason, and nothing of it in any log."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import uuid
from collections.abc import Iterator

import pytest
import urllib3
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.pki.v1 import pki_pb2
from groundswell.registry.v1 import registry_pb2
from groundswell.rollout.v1 import rollout_pb2

from clients.sdk import ApiError, Client
from clients.sdk.signing import generate_key, public_bytes, sign_bundle, sign_digest
from demo.factory import Factory
from demo.steps import wait_until
from libs.trust.signatures import key_id
from tests.e2e import logs
from tests.e2e.stack import Stack
from tests.e2e.tenant import TARGET, Tenant

Binary = artifacts_pb2.Binary


@pytest.fixture(scope="module")
def home(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("home"))
    yield tenant
    tenant.close()


@pytest.fixture(scope="module")
def rival(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    tenant = Tenant.create(stack, tmp_path_factory.mktemp("rival"))
    yield tenant
    tenant.close()


@contextlib.contextmanager
def refused(reason: str, code: str = "") -> Iterator[None]:
    with pytest.raises(ApiError) as caught:
        yield
    assert caught.value.reason == reason, caught.value
    assert not code or caught.value.code == code


# CA certificates.


def test_a_ca_without_a_good_proof_is_not_registered(stack: Stack, home: Tenant, rival: Tenant) -> None:
    used_code = home.codes["factory"]
    fresh, foreign = home.code("second"), rival.code("theirs")
    new = Factory("second factory", home.directory / "second")
    other = Factory("another factory", home.directory / "other")
    cases = {
        "none at all": ("", "INVALID_FIELD"),
        "of another key": (other.proof(fresh).read_text(), "PROOF_NOT_SIGNED_BY_CA"),
        "a code that was used": (new.proof(used_code).read_text(), "PROOF_CODE_USED"),
        "a code nobody gave out": (new.proof(secrets.token_hex(32)).read_text(), "PROOF_CODE_UNKNOWN"),
        "another organization's code": (new.proof(foreign).read_text(), "PROOF_CODE_UNKNOWN"),
    }
    with logs.unchanged(stack, home.organization, rival.organization):
        for proof, reason in cases.values():
            request = home.ca_request(new, "second", new.certificate_file)
            request.verification_certificate_pem = proof
            with refused(reason):
                home.client.pki.RegisterCaCertificate(request)
    listed = home.client.pki.ListCaCertificates(pki_pb2.ListCaCertificatesRequest(parent=home.product))
    assert [ca.name.rsplit("/", 1)[-1] for ca in listed.ca_certificates] == ["factory"]


# Firmware.


def declared(home: Tenant, version: str, content: bytes, sha256: str) -> Binary:
    """A binary that is declared with this digest, of one part."""
    artifacts = home.client.artifacts
    artifact = f"{home.product}/artifacts/main"
    with contextlib.suppress(ApiError):
        artifacts.CreateArtifact(
            artifacts_pb2.CreateArtifactRequest(
                parent=home.product, artifact_id="main", artifact=artifacts_pb2.Artifact()
            )
        )
    artifacts.CreateArtifactVersion(
        artifacts_pb2.CreateArtifactVersionRequest(
            parent=artifact,
            artifact_version_id=version,
            artifact_version=artifacts_pb2.ArtifactVersion(version=version),
        )
    )
    return artifacts.CreateBinary(
        artifacts_pb2.CreateBinaryRequest(
            parent=f"{artifact}/versions/{version}",
            binary_id=TARGET,
            binary=Binary(target=TARGET, size=len(content), sha256=sha256),
        )
    )


def part_of(content: bytes) -> artifacts_pb2.UploadPart:
    return artifacts_pb2.UploadPart(index=1, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def put(home: Tenant, binary: Binary, part: artifacts_pb2.UploadPart, content: bytes) -> int:
    answer = home.client.artifacts.PresignParts(artifacts_pb2.PresignPartsRequest(name=binary.name, parts=[part]))
    link = answer.parts[0]
    with urllib3.PoolManager(retries=False) as pool:
        return pool.request("PUT", link.url, body=content, headers=dict(link.headers)).status


def test_the_store_refuses_a_part_with_another_digest(stack: Stack, home: Tenant) -> None:
    content = b"what was declared"
    binary = declared(home, "7.0.0", content, hashlib.sha256(content).hexdigest())
    part = part_of(content)
    home.client.artifacts.PresignParts(artifacts_pb2.PresignPartsRequest(name=binary.name, parts=[part]))  # opens it
    with logs.unchanged(stack, home.organization):
        assert 400 <= put(home, binary, part, b"what was sent ..."[: len(content)]) < 500
        with refused("PARTS_MISSING"):
            home.client.artifacts.CompleteUpload(artifacts_pb2.CompleteUploadRequest(name=binary.name, parts=[part]))
    now = home.client.artifacts.GetBinary(artifacts_pb2.GetBinaryRequest(name=binary.name))
    assert now.state == Binary.STATE_UPLOADABLE
    assert put(home, binary, part, content) == 200, "the right bytes are still welcome"


def test_a_file_with_another_digest_than_declared_falls_back_and_can_be_sent_again(home: Tenant) -> None:
    right, wrong = b"the right file", b"the wrong file"
    binary = declared(home, "7.1.0", right, hashlib.sha256(right).hexdigest())

    def send(content: bytes) -> Binary:
        part = part_of(content)
        assert put(home, binary, part, content) == 200
        home.client.artifacts.CompleteUpload(artifacts_pb2.CompleteUploadRequest(name=binary.name, parts=[part]))
        home.client.artifacts.HashBinary(artifacts_pb2.HashBinaryRequest(name=binary.name))
        return wait_until("the verdict", 30, settled, 0.1)

    def settled() -> Binary | None:
        now = home.client.artifacts.GetBinary(artifacts_pb2.GetBinaryRequest(name=binary.name))
        return now if now.state not in (Binary.STATE_HASHABLE, Binary.STATE_HASHING) else None

    fallen = send(wrong)
    assert (fallen.state, fallen.state_reason) == (Binary.STATE_UPLOADABLE, "DIGEST_MISMATCH")
    with refused("WRONG_STATE"):
        home.client.artifacts.SignBinary(
            artifacts_pb2.SignBinaryRequest(name=binary.name, signature=sign_digest(home.key(), fallen.sha256))
        )
    sound = send(right)
    assert (sound.state, sound.state_reason) == (Binary.STATE_SIGNABLE, "")


def test_a_bundle_is_signed_by_a_known_key_over_its_own_statement_or_not_at_all(stack: Stack, home: Tenant) -> None:
    bundle = home.bundle("7.2.0", sign=False)
    unknown = generate_key(home.directory / "unknown.pem")
    forged = artifacts_pb2.Signature(
        key_id=key_id(public_bytes(home.key())), signature=unknown.sign(bundle.statement).hex()
    )
    cases = [
        (sign_bundle(unknown, bundle), "SIGNING_KEY_UNKNOWN"),
        (forged, "SIGNATURE_INVALID"),
        (sign_digest(home.key(), bundle.digest), "SIGNATURE_INVALID"),
    ]
    with logs.unchanged(stack, home.organization):
        for signature, reason in cases:
            with refused(reason):
                home.client.artifacts.SignBundle(artifacts_pb2.SignBundleRequest(name=bundle.name, signature=signature))
        with refused("BUNDLE_NOT_OFFERABLE"):
            home.start_rollout(bundle, cohorts=[("canary", 1)])
    assert not home.client.artifacts.GetBundle(artifacts_pb2.GetBundleRequest(name=bundle.name)).offerable


# Etags and request ids.


def test_a_stale_etag_changes_nothing(stack: Stack, home: Tenant) -> None:
    name = home.client.rollout.CreateRollout(
        rollout_pb2.CreateRolloutRequest(
            parent=home.product,
            rollout_id="etags",
            rollout=rollout_pb2.Rollout(
                bundle=home.bundle("7.3.0").name,
                stages=[rollout_pb2.Stage(display_name="canary", cohort=home.cohort("canary"))],
            ),
        )
    ).name
    product = home.client.registry.GetProduct(registry_pb2.GetProductRequest(name=home.product))
    product.display_name, mask = "renamed", FieldMask(paths=["display_name"])
    home.client.registry.UpdateProduct(registry_pb2.UpdateProductRequest(product=product, update_mask=mask))
    stale = home.rollout(name).etag
    home.client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=name, etag=stale))
    home.await_rollout(name, "its stage", lambda now: now.stage_statuses[0].release)
    with logs.unchanged(stack, home.organization):
        with refused("ETAG_MISMATCH"):
            home.client.registry.UpdateProduct(registry_pb2.UpdateProductRequest(product=product, update_mask=mask))
        with refused("ETAG_MISMATCH"):
            home.client.rollout.PauseRollout(rollout_pb2.PauseRolloutRequest(name=name, etag=stale))
    assert home.rollout(name).state == rollout_pb2.Rollout.STATE_RUNNING


def test_one_request_id_with_two_bodies_is_refused(stack: Stack, home: Tenant) -> None:
    request = registry_pb2.CreateCohortRequest(
        parent=home.product, cohort_id="one", cohort=registry_pb2.Cohort(), request_id=str(uuid.uuid4())
    )
    first = home.client.registry.CreateCohort(request)
    other = registry_pb2.CreateCohortRequest()
    other.CopyFrom(request)
    other.cohort_id = "two"
    with logs.unchanged(stack, home.organization):
        with refused("REQUEST_ID_REUSED"):
            home.client.registry.CreateCohort(other)
        assert home.client.registry.CreateCohort(request) == first


# API keys.


def new_key(home: Tenant, key_id: str, *scopes: str) -> str:
    secret = secrets.token_hex(24)
    home.client.registry.CreateApiKey(
        registry_pb2.CreateApiKeyRequest(
            parent=home.name,
            api_key_id=key_id,
            api_key=registry_pb2.ApiKey(scopes=scopes, secret_sha256=hashlib.sha256(secret.encode()).digest()),
        )
    )
    return f"gsw_{home.organization}_{key_id}_{secret}"


def create_cohort(client: Client, home: Tenant) -> None:
    client.registry.CreateCohort(
        registry_pb2.CreateCohortRequest(parent=home.product, cohort_id="no", cohort=registry_pb2.Cohort())
    )


def test_an_api_key_does_what_its_scopes_say_and_nothing_else(stack: Stack, home: Tenant, rival: Tenant) -> None:
    name = home.cohort("canary")
    reads_only = new_key(home, "reader", "registry.cohorts.get")
    with stack.client(reads_only) as reader, logs.unchanged(stack, home.organization, rival.organization):
        reader.tokens.forget()
        assert reader.registry.GetCohort(registry_pb2.GetCohortRequest(name=name)).name == name
        with refused("PERMISSION_MISSING", "PERMISSION_DENIED"):
            create_cohort(reader, home)
        with refused("PERMISSION_MISSING", "PERMISSION_DENIED"):
            reader.rollout.ListRollouts(rollout_pb2.ListRolloutsRequest(parent=home.product))
        # Another organization's things do not exist, whatever is asked of them.
        with refused("RESOURCE_NOT_FOUND", "NOT_FOUND"):
            rival.client.registry.GetCohort(registry_pb2.GetCohortRequest(name=name))
        with refused("RESOURCE_NOT_FOUND", "NOT_FOUND"):
            create_cohort(rival.client, home)
        with refused("RESOURCE_NOT_FOUND", "NOT_FOUND"):
            rival.client.rollout.ListRollouts(rollout_pb2.ListRolloutsRequest(parent=home.product))


def test_unknown_wrong_and_revoked_keys_are_refused(stack: Stack, home: Tenant) -> None:
    key = new_key(home, "short-lived", "*")
    cases = {
        "": "CREDENTIALS_MALFORMED",
        "nonsense": "CREDENTIALS_MALFORMED",
        f"gsw_{home.organization}_nobody_{secrets.token_hex(24)}": "API_KEY_UNKNOWN",
        f"{key.rsplit('_', 1)[0]}_{secrets.token_hex(24)}": "API_KEY_UNKNOWN",
    }
    with logs.unchanged(stack, home.organization):
        for given, reason in cases.items():
            with stack.client(given) as client, refused(reason, "UNAUTHENTICATED"):
                create_cohort(client, home)

    with stack.client(key) as client:
        asked = registry_pb2.GetCohortRequest(name=home.cohort("canary"))
        client.registry.GetCohort(asked)
        home.client.registry.RevokeApiKey(registry_pb2.RevokeApiKeyRequest(name=f"{home.name}/apiKeys/short-lived"))

        def denied() -> str:
            try:
                client.registry.GetCohort(asked)
            except ApiError as error:
                return error.reason
            return ""

        assert wait_until("the revocation", 5, denied, 0.1) == "API_KEY_REVOKED"
