"""Artifacts, their versions and attachments; what is listed, changed, reset and destroyed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.artifacts.v1 import artifacts_pb2 as pb

from clients.cli.commands.artifacts import BINARY, binary, bundle, signing_key
from clients.cli.context import Session, session
from clients.sdk.archive import read_archive
from clients.sdk.attachments import Document, add_attachment, fetch_attachment
from clients.sdk.signing import load_key
from clients.sdk.transfer import export_bundle, import_bundle

artifact = typer.Typer(help="Artifacts: named pieces of firmware that have versions.", no_args_is_help=True)
version = typer.Typer(help="Versions of artifacts.", no_args_is_help=True)
attachment = typer.Typer(help="Attachments: SBOMs, provenance and other documents.", no_args_is_help=True)

VERSION: Final = ("artifacts", "versions")
ATTACHMENT: Final = ("artifacts", "versions", "attachments")
KINDS: Final = {
    "cyclonedx": pb.Attachment.KIND_SBOM_CYCLONEDX,
    "spdx": pb.Attachment.KIND_SBOM_SPDX,
    "provenance": pb.Attachment.KIND_PROVENANCE,
    "other": pb.Attachment.KIND_OTHER,
}
Filter = Annotated[str, typer.Option("--filter", help='`field = "value"`, joined by AND.')]
Metadata = Annotated[str | None, typer.Option(help="Custom metadata, a JSON object; empty takes it away.")]
Etag = Annotated[str, typer.Option(help="Refuse when the resource is not at this etag.")]


def register(app: typer.Typer) -> None:
    """Add the groups; more commands for the groups of `artifacts` are added on import."""
    app.add_typer(artifact, name="artifact")
    app.add_typer(version, name="version")
    app.add_typer(attachment, name="attachment")


def _list(state: Session, plural: str, parent: str, filter_: str, field: str, columns: tuple[str, ...]) -> None:
    request: Any = getattr(pb, f"List{plural}Request")(parent=parent, filter=filter_, page_size=500)
    method = getattr(state.client.artifacts, f"List{plural}")
    state.output.many(state.client.pages(method, request, field), columns)


def _mask(changes: dict[str, object]) -> FieldMask:
    if not changes:
        raise typer.BadParameter("nothing to change: see --help for what can be")
    return FieldMask(paths=sorted(changes))


def _given(**fields: str | None) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@signing_key.command("list")
def signing_key_list(context: typer.Context, filter_: Filter = "") -> None:
    """List the product's signing keys. Example: `swell signing-key list --filter 'revoked = false'`."""
    state = session(context)
    _list(state, "SigningKeys", state.product_name(), filter_, "signing_keys", ("name", "key_id", "revoked"))


@artifact.command("create")
def artifact_create(
    context: typer.Context,
    artifact_id: str,
    display_name: Annotated[str, typer.Option(help="For people.")] = "",
    metadata: Annotated[str, typer.Option(help="Custom metadata, a JSON object.")] = "",
) -> None:
    """Create an artifact; `swell upload` does it by itself. Example: `swell artifact create main`."""
    state = session(context)
    wanted = pb.Artifact(display_name=display_name, custom_metadata=metadata)
    request = pb.CreateArtifactRequest(parent=state.product_name(), artifact_id=artifact_id, artifact=wanted)
    state.output.one(state.client.artifacts.CreateArtifact(request))


@artifact.command("list")
def artifact_list(context: typer.Context, filter_: Filter = "") -> None:
    """List the product's artifacts. Example: `swell artifact list`."""
    state = session(context)
    _list(state, "Artifacts", state.product_name(), filter_, "artifacts", ("name", "display_name"))


@artifact.command("get")
def artifact_get(context: typer.Context, name: str) -> None:
    """Read an artifact. Example: `swell artifact get main`."""
    state = session(context)
    request = pb.GetArtifactRequest(name=state.name_in_product("artifacts", name))
    state.output.one(state.client.artifacts.GetArtifact(request))


