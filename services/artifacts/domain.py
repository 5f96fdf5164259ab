"""The artifacts service's rules, pure.

A binary's life: UPLOADABLE → HASHABLE → HASHING → SIGNABLE → SIGNED. Only the server's own hash of the bytes in the
store leads to SIGNABLE; a difference leads back to UPLOADABLE with the reason, and the bytes are forgotten. Signed
content never changes. A bundle is offerable while enough distinct, unrevoked keys have signed its statement:
signatures are verified when they are attached, and counted again whenever a key is revoked or the product's policy
changes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as events
from groundswell.registry.v1 import events_pb2 as registry_events

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    check_etag,
)
from libs.eventlog import Context, Decision, Event, Foreign, NewEvent, Public, Task
from libs.names import parent_of, product_of
from libs.resolution import VersionError, parse_version
from libs.rpc.directory import REGISTRY_RECORDS
from libs.trust.canonical import canonical_object, metadata_digest
from libs.trust.signatures import key_id, verify
from libs.trust.statement import Statement, StatementBinary
from services.artifacts.state import (
    CreateArtifact,
    CreateBinary,
    CreateBundle,
    CreateSigningKey,
    CreateVersion,
    HashBinary,
    HashFinished,
    OpenUpload,
    RevokeSigningKey,
    SignBinary,
    SignBundle,
    State,
    Upload,
    UploadCompleted,
)

M = TypeVar("M", bound=Message)
B = pb.Binary

MAX_SIZE: Final = 53_687_091_200_000
MAX_METADATA: Final = 1_000_000
_HEX_DIGEST: Final = re.compile(r"^[0-9a-f]{64}$")
_HEX_SIGNATURE: Final = re.compile(r"^[0-9a-fA-F]{128}$")


def hash_task(name: str, upload_id: str) -> str:
    """Id of the hashing of one upload."""
    return f"hash/{name}/{upload_id}"


class Artifacts:
    """The domain; see the module for its rules."""

    service = "artifacts"
    event_types: Sequence[type[Message]] = (
        events.SigningKeySaved,
        events.ArtifactSaved,
        events.ArtifactVersionSaved,
        events.BinarySaved,
        events.BundleSaved,
        events.SignaturePolicySaved,
    )
    sources: Mapping[str, Sequence[type[Message]]] = {"registry": REGISTRY_RECORDS}

    def __init__(self) -> None:
        self._handlers: dict[type, Callable[[State, Any, Context], Decision]] = {
            CreateSigningKey: self._create_key,
            RevokeSigningKey: self._revoke_key,
            CreateArtifact: self._create_artifact,
            CreateVersion: self._create_version,
            CreateBinary: self._create_binary,
            OpenUpload: self._open_upload,
            UploadCompleted: self._upload_completed,
            HashBinary: self._hash_binary,
            HashFinished: self._hash_finished,
            SignBinary: self._sign_binary,
            CreateBundle: self._create_bundle,
            SignBundle: self._sign_bundle,
            Foreign: self._foreign,
        }

    def initial_state(self, partition: int) -> State:  # noqa: ARG002 - all partitions begin empty
        """Nothing."""
        return State()

    def decide(self, state: State, command: object, ctx: Context) -> Decision:
        """See :class:`libs.eventlog.Domain`."""
        return self._handlers[type(command)](state, command, ctx)

    def evolve(self, state: State, event: Event) -> State:
        """After-images replace what they are images of."""
        payload = event.payload
        if isinstance(payload, events.BinarySaved):
            name = payload.binary.name
            upload = Upload(payload.staging_key, payload.upload_id, payload.blob_key)
            return replace(
                state, binaries=state.binaries.set(name, payload.binary), uploads=state.uploads.set(name, upload)
            )
        if isinstance(payload, events.BundleSaved):
            name = payload.bundle.name
            return replace(
                state,
                bundles=state.bundles.set(name, payload.bundle),
                bundle_blobs=state.bundle_blobs.set(name, tuple(payload.blob_keys)),
            )
        if isinstance(payload, events.SigningKeySaved):
            key = payload.signing_key
            return replace(state, signing_keys=state.signing_keys.set(key.name, key))
        if isinstance(payload, events.ArtifactSaved):
            return replace(state, artifacts=state.artifacts.set(payload.artifact.name, payload.artifact))
        if isinstance(payload, events.ArtifactVersionSaved):
            version = payload.artifact_version
            return replace(state, versions=state.versions.set(version.name, version))
        if isinstance(payload, events.SignaturePolicySaved):
            required = state.required_signatures.set(payload.product, payload.required_signatures)
            return replace(state, required_signatures=required)
        return state

    # Signing keys.

    def _create_key(self, state: State, command: CreateSigningKey, ctx: Context) -> Decision:
        key = _copy(command.key)
        _refuse_existing(key.name, state.signing_keys)
        if len(key.public_key) != 32:
            raise InvalidArgumentError(
                "INVALID_FIELD", "public_key holds a raw Ed25519 key of 32 bytes", field="signing_key.public_key"
            )
        key.key_id = key_id(key.public_key)
        product = product_of(key.name)
        for known in state.signing_keys.values():
            if known.key_id == key.key_id and product_of(known.name) == product:
                raise AlreadyExistsError(
                    "SIGNING_KEY_TAKEN", f"this key is registered as {known.name}", resource=known.name
                )
        key.revoked = False
        key.create_time.CopyFrom(_time(ctx.now_ms))
        return Decision((_save_key(key, "signing_key.created", ctx),), key)

    def _revoke_key(self, state: State, command: RevokeSigningKey, ctx: Context) -> Decision:
        known = _find(command.name, state.signing_keys)
        check_etag(command.etag, known.etag, known.name)
        if known.revoked:
            return Decision(result=known)
        key = _copy(known)
        key.revoked = True
        saved = [_save_key(key, "signing_key.revoked", ctx)]
        after = replace(state, signing_keys=state.signing_keys.set(key.name, key))
        saved += self._judge_again(after, product_of(key.name), ctx)
        return Decision(tuple(saved), key)

    # Artifacts, versions, binaries.

    def _create_artifact(self, state: State, command: CreateArtifact, ctx: Context) -> Decision:
        artifact = _copy(command.artifact)
        _refuse_existing(artifact.name, state.artifacts)
        artifact.custom_metadata = _metadata(artifact.custom_metadata, "artifact.custom_metadata")
        artifact.create_time.CopyFrom(_time(ctx.now_ms))
        artifact.etag = _etag(artifact.name, ctx)
        event = NewEvent(ctx.organization, artifact.name, events.ArtifactSaved(artifact=artifact))
        return Decision((event,), artifact)

    def _create_version(self, state: State, command: CreateVersion, ctx: Context) -> Decision:
        version = _copy(command.version)
        _find(parent_of(version.name), state.artifacts)
        _refuse_existing(version.name, state.versions)
        version.version = version.version or version.name.rpartition("/")[2]
        if len(version.version) > 128:
            raise InvalidArgumentError("INVALID_FIELD", "a version has 1 to 128 characters", field="artifact_version")
        version.custom_metadata = _metadata(version.custom_metadata, "artifact_version.custom_metadata")
        version.create_time.CopyFrom(_time(ctx.now_ms))
        version.etag = _etag(version.name, ctx)
        event = NewEvent(ctx.organization, version.name, events.ArtifactVersionSaved(artifact_version=version))
        return Decision((event,), version)

    def _create_binary(self, state: State, command: CreateBinary, ctx: Context) -> Decision:
        binary = _copy(command.binary)
        parent = parent_of(binary.name)
        _find(parent, state.versions)
        _refuse_existing(binary.name, state.binaries)
        if not _HEX_DIGEST.match(binary.sha256):
            raise InvalidArgumentError("INVALID_FIELD", "sha256 holds 64 lowercase hex digits", field="binary.sha256")
        if not 0 < binary.size <= MAX_SIZE:
            raise InvalidArgumentError("INVALID_FIELD", f"size is 1 to {MAX_SIZE} bytes", field="binary.size")
        if not 0 < len(binary.target) <= 128:
            raise InvalidArgumentError("INVALID_FIELD", "target has 1 to 128 characters", field="binary.target")
        for name, known in state.binaries.items():
            if parent_of(name) == parent and known.target == binary.target and known.state != B.STATE_DESTROYED:
                raise AlreadyExistsError(
                    "TARGET_TAKEN", f"{name} is the binary for target {binary.target}", resource=name
                )
        binary.custom_metadata = _metadata(binary.custom_metadata, "binary.custom_metadata")
        binary.state, binary.state_reason = B.STATE_UPLOADABLE, ""
        del binary.signatures[:]
        binary.create_time.CopyFrom(_time(ctx.now_ms))
        return _saved(binary, Upload(), ctx)

    def _open_upload(self, state: State, command: OpenUpload, ctx: Context) -> Decision:
        binary = _in_state(state, command.name, B.STATE_UPLOADABLE)
        upload = state.uploads.get(command.name, Upload())
        if upload.upload_id:
            # Somebody was faster: the caller aborts its own.
            return Decision(result=binary)
        return _saved(_copy(binary), Upload(command.staging_key, command.upload_id), ctx)

    def _upload_completed(self, state: State, command: UploadCompleted, ctx: Context) -> Decision:
        known = _find(command.name, state.binaries)
        if known.state == B.STATE_HASHABLE:
            return Decision(result=known)
        binary = _copy(_in_state(state, command.name, B.STATE_UPLOADABLE))
        binary.state, binary.state_reason = B.STATE_HASHABLE, ""
        return _saved(binary, state.uploads[command.name], ctx)

    def _hash_binary(self, state: State, command: HashBinary, ctx: Context) -> Decision:
        known = _find(command.name, state.binaries)
        check_etag(command.etag, known.etag, known.name)
        if known.state in (B.STATE_HASHING, B.STATE_SIGNABLE, B.STATE_SIGNED):
            return Decision(result=known)
        binary = _copy(_in_state(state, command.name, B.STATE_HASHABLE))
        binary.state = B.STATE_HASHING
        upload = state.uploads[command.name]
        task = Task(
            hash_task(binary.name, upload.upload_id), "hash", binary.name.encode(), organization=ctx.organization
        )
        return replace(_saved(binary, upload, ctx), open_tasks=(task,))

    def _hash_finished(self, state: State, command: HashFinished, ctx: Context) -> Decision:
        known = state.binaries.get(command.name)
        if known is None or known.state != B.STATE_HASHING:
            return Decision(close_tasks=(command.task_id,))
        binary = _copy(known)
        upload = state.uploads[command.name]
        if (command.sha256, command.size) == (known.sha256, known.size):
            binary.state = B.STATE_SIGNABLE
            upload = replace(upload, blob_key=command.blob_key)
        else:
            binary.state = B.STATE_UPLOADABLE
            binary.state_reason = "SIZE_MISMATCH" if command.size != known.size else "DIGEST_MISMATCH"
            upload = Upload()
        return replace(_saved(binary, upload, ctx), close_tasks=(command.task_id,))

    def _sign_binary(self, state: State, command: SignBinary, ctx: Context) -> Decision:
        known = _find(command.name, state.binaries)
        check_etag(command.etag, known.etag, known.name)
        if known.state not in (B.STATE_SIGNABLE, B.STATE_SIGNED):
            raise _wrong_state(known, "SIGNABLE or SIGNED")
        signature = self._verified(state, command.signature, known.name, known.sha256.encode())
        if any(one.key_id == signature.key_id for one in known.signatures):
            return Decision(result=known)
        binary = _copy(known)
        binary.signatures.append(signature)
        binary.state = B.STATE_SIGNED
        return _saved(binary, state.uploads[command.name], ctx)

    def _verified(self, state: State, signature: pb.Signature, name: str, message: bytes) -> pb.Signature:
        """The signature in its stored form. Unknown, revoked and wrong ones each have their reason."""
        product = product_of(name)
        keys = [
            k for k in state.signing_keys.values() if k.key_id == signature.key_id and product_of(k.name) == product
        ]
        if not keys:
            raise FailedPreconditionError(
                "SIGNING_KEY_UNKNOWN", f"{product} has no signing key {signature.key_id[:64]}", key_id=signature.key_id
            )
        if keys[0].revoked:
            raise FailedPreconditionError("SIGNING_KEY_REVOKED", f"{keys[0].name} was revoked", resource=keys[0].name)
        text = signature.signature
        if not _HEX_SIGNATURE.match(text) or not verify(keys[0].public_key, bytes.fromhex(text), message):
            raise InvalidArgumentError(
                "SIGNATURE_INVALID", f"this is no signature of {keys[0].name} over {name}", field="signature"
            )
        return pb.Signature(key_id=signature.key_id, signature=text.lower())

    # Bundles.

    def _create_bundle(self, state: State, command: CreateBundle, ctx: Context) -> Decision:
        _refuse_existing(command.name, state.bundles)
        try:
            parse_version(command.version)
        except VersionError as error:
            raise InvalidArgumentError("INVALID_FIELD", str(error), field="version") from None
        product = product_of(command.name)
        bundle = pb.Bundle(
            name=command.name,
            version=command.version,
            security_version=command.security_version,
            create_time=_time(ctx.now_ms),
        )
        blob_keys: list[str] = []
        for spec in command.entries:
            entry, blob_key = _entry(state, spec, product)
            if any(known.binary == entry.binary for known in bundle.entries):
                raise InvalidArgumentError("INVALID_FIELD", f"{entry.binary} stands twice", field="entries")
            bundle.entries.append(entry)
            blob_keys.append(blob_key)
        statement = Statement(
            product=product,
            version=bundle.version,
            security_version=bundle.security_version,
            binaries=tuple(
                StatementBinary(
                    digest=entry.sha256, size=entry.size, target=entry.target, metadata_digest=entry.metadata_sha256
                )
                for entry in bundle.entries
            ),
        ).to_bytes()
        bundle.statement = statement
        bundle.digest = hashlib.sha256(statement).hexdigest()
        saved: list[NewEvent] = []
        if state.required_signatures.get(product, 1) != command.required_signatures:
            saved.append(_save_policy(product, command.required_signatures, ctx))
            required = state.required_signatures.set(product, command.required_signatures)
            state = replace(state, required_signatures=required)
        _judge(state, bundle)
        saved.append(_save_bundle(bundle, tuple(blob_keys), "bundle.created", ctx))
        return Decision(tuple(saved), bundle)

    def _sign_bundle(self, state: State, command: SignBundle, ctx: Context) -> Decision:
        known = _find(command.name, state.bundles)
        check_etag(command.etag, known.etag, known.name)
        signature = self._verified(state, command.signature, known.name, known.statement)
        if any(one.key_id == signature.key_id for one in known.signatures):
            return Decision(result=known)
        bundle = _copy(known)
        bundle.signatures.append(signature)
        public_key = next(k.public_key for k in state.signing_keys.values() if k.key_id == signature.key_id)
        bundle.public_keys.append(public_key)
        _judge(state, bundle)
        return Decision((_save_bundle(bundle, state.bundle_blobs[bundle.name], "bundle.signed", ctx),), bundle)

    def _judge_again(self, state: State, product: str, ctx: Context) -> list[NewEvent]:
        """Events for the bundles of a product whose offerability changed."""
        saved: list[NewEvent] = []
        for name, known in sorted(state.bundles.items()):
            if product_of(name) != product:
                continue
            bundle = _copy(known)
            _judge(state, bundle)
            if bundle != known:
                saved.append(_save_bundle(bundle, state.bundle_blobs[name], "bundle.updated", ctx))
        return saved

    def _foreign(self, state: State, record: Foreign, ctx: Context) -> Decision:
        """A product's policy says how many signatures its bundles need."""
        if not isinstance(record.payload, registry_events.ProductChanged):
            return Decision()
        product = record.payload.product
        required = max(1, product.policy.required_signatures)
        if state.required_signatures.get(product.name, 1) == required:
            return Decision()
        after = replace(state, required_signatures=state.required_signatures.set(product.name, required))
        saved = [_save_policy(product.name, required, ctx), *self._judge_again(after, product.name, ctx)]
        return Decision(tuple(saved))


