"""The life of a binary. Pure.

UPLOADABLE → HASHABLE → HASHING → SIGNABLE → SIGNED → DESTROYED, and a reset from HASHABLE, HASHING and SIGNABLE back to
UPLOADABLE. Only the server's own hash of the bytes in the store leads to SIGNABLE; a difference leads back to
UPLOADABLE with the reason, and the upload is forgotten. A staged object is deleted by a task after what was learnt of
it is in the log, never before: a hashing that runs again finds the same bytes.

SIGNED is reached when enough distinct, unrevoked keys have signed, and is never left for SIGNABLE again, because what
was bundled must not be reset; what later revocations mean is judged where the binary is offered (`bundles`).
"""

from __future__ import annotations

from typing import Final

from google.protobuf.empty_pb2 import Empty
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.artifacts.v1 import events_pb2 as ev
from msgspec.structs import replace

from libs.errors import FailedPreconditionError, check_etag
from libs.eventlog import Context, Decision, NewEvent, Task
from libs.names import parent_of, product_of
from services.artifacts import bundles
from services.artifacts.commands import (
    CreateBinary,
    DeleteBinary,
    DestroyBinary,
    ForgetUpload,
    HashBinary,
    HashFinished,
    OpenUpload,
    ResetBinary,
    SignBinary,
    UpdateBinary,
    UploadCompleted,
)
from services.artifacts.contents import drop_task, reserved
from services.artifacts.rules import (
    binary_saved,
    check_content,
    check_room,
    clean_metadata,
    copied,
    existing,
    in_use,
    invalid,
    is_repeated,
    masked,
    refuse_existing,
    timestamp,
    verified,
    wrong_state,
)
from services.artifacts.state import State, Upload, keys_of, put, shelf, upload_of

HASH: Final = "hash"
ABORT: Final = "abort_upload"
B = pb.Binary


def create_binary(state: State, command: CreateBinary, ctx: Context) -> Decision:
    """Declare a binary; a version has one live binary for a target."""
    binary = copied(command.binary)
    existing(state.versions, parent_of(binary.name))
    refuse_existing(state.binaries, binary.name)
    binary.target = binary.target or "portable"
    check_content(binary)
    for name, known in shelf(state.binaries, binary.name.rpartition("/")[0]).items():
        if known.target == binary.target and known.state != B.STATE_DESTROYED:
            raise FailedPreconditionError(
                "TARGET_TAKEN",
                f"{name} is this version's binary for the target {binary.target}",
                resource=name,
                target=binary.target,
            )
    binary.custom_metadata = clean_metadata("binary.custom_metadata", binary.custom_metadata)
    binary.state, binary.state_reason = B.STATE_UPLOADABLE, ""
    del binary.signatures[:]
    binary.create_time.CopyFrom(timestamp(ctx.now_ms))
    return _save(binary, Upload(), ctx)


def open_upload(state: State, command: OpenUpload, ctx: Context) -> Decision:
    """Record an upload; whoever finds another recorded was slower, and aborts its own."""
    binary = _in_state(state, command.name, B.STATE_UPLOADABLE)
    if upload_of(state, command.name).upload_id:
        return Decision(result=binary)
    return _save(copied(binary), Upload(command.staging_key, command.upload_id), ctx)


def forget_upload(state: State, command: ForgetUpload, ctx: Context) -> Decision:
    """Let a new upload be opened; a newer one is left alone."""
    binary = _in_state(state, command.name, B.STATE_UPLOADABLE)
    if upload_of(state, command.name).upload_id != command.upload_id:
        return Decision(result=binary)
    return _save(copied(binary), Upload(), ctx)


