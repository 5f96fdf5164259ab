"""Bundles: what is frozen into them, what their signatures are worth, and when they may be offered.

A bundle is offerable while enough distinct, unrevoked keys have signed its statement, and enough each of its binaries,
and none of those is destroyed. Signatures are verified when they are attached, and counted anew whenever a key is
revoked, a binary destroyed or the product's policy changed: the first hundreds of bundles in the same transaction, the
rest by a task in chunks. A bundle begins without signatures, so the policy matters first when one is attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev
from groundswell.registry.v1 import events_pb2 as registry_events
from msgspec.structs import replace

from libs.errors import FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, Foreign, NewEvent, Public, Task
from libs.names import parent_of, product_of
from libs.resolution import VersionError, parse_version
from libs.trust.canonical import metadata_digest
from libs.trust.statement import Statement, StatementBinary
from services.artifacts.commands import CreateBundle, JudgeProduct, SignBundle, UpdateBundle
from services.artifacts.dependencies import check_dependencies
from services.artifacts.rules import (
    MAX_RECORD,
    MAX_SIGNATURES,
    binary_saved,
    check_room,
    check_text,
    clean_metadata,
    copied,
    existing,
    invalid,
    is_repeated,
    masked,
    next_etag,
    refuse_existing,
    state_name,
    timestamp,
    verified,
)
from services.artifacts.state import State, find, keys_of, shelf, upload_of

JUDGE: Final = "judge"
_CHUNK_NAMES: Final = 1000
_CHUNK_EVENTS: Final = 200
_CHUNK_BYTES: Final = 4_000_000
"""What one decision of a judgement looks at and writes, about: other commands of the partition wait for it."""
Tasks = tuple[Task, ...]

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
    # The bundle stands in its record, and again in the answer that travels with it.
    room = (MAX_RECORD - sum(len(key) + 4 for key in blob_keys) - 2048) // 2 - MAX_SIGNATURES * _SIGNATURE_ROOM
    if bundle.ByteSize() > room:
        raise invalid("entries", f"hold {bundle.ByteSize()} bytes with their metadata, more than {room}")
    check_dependencies(state, tuple(entry.binary for entry in bundle.entries))
    _judge(state, bundle)
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
    _judge(state, bundle, command.required_signatures)
    return Decision((_bundle_saved(bundle, state.bundle_blobs[bundle.name], "bundle.signed", ctx),), bundle)


def update_bundle(state: State, command: UpdateBundle, ctx: Context) -> Decision:
    """A bundle is immutable but for its display name."""
    known = existing(state.bundles, command.bundle.name)
    check_etag(command.bundle.etag, known.etag, known.name)
    bundle = masked(known, command.bundle, command.paths, ("display_name",))
    check_text("bundle.display_name", bundle.display_name)
    if bundle == known:
        return Decision(result=known)
    _judge(state, bundle)
    return Decision((_bundle_saved(bundle, state.bundle_blobs[bundle.name], "bundle.updated", ctx),), bundle)


def judge_again(state: State, product: str, ctx: Context, after: str = "") -> tuple[tuple[NewEvent, ...], Tasks]:
    """Events for what of the product is not worth what it was: all, or as many as one transaction should hold.

    With the rest comes a task that goes on after the last name that was looked at; meanwhile readers are not told the
    old judgement (`current`). Binaries that wait for signatures come first, by their names.
    """
    waiting, known = state.waiting.get(product) or (), shelf(state.bundles, f"{product}/bundles")
    return _judged(state, product, sorted(name for name in (*waiting, *known) if name > after), ctx)


def judge_holders(state: State, binary: str, ctx: Context) -> tuple[tuple[NewEvent, ...], Tasks]:
    """The same for the bundles of one binary."""
    return _judged(state, product_of(binary), sorted(state.bundles_of.get(binary) or ()), ctx)


def _judged(state: State, product: str, names: Sequence[str], ctx: Context) -> tuple[tuple[NewEvent, ...], Tasks]:
    rules = _Rules.of(state, product)
    saved: list[NewEvent] = []
    room = _CHUNK_BYTES
    for seen, name in enumerate(names):
        if seen >= _CHUNK_NAMES or len(saved) >= _CHUNK_EVENTS or room < 0:
            return tuple(saved), (_judging(product, names[seen - 1], ctx),)
        event = _binary_judged(state, name, rules, ctx) or _bundle_judged(state, name, rules, ctx)
        if event is not None:
            saved.append(event)
            room -= 2 * event.payload.ByteSize()
    return tuple(saved), ()


def _binary_judged(state: State, name: str, rules: _Rules, ctx: Context) -> NewEvent | None:
    known = find(state.binaries, name)
    if known is None or unrevoked(known.signatures, rules.keys) < rules.of_binary:
        return None
    binary = copied(known)
    binary.state = pb.Binary.STATE_SIGNED
    return binary_saved(binary, upload_of(state, name), ctx)


def _bundle_judged(state: State, name: str, rules: _Rules, ctx: Context) -> NewEvent | None:
    known = find(state.bundles, name)
    if known is None:
        return None
    bundle = _as_judged(state, known, rules)
    return None if bundle is known else _bundle_saved(bundle, state.bundle_blobs[name], "bundle.updated", ctx)


def judge_product(state: State, command: JudgeProduct, ctx: Context) -> Decision:
    """The next chunk."""
    saved, tasks = judge_again(state, command.product, ctx, command.after)
    return Decision(saved, open_tasks=tasks, close_tasks=(command.task_id,))


def is_judging(open_tasks: Iterable[str], product: str) -> bool:
    """Whether bundles of the product may be worth something else than their last event says."""
    return any(task_id.startswith(f"{JUDGE}/{product}/") for task_id in open_tasks)


def current(state: State, known: pb.Bundle) -> pb.Bundle:
    """The bundle as it is to be judged now, though its next event may still be on its way."""
    return _as_judged(state, known, _Rules.of(state, product_of(known.name)))


def all_current(state: State, product: str) -> Iterator[tuple[str, pb.Bundle]]:
    """All bundles of a product by name, as they are to be judged now."""
    rules = _Rules.of(state, product)
    for name, known in shelf(state.bundles, f"{product}/bundles").items():
        yield name, _as_judged(state, known, rules)


def _as_judged(state: State, known: pb.Bundle, rules: _Rules) -> pb.Bundle:
    reason = _verdict(state, known, rules)
    if (known.offerable, known.not_offerable_reason) == (not reason, reason):
        return known
    bundle = copied(known)
    bundle.offerable, bundle.not_offerable_reason = not reason, reason
    return bundle


def holding(state: State, binary: str) -> Iterator[pb.Bundle]:
    """Bundles with the binary, as they are to be judged now."""
    for name in sorted(state.bundles_of.get(binary) or ()):
        yield current(state, existing(state.bundles, name))


def foreign(state: State, record: Foreign, ctx: Context) -> Decision:
    """A product's policy says how many signatures its bundles and binaries need."""
    if not isinstance(record.payload, registry_events.ProductChanged):
        return Decision()
    product, policy = record.payload.product.name, record.payload.product.policy
    required, of_binary = max(1, policy.required_signatures), max(1, policy.required_binary_signatures)
    if (required_by(state, product), required_of_binary(state, product)) == (required, of_binary):
        return Decision()
    saved = ev.SignaturePolicySaved(product=product, required_signatures=required, required_binary_signatures=of_binary)
    after = replace(
        state,
        required_signatures=state.required_signatures.set(product, required),
        required_binary_signatures=state.required_binary_signatures.set(product, of_binary),
    )
    judged, tasks = judge_again(after, product, ctx)
    return Decision((NewEvent(ctx.organization, product, saved), *judged), open_tasks=tasks)