@artifact.command("update")
def artifact_update(
    context: typer.Context,
    name: str,
    display_name: Annotated[str | None, typer.Option(help="For people.")] = None,
    metadata: Metadata = None,
    etag: Etag = "",
) -> None:
    """Change display name or metadata. Example: `swell artifact update main --metadata '{"chip": "m4"}'`."""
    state = session(context)
    changes = _given(display_name=display_name, custom_metadata=metadata)
    changed = pb.Artifact(name=state.name_in_product("artifacts", name), etag=etag, **changes)
    request = pb.UpdateArtifactRequest(artifact=changed, update_mask=_mask(changes))
    state.output.one(state.client.artifacts.UpdateArtifact(request))


@artifact.command("delete")
def artifact_delete(context: typer.Context, name: str, etag: Etag = "") -> None:
    """Delete an artifact that has no versions. Example: `swell artifact delete main`."""
    state = session(context)
    full = state.name_in_product("artifacts", name)
    state.client.artifacts.DeleteArtifact(pb.DeleteArtifactRequest(name=full, etag=etag))
    state.output.text(f"{full} is deleted", name=full)


@version.command("create")
def version_create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`ARTIFACT/VERSION`.")],
    text: Annotated[str, typer.Option(help="Version text; default: the id.")] = "",
    metadata: Annotated[str, typer.Option(help="Custom metadata, a JSON object.")] = "",
    needs: Annotated[list[str] | None, typer.Option(help="`ARTIFACT REQUIREMENT` it needs in a bundle.")] = None,
) -> None:
    """Create a version. Example: `swell version create app/2.0.0 --needs 'boot >= 1.2.0 and < 2.0.0'`."""
    state = session(context)
    parent, _, version_id = state.name_below_product(VERSION, name).rpartition("/versions/")
    wanted = pb.ArtifactVersion(version=text, custom_metadata=metadata, dependencies=_needs(state, needs or []))
    request = pb.CreateArtifactVersionRequest(parent=parent, artifact_version_id=version_id, artifact_version=wanted)
    state.output.one(state.client.artifacts.CreateArtifactVersion(request))


def _needs(state: Session, given: list[str]) -> list[pb.Dependency]:
    found = []
    for one in given:
        name, _, requirement = one.partition(" ")
        found.append(pb.Dependency(artifact=state.name_in_product("artifacts", name), requirement=requirement))
    return found


@version.command("list")
def version_list(context: typer.Context, artifact_id: str, filter_: Filter = "") -> None:
    """List the versions of an artifact. Example: `swell version list main`."""
    state = session(context)
    parent = state.name_in_product("artifacts", artifact_id)
    _list(state, "ArtifactVersions", parent, filter_, "artifact_versions", ("name", "version"))


@version.command("get")
def version_get(context: typer.Context, name: str) -> None:
    """Read a version. Example: `swell version get main/1.1.0`."""
    state = session(context)
    request = pb.GetArtifactVersionRequest(name=state.name_below_product(VERSION, name))
    state.output.one(state.client.artifacts.GetArtifactVersion(request))


@version.command("update")
def version_update(
    context: typer.Context,
    name: str,
    metadata: Metadata = None,
    needs: Annotated[
        list[str] | None, typer.Option(help="`ARTIFACT REQUIREMENT`, repeatable; replaces all. Empty takes all away.")
    ] = None,
    etag: Etag = "",
) -> None:
    """Change metadata or dependencies. Example: `swell version update app/2.0.0 --needs 'boot >= 1.3.0'`."""
    state = session(context)
    changes = _given(custom_metadata=metadata)
    if needs is not None:
        changes["dependencies"] = _needs(state, [one for one in needs if one])
    changed = pb.ArtifactVersion(name=state.name_below_product(VERSION, name), etag=etag, **changes)
    request = pb.UpdateArtifactVersionRequest(artifact_version=changed, update_mask=_mask(changes))
    state.output.one(state.client.artifacts.UpdateArtifactVersion(request))


@version.command("delete")
def version_delete(context: typer.Context, name: str, etag: Etag = "") -> None:
    """Delete a version that has no binaries and attachments. Example: `swell version delete main/1.1.0`."""
    state = session(context)
    full = state.name_below_product(VERSION, name)
    state.client.artifacts.DeleteArtifactVersion(pb.DeleteArtifactVersionRequest(name=full, etag=etag))
    state.output.text(f"{full} is deleted", name=full)


@binary.command("list")
def binary_list(context: typer.Context, version_id: str, filter_: Filter = "") -> None:
    """List the binaries of a version. Example: `swell binary list main/1.1.0 --filter 'state = SIGNED'`."""
    state = session(context)
    columns = ("name", "target", "size", "state", "state_reason")
    _list(state, "Binaries", state.name_below_product(VERSION, version_id), filter_, "binaries", columns)