def _judge(state: State, bundle: pb.Bundle) -> None:
    """Set whether the bundle may be offered, counting distinct, unrevoked keys."""
    product = product_of(bundle.name)
    revoked = {key.key_id for key in state.signing_keys.values() if key.revoked and product_of(key.name) == product}
    counted = {signature.key_id for signature in bundle.signatures} - revoked
    bundle.offerable = len(counted) >= state.required_signatures.get(product, 1)
    bundle.not_offerable_reason = ""
    if not bundle.offerable:
        lost = any(signature.key_id in revoked for signature in bundle.signatures)
        bundle.not_offerable_reason = "SIGNING_KEY_REVOKED" if lost else "SIGNATURES_MISSING"


def _entry(state: State, spec: pb.BundleEntrySpec, product: str) -> tuple[pb.BundleEntry, str]:
    """A frozen entry with its metadata: entry > binary > version > artifact, whole."""
    if product_of(spec.binary) != product:
        raise InvalidArgumentError("INVALID_FIELD", f"{spec.binary} is not of {product}", field="entries.binary")
    binary = _find(spec.binary, state.binaries)
    if binary.state != B.STATE_SIGNED:
        name = B.State.Name(binary.state).removeprefix("STATE_")
        raise FailedPreconditionError(
            "BINARY_NOT_SIGNED", f"{binary.name} is {name}: a bundle takes signed binaries only", resource=binary.name
        )
    version = state.versions[parent_of(binary.name)]
    artifact = state.artifacts[parent_of(version.name)]
    metadata = (
        _metadata(spec.metadata, "entries.metadata")
        or binary.custom_metadata
        or version.custom_metadata
        or artifact.custom_metadata
        or "{}"
    )
    entry = pb.BundleEntry(
        binary=binary.name,
        target=binary.target,
        size=binary.size,
        sha256=binary.sha256,
        metadata=metadata,
        metadata_sha256=metadata_digest(metadata),
    )
    return entry, state.uploads[binary.name].blob_key


