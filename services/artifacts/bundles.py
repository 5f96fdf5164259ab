"""Bundles: what is frozen into them, what their signatures are worth, and when they may be offered.

A bundle is offerable while enough distinct, unrevoked keys have signed its statement and all its binaries are signed.
Signatures are verified when they are attached, and counted anew whenever a key is revoked or the product's policy
changes. A bundle begins without signatures, so the policy matters first when one is attached.
"""

from __future__ import annotations

from dataclasses import replace

from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev
from groundswell.registry.v1 import events_pb2 as registry_events

from libs.errors import FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Foreign, NewEvent, Public
from libs.names import parent_of, product_of
from libs.resolution import VersionError, parse_version
from libs.trust.canonical import metadata_digest
from libs.trust.statement import Statement, StatementBinary
from services.artifacts.commands import CreateBundle, SignBundle
from services.artifacts.rules import (
    MAX_RECORD,
    MAX_SIGNATURES,
    check_room,
    clean_metadata,
    copied,
    existing,
    invalid,
    is_repeated,
    next_etag,
    refuse_existing,
    state_name,
    timestamp,
    verified,
)
from services.artifacts.state import State, find, keys_of, shelf

_SIGNATURE_ROOM = 256
"""Bytes that a signature and its public key take in a bundle, at most."""


def create_bundle(state: State, command: CreateBundle, ctx: Context) -> Decision:
    """Freeze entries and statement."""
    refuse_existing(state.bundles, command.name)
    try:
        parse_version(command.version)
    except VersionError as error:
        raise invalid("version", f"is not semantic: {error}") from None
    product = product_of(command.name)
    bundle = pb.Bundle(
        name=command.name,
        version=command.version,
        security_version=command.security_version,
        create_time=timestamp(ctx.now_ms),
    )
    blob_keys: list[str] = []
    for spec in command.entries:
        if any(known.binary == spec.binary for known in bundle.entries):
            raise invalid("entries", f"hold {spec.binary} twice")
        bundle.entries.append(_entry(state, spec, product))
        blob_keys.append(state.uploads[spec.binary].blob_key)
    statement = _statement(bundle, product)
    bundle.statement, bundle.digest = statement.to_bytes(), statement.digest()
    room = MAX_RECORD - MAX_SIGNATURES * _SIGNATURE_ROOM - sum(len(key) + 4 for key in blob_keys) - 1024
    if bundle.ByteSize() > room:
        raise invalid("entries", f"hold {bundle.ByteSize()} bytes with their metadata, more than {room}")
    _judge(state, bundle, required_by(state, product))
    return Decision((_bundle_saved(bundle, tuple(blob_keys), "bundle.created", ctx),), bundle)


def sign_bundle(state: State, command: SignBundle, ctx: Context) -> Decision:
    """Attach a signature over the statement."""
    known = existing(state.bundles, command.name)
    if is_repeated(command.signature, list(known.signatures)):
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    product = product_of(known.name)
    signature = verified(state, command.signature, known.name, known.statement)
    if any(one.key_id == signature.key_id for one in known.signatures):
        return Decision(result=known)
    check_room(known.name, list(known.signatures))
    bundle = copied(known)
    bundle.signatures.append(signature)
    bundle.public_keys.append(keys_of(state, product)[signature.key_id].public_key)
    # The stricter of what was just asked and what is folded; when the registry's record comes, all is judged anew.
    _judge(state, bundle, max(required_by(state, product), command.required_signatures))
    return Decision((_bundle_saved(bundle, state.bundle_blobs[bundle.name], "bundle.signed", ctx),), bundle)


def judge_again(state: State, product: str, ctx: Context) -> tuple[NewEvent, ...]:
    """An event for each bundle of the product whose offerability is not what it was."""
    saved: list[NewEvent] = []
    for name, known in sorted(shelf(state.bundles, f"{product}/bundles").items()):
        bundle = copied(known)
        _judge(state, bundle, required_by(state, product))
        if bundle != known:
            saved.append(_bundle_saved(bundle, state.bundle_blobs[name], "bundle.updated", ctx))
    return tuple(saved)