@binary.command("get")
def binary_get(context: typer.Context, name: str) -> None:
    """Read a binary. Example: `swell binary get main/1.1.0/board-a`."""
    state = session(context)
    state.output.one(state.client.artifacts.GetBinary(pb.GetBinaryRequest(name=state.name_below_product(BINARY, name))))


@binary.command("parts")
def binary_parts(context: typer.Context, name: str) -> None:
    """List the parts of an unfinished upload that are stored. Example: `swell binary parts main/1.1.0/board-a`."""
    state = session(context)
    request = pb.ListUploadPartsRequest(name=state.name_below_product(BINARY, name), page_size=1000)
    parts = state.client.pages(state.client.artifacts.ListUploadParts, request, "parts")
    state.output.many(parts, ("index", "size", "sha256", "state"))


@binary.command("update")
def binary_update(context: typer.Context, name: str, metadata: Metadata = None, etag: Etag = "") -> None:
    """Change the metadata. Example: `swell binary update main/1.1.0/board-a --metadata '{"slot": 2}'`."""
    state = session(context)
    changes = _given(custom_metadata=metadata)
    changed = pb.Binary(name=state.name_below_product(BINARY, name), etag=etag, **changes)
    request = pb.UpdateBinaryRequest(binary=changed, update_mask=_mask(changes))
    state.output.one(state.client.artifacts.UpdateBinary(request))


@binary.command("reset")
def binary_reset(
    context: typer.Context,
    name: str,
    size: Annotated[int, typer.Option(help="New size; default: as declared.")] = 0,
    sha256: Annotated[str, typer.Option(help="New digest; default: as declared.")] = "",
    etag: Etag = "",
) -> None:
    """Start the upload of a binary anew: its parts are deleted. Example: `swell binary reset main/1.1.0/board-a`."""
    state = session(context)
    request = pb.ResetBinaryRequest(name=state.name_below_product(BINARY, name), size=size, sha256=sha256, etag=etag)
    state.output.one(state.client.artifacts.ResetBinary(request))


@binary.command("destroy")
def binary_destroy(
    context: typer.Context,
    name: str,
    reason: Annotated[str, typer.Option(help="Why, kept with the record.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Although a bundle that may be offered holds it.")] = False,
    etag: Etag = "",
) -> None:
    """Give up the content of a signed binary for good; bundles with it are offered no more.

    Example: `swell binary destroy main/1.1.0/board-a --force --reason 'a private key is in it'`
    """
    state = session(context)
    full = state.name_below_product(BINARY, name)
    request = pb.DestroyBinaryRequest(name=full, reason=reason, force=force, etag=etag)
    state.output.one(state.client.artifacts.DestroyBinary(request))


@binary.command("delete")
def binary_delete(context: typer.Context, name: str, etag: Etag = "") -> None:
    """Delete a binary that was never signed. Example: `swell binary delete main/1.1.0/board-a`."""
    state = session(context)
    full = state.name_below_product(BINARY, name)
    state.client.artifacts.DeleteBinary(pb.DeleteBinaryRequest(name=full, etag=etag))
    state.output.text(f"{full} is deleted", name=full)


@bundle.command("list")
def bundle_list(context: typer.Context, filter_: Filter = "") -> None:
    """List the product's bundles. Example: `swell bundle list --filter 'offerable = true'`."""
    state = session(context)
    columns = ("name", "version", "security_version", "offerable", "not_offerable_reason")
    _list(state, "Bundles", state.product_name(), filter_, "bundles", columns)


@bundle.command("get")
def bundle_get(context: typer.Context, name: str) -> None:
    """Read a bundle. Example: `swell bundle get fw-1-1-0`."""
    state = session(context)
    request = pb.GetBundleRequest(name=state.name_in_product("bundles", name))
    state.output.one(state.client.artifacts.GetBundle(request))