def upload_completed(state: State, command: UploadCompleted, ctx: Context) -> Decision:
    """The whole object is in the store."""
    known = existing(state.binaries, command.name)
    upload = upload_of(state, command.name)
    if known.state == B.STATE_HASHABLE and upload.upload_id == command.upload_id:
        return Decision(result=known)
    binary = copied(_in_state(state, command.name, B.STATE_UPLOADABLE))
    if not command.upload_id or upload.upload_id != command.upload_id:
        raise FailedPreconditionError(
            "PARTS_MISSING", f"another upload of {binary.name} has begun: upload its parts", resource=binary.name
        )
    binary.state, binary.state_reason = B.STATE_HASHABLE, ""
    return _save(binary, upload, ctx)


def hash_binary(state: State, command: HashBinary, ctx: Context) -> Decision:
    """Ask for the server's own hash; asking again while it runs changes nothing."""
    known = existing(state.binaries, command.name)
    if known.state == B.STATE_HASHING:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    binary = copied(_in_state(state, command.name, B.STATE_HASHABLE))
    binary.state = B.STATE_HASHING
    # The content key is held from now on, before anything is written there.
    upload = replace(upload_of(state, command.name), blob_key=reserved(state, ctx.organization, binary.sha256))
    task = Task(f"{HASH}/{upload.staging_key}", HASH, binary.name.encode(), organization=ctx.organization)
    return _save(binary, upload, ctx).replace(open_tasks=(task,))


def hash_finished(state: State, command: HashFinished, ctx: Context) -> Decision:
    """What the server's own hash says; the staged object is of no more use either way."""
    known = existing(state.binaries, command.name)
    upload = upload_of(state, command.name)
    if known.state != B.STATE_HASHING or upload.staging_key != command.staging_key:
        return Decision(close_tasks=(command.task_id,))
    binary = copied(known)
    if (command.sha256, command.size) == (known.sha256, known.size):
        binary.state = B.STATE_SIGNABLE
        binary.sha1, binary.md5 = command.sha1, command.md5
        upload = Upload(blob_key=upload.blob_key)
    else:
        binary.state = B.STATE_UPLOADABLE
        binary.state_reason = "SIZE_MISMATCH" if command.size != known.size else "DIGEST_MISMATCH"
        upload = Upload()
    drop = drop_task((command.staging_key,), ctx.organization)
    return _save(binary, upload, ctx).replace(open_tasks=(drop,), close_tasks=(command.task_id,))


def reset_binary(state: State, command: ResetBinary, ctx: Context) -> Decision:
    """Back to UPLOADABLE: what was uploaded is deleted, and what was declared may be declared anew."""
    known = existing(state.binaries, command.name)
    check_etag(command.etag, known.etag, known.name)
    if known.state not in (B.STATE_HASHABLE, B.STATE_HASHING, B.STATE_SIGNABLE):
        raise wrong_state(known, "HASHABLE, HASHING or SIGNABLE")
    binary = copied(known)
    binary.size, binary.sha256 = command.size or known.size, command.sha256 or known.sha256
    check_content(binary)
    binary.state, binary.state_reason = B.STATE_UPLOADABLE, ""
    binary.sha1 = binary.md5 = ""
    del binary.signatures[:]
    return _given_up(_save(binary, Upload(), ctx), upload_of(state, known.name), ctx)


def update_binary(state: State, command: UpdateBinary, ctx: Context) -> Decision:
    """New custom metadata; what is signed is the content alone."""
    known = existing(state.binaries, command.binary.name)
    check_etag(command.binary.etag, known.etag, known.name)
    binary = masked(known, command.binary, command.paths, ("custom_metadata",))
    if known.state == B.STATE_DESTROYED:
        raise wrong_state(known, "any state but DESTROYED")
    binary.custom_metadata = clean_metadata("binary.custom_metadata", binary.custom_metadata)
    return _save(binary, upload_of(state, known.name), ctx) if binary != known else Decision(result=known)


def delete_binary(state: State, command: DeleteBinary, ctx: Context) -> Decision:
    """Forget a binary that was never signed, so that nothing can refer to it."""
    known = existing(state.binaries, command.name)
    check_etag(command.etag, known.etag, known.name)
    if known.state in (B.STATE_SIGNED, B.STATE_DESTROYED):
        raise wrong_state(known, "a state before SIGNED")
    payload = ev.BinarySaved(binary=known, deleted=True)
    decision = Decision((NewEvent(ctx.organization, known.name, payload),), Empty())
    return _given_up(decision, upload_of(state, known.name), ctx)