def _metadata(text: str, path: str) -> str:
    """Canonical form of custom metadata; empty stays empty, so that a less specific one can apply."""
    if not text:
        return ""
    if len(text.encode()) > MAX_METADATA:
        raise InvalidArgumentError("INVALID_FIELD", f"metadata holds at most {MAX_METADATA} bytes", field=path)
    try:
        return canonical_object(text)
    except ValueError as error:
        raise InvalidArgumentError("INVALID_FIELD", f"metadata is no JSON object: {error}", field=path) from None


def _copy(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _time(now_ms: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(now_ms)
    return stamp


def _etag(name: str, ctx: Context) -> str:
    return str(ctx.version(name) + 1)


def _find(name: str, held: Mapping[str, M]) -> M:
    known = held.get(name)
    if known is None:
        raise NotFoundError("RESOURCE_NOT_FOUND", f"{name} does not exist", resource=name)
    return known


def _refuse_existing(name: str, held: Mapping[str, object]) -> None:
    if name in held:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{name} exists already", resource=name)


def _in_state(state: State, name: str, wanted: pb.Binary.State.ValueType) -> pb.Binary:
    binary = _find(name, state.binaries)
    if binary.state != wanted:
        raise _wrong_state(binary, B.State.Name(wanted).removeprefix("STATE_"))
    return binary


def _wrong_state(binary: pb.Binary, wanted: str) -> FailedPreconditionError:
    now = B.State.Name(binary.state).removeprefix("STATE_")
    return FailedPreconditionError(
        "WRONG_STATE", f"{binary.name} is {now}; this needs {wanted}", resource=binary.name, state=now
    )


def _saved(binary: pb.Binary, upload: Upload, ctx: Context) -> Decision:
    binary.etag = _etag(binary.name, ctx)
    private = events.BinarySaved(
        binary=binary, staging_key=upload.staging_key, upload_id=upload.upload_id, blob_key=upload.blob_key
    )
    return Decision((NewEvent(ctx.organization, binary.name, private),), binary)


def _save_key(key: pb.SigningKey, change: str, ctx: Context) -> NewEvent:
    key.etag = _etag(key.name, ctx)
    public = events.SigningKeyChanged(signing_key=key, change=change)
    private = events.SigningKeySaved(signing_key=key)
    return NewEvent(ctx.organization, key.name, private, public=(Public(key.name, public),))


def _save_bundle(bundle: pb.Bundle, blob_keys: tuple[str, ...], change: str, ctx: Context) -> NewEvent:
    bundle.etag = _etag(bundle.name, ctx)
    public = events.BundleChanged(bundle=bundle, change=change, blob_keys=blob_keys)
    private = events.BundleSaved(bundle=bundle, blob_keys=blob_keys)
    return NewEvent(ctx.organization, bundle.name, private, public=(Public(bundle.name, public),))


def _save_policy(product: str, required: int, ctx: Context) -> NewEvent:
    private = events.SignaturePolicySaved(product=product, required_signatures=required)
    return NewEvent(ctx.organization, product, private)