@bundle.command("update")
def bundle_update(
    context: typer.Context,
    name: str,
    display_name: Annotated[str | None, typer.Option(help="For people.")] = None,
    etag: Etag = "",
) -> None:
    """Change the display name; all else is fixed. Example: `swell bundle update fw-1-1-0 --display-name 'May'`."""
    state = session(context)
    changes = _given(display_name=display_name)
    changed = pb.Bundle(name=state.name_in_product("bundles", name), etag=etag, **changes)
    state.output.one(
        state.client.artifacts.UpdateBundle(pb.UpdateBundleRequest(bundle=changed, update_mask=_mask(changes)))
    )


@bundle.command("export")
def bundle_export(context: typer.Context, name: str, file: Path) -> None:
    """Write a bundle with its content, statement and signatures into one file.

    Example: `swell bundle export fw-1-1-0 fw-1-1-0.tar`
    """
    state = session(context)
    full = state.name_in_product("bundles", name)
    export_bundle(state.client, full, file)
    state.output.text(f"{file}: {full}, {file.stat().st_size} bytes", name=full, file=str(file))


@bundle.command("import")
def bundle_import(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    sign_with: Annotated[Path | None, typer.Option(help="Key file to sign here with.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only verify the file: digests and statement.")] = False,
) -> None:
    """Verify an archive and have its bundle in this product. Repeat it after an interruption: it goes on.

    The publisher's keys have to be registered in the product. Example:
    `swell -P thermostat bundle import fw-1-1-0.tar --sign-with release.pem`
    """
    state = session(context)
    if check:
        bundle_of = read_archive(file).manifest["bundle"]
        state.output.text(f"{file}: whole; {bundle_of['product']} {bundle_of['version']}", **bundle_of)
        return
    key = load_key(sign_with) if sign_with else None
    imported = import_bundle(state.client, state.product_name(), file, key=key)
    state.output.one(imported.bundle)
    if not imported.same_statement and key is None:
        typer.echo("the statement names another product now: sign it here with `swell bundle sign`", err=True)


@attachment.command("add")
def attachment_add(
    context: typer.Context,
    version_id: Annotated[str, typer.Argument(help="`ARTIFACT/VERSION`.")],
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    kind: Annotated[str, typer.Option(help=f"One of: {', '.join(KINDS)}.")],
    attachment_id: Annotated[str, typer.Option("--id", help="Id; default: the kind.")] = "",
    media_type: Annotated[str, typer.Option(help="Default: by kind and file name.")] = "",
    subject: Annotated[str, typer.Option(help="SHA-256 of the binary it speaks of.")] = "",
) -> None:
    """Attach a document to a version. Repeat it after an interruption: it resumes.

    Example: `swell attachment add main/1.1.0 bom.json --kind cyclonedx`
    """
    state = session(context)
    if kind not in KINDS:
        raise typer.BadParameter(f"no kind '{kind}'; known: {', '.join(KINDS)}")
    document = Document(
        path=file,
        version=state.name_below_product(VERSION, version_id),
        attachment_id=attachment_id or kind,
        kind=KINDS[kind],
        media_type=media_type,
        subject_sha256=subject,
    )
    state.output.one(add_attachment(state.client, document))


@attachment.command("list")
def attachment_list(context: typer.Context, version_id: str, filter_: Filter = "") -> None:
    """List the documents of a version. Example: `swell attachment list main/1.1.0`."""
    state = session(context)
    columns = ("name", "kind", "media_type", "size", "state")
    _list(state, "Attachments", state.name_below_product(VERSION, version_id), filter_, "attachments", columns)


@attachment.command("get")
def attachment_get(
    context: typer.Context,
    name: str,
    to: Annotated[Path | None, typer.Option(help="Write the content to this file.")] = None,
) -> None:
    """Read a document's record, or its content. Example: `swell attachment get main/1.1.0/cyclonedx --to bom.json`."""
    state = session(context)
    full = state.name_below_product(ATTACHMENT, name)
    if to is not None:
        fetch_attachment(state.client, full, to)
    state.output.one(state.client.artifacts.GetAttachment(pb.GetAttachmentRequest(name=full)))


@attachment.command("delete")
def attachment_delete(context: typer.Context, name: str, etag: Etag = "") -> None:
    """Delete a document. Example: `swell attachment delete main/1.1.0/cyclonedx`."""
    state = session(context)
    full = state.name_below_product(ATTACHMENT, name)
    state.client.artifacts.DeleteAttachment(pb.DeleteAttachmentRequest(name=full, etag=etag))
    state.output.text(f"{full} is deleted", name=full)