def destroy_binary(state: State, command: DestroyBinary, ctx: Context) -> Decision:
    """Give up the content for good and keep the record; bundles with it stop being offerable in this transaction."""
    known = existing(state.binaries, command.name)
    if known.state == B.STATE_DESTROYED:
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    _in_state(state, command.name, B.STATE_SIGNED)
    if command.force and not command.reason.strip():
        raise invalid("reason", "must say why a binary is destroyed by force")
    user = next((bundle for bundle in bundles.holding(state, known.name) if bundle.offerable), None)
    if user is not None and not command.force:
        raise in_use(known.name, user.name, "is in a bundle that may be offered; destroy it with force and a reason")
    binary = copied(known)
    binary.state, binary.destroy_reason = B.STATE_DESTROYED, command.reason
    binary.destroy_time.CopyFrom(timestamp(ctx.now_ms))
    saved = binary_saved(binary, Upload(), ctx)
    after = replace(state, binaries=put(state.binaries, binary.name, binary))
    judged, tasks = bundles.judge_holders(after, binary.name, ctx)
    # The answer travels with the last event: the small one.
    return Decision((*judged, saved), binary, open_tasks=tasks)


def _given_up(decision: Decision, upload: Upload, ctx: Context) -> Decision:
    """The decision, with the tasks that clear away an upload."""
    if not upload.staging_key:
        return decision
    payload = f"{upload.staging_key}\n{upload.upload_id}".encode()
    task = Task(f"{ABORT}/{upload.staging_key}", ABORT, payload, organization=ctx.organization)
    return decision.replace(open_tasks=(task,), close_tasks=(f"{HASH}/{upload.staging_key}",))


def sign_binary(state: State, command: SignBinary, ctx: Context) -> Decision:
    """Attach a signature over the ASCII lowercase hex of the digest."""
    known = existing(state.binaries, command.name)
    if known.state not in (B.STATE_SIGNABLE, B.STATE_SIGNED):
        raise wrong_state(known, "SIGNABLE or SIGNED")
    if is_repeated(command.signature, list(known.signatures)):
        return Decision(result=known)
    check_etag(command.etag, known.etag, known.name)
    signature = verified(state, command.signature, known.name, known.sha256.encode())
    if any(one.key_id == signature.key_id for one in known.signatures):
        return Decision(result=known)
    check_room(known.name, list(known.signatures))
    binary = copied(known)
    binary.signatures.append(signature)
    # The stricter of what was just asked and what is folded; when the registry's record comes, all is judged anew.
    product = product_of(known.name)
    required = max(bundles.required_of_binary(state, product), command.required_signatures)
    if bundles.unrevoked(binary.signatures, keys_of(state, product)) >= required:
        binary.state = B.STATE_SIGNED
    saved = binary_saved(binary, upload_of(state, command.name), ctx)
    judged: tuple[NewEvent, ...] = ()
    tasks: tuple[Task, ...] = ()
    if known.state == B.STATE_SIGNED:
        # It may be in bundles that a revoked key keeps from being offered.
        after = replace(state, binaries=put(state.binaries, binary.name, binary))
        judged, tasks = bundles.judge_holders(after, binary.name, ctx)
    return Decision((*judged, saved), binary, open_tasks=tasks)


def _save(binary: pb.Binary, upload: Upload, ctx: Context) -> Decision:
    return Decision((binary_saved(binary, upload, ctx),), binary)


def _in_state(state: State, name: str, wanted: pb.Binary.State.ValueType) -> pb.Binary:
    binary = existing(state.binaries, name)
    if binary.state != wanted:
        raise wrong_state(binary, B.State.Name(wanted).removeprefix("STATE_"))
    return binary