def foreign(state: State, record: Foreign, ctx: Context) -> Decision:
    """A product's policy says how many signatures its bundles need."""
    if not isinstance(record.payload, registry_events.ProductChanged):
        return Decision()
    product = record.payload.product
    required = max(1, product.policy.required_signatures)
    if required_by(state, product.name) == required:
        return Decision()
    after = replace(state, required_signatures=state.required_signatures.set(product.name, required))
    policy = ev.SignaturePolicySaved(product=product.name, required_signatures=required)
    return Decision((NewEvent(ctx.organization, product.name, policy), *judge_again(after, product.name, ctx)))


def required_by(state: State, product: str) -> int:
    """Signatures that the product's bundles need, so far as is known here."""
    return state.required_signatures.get(product) or 1


def _judge(state: State, bundle: pb.Bundle, required: int) -> None:
    """Set whether the bundle may be offered, and why not."""
    keys = keys_of(state, product_of(bundle.name))
    signed = {signature.key_id for signature in bundle.signatures}
    valid = {key_id for key_id in signed if key_id in keys and not keys[key_id].revoked}
    reason = ""
    if any(not _is_signed(state, entry.binary) for entry in bundle.entries):
        reason = "BINARY_NOT_SIGNED"
    elif len(valid) < required:
        reason = "SIGNING_KEY_REVOKED" if len(signed) >= required else "SIGNATURES_MISSING"
    bundle.offerable, bundle.not_offerable_reason = not reason, reason


def _is_signed(state: State, name: str) -> bool:
    binary = find(state.binaries, name)
    return binary is not None and binary.state == pb.Binary.STATE_SIGNED


def _entry(state: State, spec: pb.BundleEntrySpec, product: str) -> pb.BundleEntry:
    """A frozen entry; its metadata is the most specific one there is, whole."""
    if product_of(spec.binary) != product:
        raise invalid("entries.binary", f"holds {spec.binary}, which is not of {product}")
    binary = existing(state.binaries, spec.binary)
    if not _is_signed(state, spec.binary):
        raise FailedPreconditionError(
            "BINARY_NOT_SIGNED",
            f"{binary.name} is {state_name(binary)}: a bundle takes signed binaries only",
            resource=binary.name,
            state=state_name(binary),
        )
    version = existing(state.versions, parent_of(binary.name))
    artifact = existing(state.artifacts, parent_of(version.name))
    metadata = (
        clean_metadata("entries.metadata", spec.metadata)
        or binary.custom_metadata
        or version.custom_metadata
        or artifact.custom_metadata
        or "{}"
    )
    return pb.BundleEntry(
        binary=binary.name,
        target=binary.target,
        size=binary.size,
        sha256=binary.sha256,
        metadata=metadata,
        metadata_sha256=metadata_digest(metadata),
    )


def _statement(bundle: pb.Bundle, product: str) -> Statement:
    return Statement(
        product=product,
        version=bundle.version,
        security_version=bundle.security_version,
        binaries=tuple(
            StatementBinary(
                digest=entry.sha256, metadata_digest=entry.metadata_sha256, size=entry.size, target=entry.target
            )
            for entry in bundle.entries
        ),
    )


def _bundle_saved(bundle: pb.Bundle, blob_keys: tuple[str, ...], change: str, ctx: Context) -> NewEvent:
    bundle.etag = next_etag(ctx, bundle.name)
    public = Public(bundle.name, ev.BundleChanged(bundle=bundle, change=change, blob_keys=blob_keys))
    payload = ev.BundleSaved(bundle=bundle, blob_keys=blob_keys)
    return NewEvent(ctx.organization, bundle.name, payload, public=(public,))