def required_by(state: State, product: str) -> int:
    """Signatures that the product's bundles need, so far as is known here."""
    return state.required_signatures.get(product) or 1


def required_of_binary(state: State, product: str) -> int:
    """Signatures that each of the product's binaries needs, so far as is known here."""
    return state.required_binary_signatures.get(product) or 1


def unrevoked(signatures: Iterable[pb.Signature], keys: Mapping[str, pb.SigningKey]) -> int:
    """Distinct keys among the signatures that are known and not revoked."""
    return sum(key_id in keys and not keys[key_id].revoked for key_id in {one.key_id for one in signatures})


class _Rules(msgspec.Struct, frozen=True):
    """What a product's signatures are counted by."""

    keys: Mapping[str, pb.SigningKey]
    of_bundle: int
    of_binary: int

    @classmethod
    def of(cls, state: State, product: str) -> _Rules:
        """As they are known here."""
        return cls(keys_of(state, product), required_by(state, product), required_of_binary(state, product))


def _judge(state: State, bundle: pb.Bundle, required: int = 0) -> None:
    """Set whether the bundle may be offered, and why not; a higher number that was just asked for counts."""
    rules = _Rules.of(state, product_of(bundle.name))
    reason = _verdict(state, bundle, replace(rules, of_bundle=max(rules.of_bundle, required)))
    bundle.offerable, bundle.not_offerable_reason = not reason, reason


def _verdict(state: State, bundle: pb.Bundle, rules: _Rules) -> str:
    """Why the bundle may not be offered; empty when it may."""
    for entry in bundle.entries:
        binary = find(state.binaries, entry.binary)
        if binary is not None and binary.state == pb.Binary.STATE_DESTROYED:
            return "BINARY_DESTROYED"
        if binary is None or binary.state != pb.Binary.STATE_SIGNED:
            return "BINARY_NOT_SIGNED"
        if unrevoked(binary.signatures, rules.keys) < rules.of_binary:
            enough_once = len({one.key_id for one in binary.signatures}) >= rules.of_binary
            return "SIGNING_KEY_REVOKED" if enough_once else "BINARY_SIGNATURES_MISSING"
    if unrevoked(bundle.signatures, rules.keys) < rules.of_bundle:
        enough_once = len({one.key_id for one in bundle.signatures}) >= rules.of_bundle
        return "SIGNING_KEY_REVOKED" if enough_once else "SIGNATURES_MISSING"
    return ""


def _judging(product: str, after: str, ctx: Context) -> Task:
    payload = f"{product}\n{after}".encode()
    return Task(f"{JUDGE}/{product}/{after}", JUDGE, payload, organization=ctx.organization)


def _entry(state: State, spec: pb.BundleEntrySpec, product: str) -> pb.BundleEntry:
    """A frozen entry; its metadata is the most specific one there is, whole."""
    if product_of(spec.binary) != product:
        raise invalid("entries.binary", f"holds {spec.binary}, which is not of {product}")
    binary = existing(state.binaries, spec.binary)
    if binary.state != pb.Binary.STATE_SIGNED:
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
