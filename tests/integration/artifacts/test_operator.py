"""What operators do with the SDK and `swell`, on the real log and store: dying uploads, archives, keys, rights."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.artifacts.v1 import artifacts_pb2 as pb
from groundswell.registry.v1 import registry_pb2
from typer.testing import CliRunner
from yarl import URL

from clients.cli.main import app
from clients.sdk import ApiError, Client
from clients.sdk.archive import ArchiveError, read_archive
from clients.sdk.attachments import Document, add_attachment, fetch_attachment
from clients.sdk.signing import public_bytes, sign_bundle, sign_digest
from clients.sdk.transfer import Imported, export_bundle, import_bundle
from clients.sdk.upload import Upload, UploadError, upload_binary
from libs.errors import GroundswellError
from tests.integration.artifacts.site import PART, B, Site

SECOND_PART = b"the rest of it"
pytestmark = pytest.mark.timeout(300)  # many runs of one upload, and processes of `swell`


class KilledError(BaseException):
    """As good as a SIGKILL: nothing in the client may catch it."""


class Mortal:
    """A client whose process dies at a given step: before or after a call, or at a step of the upload itself."""

    def __init__(self, client: Client, dies_at: int) -> None:
        self._client = client
        self._left = dies_at
        self.artifacts = self
        self.registry = client.registry
        self.pages = client.pages

    def step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KilledError

    def progress(self, phase: str, _done: int, _total: int) -> None:
        if phase == "upload":
            self.step()

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        real = getattr(self._client.artifacts, method)

        def call(request: Any) -> Any:
            self.step()
            answer = real(request)
            self.step()
            return answer

        return call


def until_it_lives(run: Callable[[Mortal], Any], client: Client) -> tuple[Any, int]:
    """Run it with a death one step later each time, until it survives; every start finds what the last one left."""
    for deaths in range(200):
        try:
            return run(Mortal(client, deaths)), deaths
        except KilledError:
            continue
    raise AssertionError("it never came to an end")


async def download(site: Site, name: str) -> bytes:
    link = await site.call("PresignDownload", pb.PresignDownloadRequest(name=name))
    async with aiohttp.ClientSession() as session, session.get(URL(link.url, encoded=True)) as response:
        return await response.read()


async def test_an_upload_killed_at_each_step_goes_on(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "firmware"
    path.write_bytes(os.urandom(PART) + SECOND_PART)
    upload = Upload(path, f"{site.product}/artifacts/app", "1.0.0", "board", "board", part_size=PART)

    def run(mortal: Mortal) -> pb.Binary:
        return upload_binary(mortal, upload, mortal.progress)  # type: ignore[arg-type]

    with site.client() as client:
        done, deaths = await asyncio.to_thread(until_it_lives, run, client)
    assert deaths >= 10, "steps of declaring, sending and completing"
    assert done.state == B.STATE_SIGNABLE
    assert await download(site, done.name) == path.read_bytes()


async def test_every_first_death_is_followed_by_a_whole_upload(site: Site, tmp_path: Path) -> None:
    """Not only a step further each time: from each single death straight to the end."""
    path = tmp_path / "firmware"
    path.write_bytes(os.urandom(PART) + SECOND_PART)
    with site.client() as client:
        for dies_at in range(0, 12, 2):
            upload = Upload(path, f"{site.product}/artifacts/app", f"1.{dies_at}", "board", "board", part_size=PART)
            mortal = Mortal(client, dies_at)
            with pytest.raises(KilledError):
                await asyncio.to_thread(upload_binary, mortal, upload, mortal.progress)  # type: ignore[arg-type]
            done = await asyncio.to_thread(upload_binary, client, upload)
            assert done.state == B.STATE_SIGNABLE


def environment_of(site: Site, folder: Path) -> dict[str, str]:
    """Where `swell` finds the site, and with which key it speaks."""
    ca, profile = folder / "ca.pem", folder / "profile.json"
    ca.write_bytes(site.settings.ca)
    endpoints = dict.fromkeys(("pki", "releases", "rollout", "webhooks"), "127.0.0.1:1")
    endpoints |= {service: site.settings.address(service, "public") for service in ("registry", "artifacts")}
    document = {"endpoints": endpoints, "ca": "ca.pem", "gateway": "", "gateway_domain": "", "keys": {}, "current": ""}
    profile.write_text(json.dumps(document))
    return {
        "GROUNDSWELL_PROFILE": str(profile),
        "GROUNDSWELL_API_KEY": site.key,
        "GROUNDSWELL_PRODUCT": site.product,
    }


async def swell(site: Site, folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    """The command line as a process of its own."""
    environment = os.environ | environment_of(site, folder)
    command = (sys.executable, "-m", "clients.cli", "-o", "json", *arguments)
    return await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def ran(site: Site, folder: Path, *arguments: str) -> Any:
    process = await swell(site, folder, *arguments)
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return json.loads(out)


async def killed_upload(site: Site, tmp_path: Path, name: str, arguments: Sequence[str]) -> list[pb.StoredPart]:
    """Start an upload, kill it when its first part is stored; the parts that are there then."""
    process = await swell(site, tmp_path, *arguments)
    stored: list[Any] = []
    async with asyncio.timeout(60):
        while not stored and process.returncode is None:
            try:
                stored = list((await site.call("ListUploadParts", pb.ListUploadPartsRequest(name=name))).parts)
            except GroundswellError:
                continue  # it is not declared yet
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.communicate()
    return list((await site.call("ListUploadParts", pb.ListUploadPartsRequest(name=name))).parts)


async def test_swell_upload_resumes_after_a_sigkill(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "firmware"
    path.write_bytes(os.urandom(16 * PART))
    for patch in range(10):  # on a quick machine the last part may be there before the signal is
        version = f"1.0.{patch}"
        arguments = ("upload", str(path), "--artifact", "app", "--version", version, "--part-size", str(PART))
        name = f"{site.product}/artifacts/app/versions/{version}/binaries/portable"
        parts = await killed_upload(site, tmp_path, name, arguments)
        if 0 < len(parts) < 16:
            break
    else:
        pytest.fail("no upload could be killed halfway")
    shown = await ran(site, tmp_path, "binary", "parts", f"app/{version}/portable")
    # What was under way when the client died may have arrived since.
    assert {part["index"] for part in shown} >= {part.index for part in parts}
    done = await ran(site, tmp_path, *arguments)
    assert done["state"] == "STATE_SIGNABLE"
    assert await download(site, name) == path.read_bytes()


@pytest.mark.parametrize("site", [0], indirect=True)
async def test_the_collection_never_takes_what_an_attachment_or_upload_refers_to(site: Site) -> None:
    """Content is given up and taken up again at once, over and over; the grace time is nothing."""
    content = os.urandom(1000)
    key = await site.signing_key("release")
    old = await signed(site, content, "old", key)
    for turn in range(6):
        name = f"new-{turn}"
        destroy = pb.DestroyBinaryRequest(name=old.name, reason="replaced")
        _, new = await asyncio.gather(site.call("DestroyBinary", destroy), signed(site, content, name, key))
        assert await download(site, new.name) == content
        old = new
    assert await site.refused("PresignDownload", pb.PresignDownloadRequest(name=f"{old.name}x")) == (
        "RESOURCE_NOT_FOUND"
    )
    link = await site.call("PresignDownload", pb.PresignDownloadRequest(name=old.name))
    await site.call("DestroyBinary", pb.DestroyBinaryRequest(name=old.name, reason="over"))
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        status = 200
        while status == 200:
            async with session.get(URL(link.url, encoded=True)) as response:
                status = response.status
    assert status == 404, "the last one to hold it has gone"
    assert await site.refused("PresignDownload", pb.PresignDownloadRequest(name=old.name)) == "WRONG_STATE"


async def signed(site: Site, content: bytes, target: str, *keys: Ed25519PrivateKey) -> pb.Binary:
    binary = await site.signable(content, target)
    for key in keys:
        request = pb.SignBinaryRequest(name=binary.name, signature=sign_digest(key, binary.sha256))
        binary = await site.call("SignBinary", request)
    return binary


async def offerable(site: Site, content: bytes, *keys: Ed25519PrivateKey) -> pb.Bundle:
    binary = await signed(site, content, "board", *keys)
    request = pb.CreateBundleRequest(
        parent=site.product,
        bundle_id="fw",
        version="1.0.0",
        security_version=3,
        entries=[pb.BundleEntrySpec(binary=binary.name, metadata='{"of": "entry"}')],
    )
    bundle: pb.Bundle = await site.call("CreateBundle", request)
    for key in keys:
        bundle = await site.call(
            "SignBundle", pb.SignBundleRequest(name=bundle.name, signature=sign_bundle(key, bundle))
        )
    assert bundle.offerable
    return bundle


async def register(site: Site, key_name: str, key: Ed25519PrivateKey) -> None:
    wanted = pb.SigningKey(public_key=public_bytes(key))
    request = pb.CreateSigningKeyRequest(parent=site.product, signing_key_id=key_name, signing_key=wanted)
    await site.call("CreateSigningKey", request)


async def exported(site: Site, bundle: pb.Bundle, path: Path) -> Path:
    with site.client() as client:
        await asyncio.to_thread(export_bundle, client, bundle.name, path)
    return path


async def imported(site: Site, path: Path, key: Ed25519PrivateKey | None = None) -> Imported:
    with site.client() as client:
        return await asyncio.to_thread(import_bundle, client, site.product, path, key=key)


async def everything(site: Site) -> list[Any]:
    found = [
        await site.call(f"List{kind}", getattr(pb, f"List{kind}Request")(parent=site.product))
        for kind in ("Artifacts", "Bundles")
    ]
    versions = await site.call(
        "ListArtifactVersions", pb.ListArtifactVersionsRequest(parent=f"{site.product}/artifacts/app")
    )
    return [*found, versions]


async def test_a_bundle_goes_to_another_installation_with_its_signatures(
    site: Site, other_site: Site, tmp_path: Path
) -> None:
    keys = await site.signing_key("one"), await site.signing_key("two")
    content = os.urandom(2 * PART)
    bundle = await offerable(site, content, *keys)
    path = await exported(site, bundle, tmp_path / "fw.tar")
    again = await exported(site, bundle, tmp_path / "again.tar")
    assert path.read_bytes() == again.read_bytes()

    before = await everything(other_site)
    for index, key in enumerate(keys):
        with pytest.raises(ArchiveError, match="register the publisher's public key"):
            await imported(other_site, path)
        assert await everything(other_site) == before, "nothing is made of what is not trusted"
        await register(other_site, f"publisher-{index}", key)

    def run(mortal: Mortal) -> Imported:
        return import_bundle(mortal, other_site.product, path, progress=mortal.progress)  # type: ignore[arg-type]

    with other_site.client() as client:
        done, deaths = await asyncio.to_thread(until_it_lives, run, client)
    assert deaths >= 15
    assert done.same_statement
    there = done.bundle
    assert (there.offerable, there.digest, there.entries[0].metadata) == (True, bundle.digest, '{"of":"entry"}')
    assert await download(other_site, there.entries[0].binary) == content
    version = await other_site.call(
        "GetArtifactVersion", pb.GetArtifactVersionRequest(name=there.entries[0].binary.rpartition("/binaries/")[0])
    )
    assert version.custom_metadata == '{"of":"version"}'
    state = await everything(other_site)
    assert (await imported(other_site, path)).bundle == there
    assert await everything(other_site) == state, "a repeat changes nothing"


async def test_a_bundle_goes_to_another_organization_and_is_signed_there(site: Site, tmp_path: Path) -> None:
    publisher = await site.signing_key("one"), await site.signing_key("two")
    bundle = await offerable(site, b"firmware", *publisher)
    path = await exported(site, bundle, tmp_path / "fw.tar")
    await site.organize("beta", required_signatures=1)
    own = await site.signing_key("own")
    await register(site, "publisher", publisher[0])
    first = await imported(site, path)
    assert not first.same_statement
    assert (first.bundle.offerable, len(first.bundle.signatures)) == (False, 0), "a signature is never relabelled"
    assert first.bundle.statement != bundle.statement
    then = await imported(site, path, own)
    assert (then.bundle.offerable, then.bundle.name) == (True, f"{site.product}/bundles/fw")
    listed = await ran(site, tmp_path, "bundle", "list", "--filter", "offerable = true")
    assert [one["name"] for one in listed] == [then.bundle.name]


async def test_archives_that_do_not_fit_are_refused(site: Site, tmp_path: Path) -> None:
    keys = await site.signing_key("one"), await site.signing_key("two")
    bundle = await offerable(site, b"firmware", *keys)
    path = await exported(site, bundle, tmp_path / "fw.tar")
    whole = path.read_bytes()
    signature = bundle.signatures[0].signature.encode()
    forged = tmp_path / "forged.tar"
    forged.write_bytes(whole.replace(signature, signature[::-1]))
    assert read_archive(forged), "as an archive it is whole"
    with pytest.raises(ArchiveError, match="is not right"):
        await imported(site, forged)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:-2000])
    with pytest.raises(ArchiveError):
        await imported(site, cut)
    await site.organize("beta", required_signatures=1)
    await register(site, "publisher", keys[0])
    other = await site.declare(b"something else")
    with pytest.raises(UploadError, match="exists with other bytes"):
        await imported(site, path)
    assert (await site.call("GetBinary", pb.GetBinaryRequest(name=other.name))) == other


async def test_documents_large_and_small(site: Site, tmp_path: Path) -> None:
    await site.declare(b"firmware")
    version = "app/one"
    small = tmp_path / "bom.json"
    small.write_text(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6"}))
    added = await ran(site, tmp_path, "attachment", "add", version, str(small), "--kind", "cyclonedx")
    assert added["state"] == "STATE_STORED"
    big = tmp_path / "trace.bin"
    big.write_bytes(os.urandom(3 * 1024 * 1024 + 5))
    document = Document(big, f"{site.product}/artifacts/app/versions/one", "trace", pb.Attachment.KIND_OTHER)
    with site.client() as client:
        done, deaths = await asyncio.to_thread(
            until_it_lives,
            lambda mortal: add_attachment(mortal, document),  # type: ignore[arg-type]
            client,
        )
        assert deaths >= 6
        assert done.state == pb.Attachment.STATE_STORED
        copy = tmp_path / "copy"
        await asyncio.to_thread(fetch_attachment, client, done.name, copy)
    assert copy.read_bytes() == big.read_bytes()
    listed = await ran(site, tmp_path, "attachment", "list", version)
    assert [one["kind"] for one in listed] == ["KIND_SBOM_CYCLONEDX", "KIND_OTHER"]
    await ran(site, tmp_path, "attachment", "delete", f"{version}/cyclonedx")
    assert len(await ran(site, tmp_path, "attachment", "list", version)) == 1


async def key_with(site: Site, *scopes: str, prefix: str = "") -> str:
    """A key of the organization's owner with less than the owner's rights."""
    secret, key_name = secrets.token_hex(16), f"k{secrets.token_hex(4)}"
    organization = site.product.split("/")[1]
    with site.client() as client:
        await asyncio.to_thread(
            client.registry.CreateApiKey,
            registry_pb2.CreateApiKeyRequest(
                parent=f"organizations/{organization}",
                api_key_id=key_name,
                api_key=registry_pb2.ApiKey(
                    scopes=scopes,
                    resource_prefix=prefix,
                    secret_sha256=hashlib.sha256(secret.encode()).digest(),
                ),
            ),
        )
    return f"gsw_{organization}_{key_name}_{secret}"


async def test_t39_a_key_uploads_only_where_it_may(site: Site) -> None:
    binary = await site.declare(b"firmware")
    parts = [pb.UploadPart(index=1, size=8, sha256=hashlib.sha256(b"firmware").hexdigest())]
    calls = (
        ("CreateArtifact", pb.CreateArtifactRequest(parent=site.product, artifact_id="new", artifact=pb.Artifact())),
        ("PresignParts", pb.PresignPartsRequest(name=binary.name, parts=parts)),
        ("ResetBinary", pb.ResetBinaryRequest(name=binary.name)),
        ("DestroyBinary", pb.DestroyBinaryRequest(name=binary.name)),
        ("PresignDownload", pb.PresignDownloadRequest(name=binary.name)),
    )
    before = await everything(site)
    owner = site.key
    for scopes, prefix, code in (
        (("artifacts.*.get", "artifacts.*.list"), "", "PERMISSION_DENIED"),
        (("*",), f"{site.product}-other", "NOT_FOUND"),
    ):
        limited = await key_with(site, *scopes, prefix=prefix)
        with site.client(limited) as client:
            for method, request in calls:
                with pytest.raises(ApiError) as refused:
                    await asyncio.to_thread(getattr(client.artifacts, method), request)
                assert refused.value.code == code, method
                if code == "PERMISSION_DENIED":
                    assert "artifacts." in refused.value.message, "it names the permission"
    site.key = owner
    assert await everything(site) == before


async def test_t38_names_are_told_apart_by_their_organization(site: Site) -> None:
    key = await site.signing_key("one")
    mine = await signed(site, b"firmware", "board", key)
    await site.organize("beta", required_signatures=1)
    theirs = await site.declare(b"firmware")
    assert mine.name.split("/")[4:] == theirs.name.split("/")[4:]
    for method in ("GetBinary", "PresignDownload", "ListUploadParts"):
        request = getattr(pb, f"{method}Request")(name=mine.name)
        assert await site.refused(method, request) == "RESOURCE_NOT_FOUND"
    assert theirs.state == B.STATE_UPLOADABLE, "that another has the same content grants nothing"
    sign = pb.SignBinaryRequest(name=theirs.name, signature=sign_digest(key, theirs.sha256))
    assert await site.refused("SignBinary", sign) == "WRONG_STATE"


async def test_t40_a_revoked_key_is_felt_by_whoever_asks_next(site: Site, tmp_path: Path) -> None:
    keys = await site.signing_key("one"), await site.signing_key("two")
    bundle = await offerable(site, b"firmware", *keys)
    await ran(site, tmp_path, "signing-key", "revoke", "two", "--reason", "the laptop was stolen")
    assert (await site.lookup(bundle.name)).not_offerable_reason == "SIGNING_KEY_REVOKED"
    listed = await ran(site, tmp_path, "signing-key", "list", "--filter", "revoked = true")
    assert [one["name"].rpartition("/")[2] for one in listed] == ["two"]


async def test_swell_walks_through_everything(site: Site, tmp_path: Path) -> None:
    """Each command once, on what the ones before it made."""

    environment = environment_of(site, tmp_path)

    async def run(line: str, *more: str) -> Any:
        arguments = ["-o", "json", *line.split(), *more]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments, env=environment)
        if result.exception is not None:
            raise result.exception
        return json.loads(result.stdout)

    firmware = tmp_path / "firmware"
    firmware.write_bytes(b"firmware")
    key, archive = str(tmp_path / "release.pem"), str(tmp_path / "fw.tar")
    await run("signing-key generate", key)
    await run("signing-key register release", key)
    assert (await run("artifact create boot --display-name", "Boot loader"))["display_name"] == "Boot loader"
    assert (await run("artifact update boot --metadata", '{"chip": "m4"}'))["custom_metadata"] == '{"chip":"m4"}'
    await run("version create boot/1.0.0")
    await run("version create boot/0.9.0")
    await run("version delete boot/0.9.0")
    assert [one["version"] for one in await run("version list boot")] == ["1.0.0"]
    await run("artifact create app")
    made = await run("version create app/2.0.0 --needs", "boot >= 1.0.0")
    assert made["dependencies"][0]["requirement"] == ">= 1.0.0"
    upload = f"upload {firmware} --target board-a --sign-with {key}"
    await run(f"{upload} --artifact app --version 2.0.0")
    process = await swell(
        site, tmp_path, *["bundle", "create", "fw", "--version", "2.0.0", "--binary", "app/2.0.0/board-a"]
    )
    _, error = await process.communicate()
    assert json.loads(error)["error"]["reason"] == "DEPENDENCY_UNSATISFIED"
    await run(f"{upload} --artifact boot --version 1.0.0")
    assert (await run("binary update boot/1.0.0/board-a --metadata", '{"slot": 1}'))["custom_metadata"] == '{"slot":1}'
    assert [one["state"] for one in await run("binary list boot/1.0.0 --filter state=SIGNED")] == ["STATE_SIGNED"]
    create = "bundle create fw --version 2.0.0 --binary boot/1.0.0/board-a --binary app/2.0.0/board-a"
    bundle = await run(f"{create} --sign-with {key}")
    assert bundle["not_offerable_reason"] == "SIGNATURES_MISSING", "the product wants two"
    second = str(tmp_path / "second.pem")
    await run("signing-key generate", second)
    await run("signing-key register second", second)
    assert (await run("bundle sign fw --key", second))["offerable"]
    assert (await run("bundle update fw --display-name", "May"))["display_name"] == "May"
    await run("bundle export fw", archive)
    assert (await run(f"bundle import --check {archive}"))["version"] == "2.0.0"
    assert (await run(f"bundle import {archive}"))["offerable"], "what is there already is the same"
    process = await swell(site, tmp_path, *["binary", "destroy", "app/2.0.0/board-a"])
    _, error = await process.communicate()
    refused = json.loads(error)["error"]
    assert refused["reason"] == "RESOURCE_IN_USE"
    assert "--force" in refused["next_step"]
    gone = await run("binary destroy app/2.0.0/board-a --force --reason", "a key is in it")
    assert (gone["state"], gone["destroy_reason"]) == ("STATE_DESTROYED", "a key is in it")
    assert (await run("bundle get fw"))["not_offerable_reason"] == "BINARY_DESTROYED"
    await run(f"upload {firmware} --artifact app --version 2.1.0")
    assert (await run("binary reset app/2.1.0/portable --size 9"))["state"] == "STATE_UPLOADABLE"
    await run("binary delete app/2.1.0/portable")
    await run("version delete app/2.1.0")
    assert (await run("artifact get app"))["name"] == f"{site.product}/artifacts/app"
