"""Signing keys, uploads and bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from groundswell.artifacts.v1 import artifacts_pb2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from clients.cli.context import Session, session
from clients.sdk.signing import generate_key, load_key, public_bytes, sign_bundle, sign_digest
from clients.sdk.upload import Upload, upload_binary

BINARY: Final = ("artifacts", "versions", "binaries")

signing_key = typer.Typer(help="Signing keys: private here, public on the server.", no_args_is_help=True)
binary = typer.Typer(help="Binaries.", no_args_is_help=True)
bundle = typer.Typer(help="Bundles: signed, ordered, atomic sets of binaries.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(signing_key, name="signing-key")
    app.add_typer(binary, name="binary")
    app.add_typer(bundle, name="bundle")
    app.command("upload")(upload)


@signing_key.command("generate")
def signing_key_generate(context: typer.Context, file: Path) -> None:
    """Make an Ed25519 key here. Example: `swell signing-key generate release.pem`."""
    key = generate_key(file)
    session(context).output.text(
        f"{file}: public key {public_bytes(key).hex()}", file=str(file), public_key=public_bytes(key).hex()
    )


@signing_key.command("register")
def signing_key_register(context: typer.Context, key_id: str, file: Path) -> None:
    """Register the public half of a key file. Example: `swell signing-key register release release.pem`."""
    state = session(context)
    request = artifacts_pb2.CreateSigningKeyRequest(
        parent=state.product_name(),
        signing_key_id=key_id,
        signing_key=artifacts_pb2.SigningKey(public_key=public_bytes(load_key(file))),
    )
    state.output.one(state.client.artifacts.CreateSigningKey(request))


@signing_key.command("revoke")
def signing_key_revoke(
    context: typer.Context, name: str, reason: Annotated[str, typer.Option(help="Why, for the audit.")] = ""
) -> None:
    """Revoke a key for good: bundles that need its signature are offered no more.

    Example: `swell signing-key revoke release --reason "laptop stolen"`
    """
    state = session(context)
    full = state.name_in_product("signingKeys", name)
    state.output.one(
        state.client.artifacts.RevokeSigningKey(artifacts_pb2.RevokeSigningKeyRequest(name=full, reason=reason))
    )


def upload(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    artifact: Annotated[str, typer.Option(help="Artifact, made when missing.")],
    version: Annotated[str, typer.Option(help="Artifact version, made when missing.")],
    target: Annotated[str, typer.Option(help="Hardware target.")] = "portable",
    binary_id: Annotated[str, typer.Option(help="Id of the binary; default: the target.")] = "",
    metadata: Annotated[str, typer.Option(help="Custom metadata, a JSON object.")] = "",
    part_size: Annotated[int, typer.Option(help="Bytes of a part, at least 5 MiB.")] = 8 * 1024 * 1024,
    sign_with: Annotated[Path | None, typer.Option(help="Key file to sign the binary with.")] = None,
) -> None:
    """Upload a binary in parts, have it hashed, and sign it. Repeat it after an interruption: it resumes.

    Example: `swell upload firmware.tar.gz --artifact main --version 1.1.0 --target board-a --sign-with release.pem`
    """
    state = session(context)
    wanted = Upload(
        path=file,
        artifact=state.name_in_product("artifacts", artifact),
        version=version,
        binary_id=binary_id or target.lower(),
        target=target,
        metadata=metadata,
        part_size=part_size,
    )
    done = _with_progress(state, wanted)
    if sign_with is not None:
        signature = sign_digest(load_key(sign_with), done.sha256)
        done = state.client.artifacts.SignBinary(artifacts_pb2.SignBinaryRequest(name=done.name, signature=signature))
    state.output.one(done)


def _with_progress(state: Session, wanted: Upload) -> artifacts_pb2.Binary:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {phase: bar.add_task(phase, total=None, visible=False) for phase in ("digest", "upload", "hash")}

        def show(phase: str, finished: int, total: int) -> None:
            bar.update(tasks[phase], completed=finished, total=total, visible=True)

        return upload_binary(state.client, wanted, show)


@binary.command("sign")
def binary_sign(context: typer.Context, name: str, key: Annotated[Path, typer.Option(help="Key file.")]) -> None:
    """Sign a binary. Example: `swell binary sign main/1.1.0/board-a --key second.pem`."""
    state = session(context)
    full = state.name_below_product(BINARY, name)
    found = state.client.artifacts.GetBinary(artifacts_pb2.GetBinaryRequest(name=full))
    signature = sign_digest(load_key(key), found.sha256)
    state.output.one(state.client.artifacts.SignBinary(artifacts_pb2.SignBinaryRequest(name=full, signature=signature)))


@bundle.command("create")
def bundle_create(
    context: typer.Context,
    bundle_id: str,
    version: Annotated[str, typer.Option(help="SemVer of the whole.")],
    binary: Annotated[list[str], typer.Option(help="Binary `ARTIFACT/VERSION/ID`, repeatable, in install order.")],
    security_version: Annotated[int, typer.Option(help="Never falls on a device.")] = 0,
    sign_with: Annotated[Path | None, typer.Option(help="Key file to sign the statement with.")] = None,
) -> None:
    """Make a bundle; with --sign-with its statement is checked and signed here.

    Example: `swell bundle create fw-1-1-0 --version 1.1.0 --binary main/1.1.0/board-a
    --binary config/1.1.0/portable --sign-with release.pem`
    """
    state = session(context)
    entries = [artifacts_pb2.BundleEntrySpec(binary=state.name_below_product(BINARY, name)) for name in binary]
    created = state.client.artifacts.CreateBundle(
        artifacts_pb2.CreateBundleRequest(
            parent=state.product_name(),
            bundle_id=bundle_id,
            version=version,
            security_version=security_version,
            entries=entries,
        )
    )
    state.output.one(_sign(state, created, sign_with) if sign_with else created)


@bundle.command("sign")
def bundle_sign(context: typer.Context, name: str, key: Annotated[Path, typer.Option(help="Key file.")]) -> None:
    """Check a bundle's statement and sign it. Example: `swell bundle sign fw-1-1-0 --key release.pem`."""
    state = session(context)
    full = state.name_in_product("bundles", name)
    state.output.one(_sign(state, state.client.artifacts.GetBundle(artifacts_pb2.GetBundleRequest(name=full)), key))


def _sign(state: Session, found: artifacts_pb2.Bundle, key: Path) -> artifacts_pb2.Bundle:
    signature = sign_bundle(load_key(key), found)
    return state.client.artifacts.SignBundle(artifacts_pb2.SignBundleRequest(name=found.name, signature=signature))
