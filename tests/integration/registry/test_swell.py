"""`swell` against a running registry: each command does what it says, and its refusals leave everything as it was."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from clients.cli.main import app
from clients.sdk import ApiError, Profile
from tests.integration.registry.running import Running


@dataclass(slots=True)
class Swell:
    """The command line of one organization's owner."""

    profile: Path
    organization: str

    def __call__(self, *arguments: str) -> Any:
        """The command's JSON; its error is raised."""
        argv = ["-o", "json", "--profile", str(self.profile), "-O", self.organization, "-P", "pump", *arguments]
        done = CliRunner().invoke(app, argv)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code not in (0, 1):
            raise AssertionError(done.output)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def refused(self, *arguments: str) -> str:
        with pytest.raises(ApiError) as error:
            self(*arguments)
        return error.value.reason


@pytest.fixture
def swell(running: Running, tmp_path: Path) -> Swell:
    tenant = running.organization()
    known = Profile.load(running.settings.local_dir / "profile.json")
    document = json.loads(known.path.read_text()) | {"ca": str(known.ca.resolve())}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(document))
    Profile.load(profile).with_key(f"{tenant.organization}-owner", tenant.key).save()
    made = Swell(profile, tenant.organization)
    made("product", "create", "pump")
    return made


def test_roles_and_members(swell: Swell) -> None:
    role = swell("role", "create", "tech", "--permission", "registry.devices.*", "--permission", "*.get")
    assert role["permissions"] == ["*.get", "registry.devices.*"]
    assert swell("member", "create", "ann", "tech")["role"] == role["name"]
    assert swell.refused("role", "delete", "tech") == "ROLE_IN_USE"
    assert swell("role", "update", "tech", "--description", "in the field")["description"] == "in the field"
    assert [one["name"] for one in swell("list", "roles")] == [role["name"]]
    assert swell("get", role["name"])["etag"] == "2"
    assert swell("member", "update", "ann", "--role", "viewer")["role"] == "viewer"
    assert swell("role", "delete", "tech") == {"deleted": role["name"]}
    assert swell("member", "remove", "ann")["removed"].endswith("/members/ann")
    assert swell.refused("member", "remove", "owner") == "LAST_OWNER"
    assert swell("org", "update", "--display-name", "Acme")["display_name"] == "Acme"


def test_a_key_is_rotated_and_the_profile_follows(swell: Swell) -> None:
    name = f"{swell.organization}-owner"
    before = Profile.load(swell.profile).keys[name]
    rotated = swell("api-key", "rotate", "owner", "--overlap", "2h")
    after = Profile.load(swell.profile)
    assert after.keys[name] != before
    assert sorted(after.keys) == sorted([name, "platform"]), "nothing is left waiting"
    digest = hashlib.sha256(after.keys[name].split("_", 3)[3].encode()).digest()
    key = swell("get", rotated["name"])
    assert key["previous_expire_time"] == rotated["previous_expire_time"]

    assert base64.b64decode(key["secret_sha256"]) == digest
    assert swell.refused("key", "rotate", "owner", "--overlap", "25h") == "INVALID_FIELD"
    assert Profile.load(swell.profile).keys == after.keys, "a refusal costs no secret"
    swell("key", "create", "ci", "--scope", "registry.*")
    assert swell("key", "update", "ci", "--scope", "registry.devices.*")["scopes"] == ["registry.devices.*"]


def test_policy_and_the_life_of_a_product(swell: Swell) -> None:
    policy = swell(
        *("product", "policy", "set", "pump", "--window", "02:00+4h@Europe/Vienna", "--window-days", "sat,sun"),
        *("--failure-action", "roll-back", "--quarantine-failures", "3", "--quarantine-burst", "5/180s"),
        *("--quarantine-for", "24h", "--signatures", "2", "--expired-leaf", "strict", "--poll-interval", "5m"),
    )["policy"]
    assert policy["maintenance_window"] == {
        "time_zone": "Europe/Vienna",
        "start_minute": 120,
        "length": "14400s",
        "weekdays": [6, 7],
    }
    assert policy["automatic_quarantine"] == {"failures": 3, "burst": 5, "window": "180s", "block_for": "86400s"}
    assert (policy["required_signatures"], policy["poll_interval"]) == (2, "300s")
    cleared = swell("product", "policy", "set", "pump", "--clear", "maintenance_window")["policy"]
    assert "maintenance_window" not in cleared
    assert cleared["automatic_quarantine"] == policy["automatic_quarantine"]
    assert swell.refused("product", "policy", "set", "pump", "--window", "02:00+4h@Mars/Olympus") == "INVALID_FIELD"
    swell("device", "create", "SN-1")
    assert swell.refused("product", "archive", "pump") == "PRODUCT_HAS_DEVICES"
    swell("device", "retire", "SN-1")
    assert swell("product", "archive", "pump")["archived"]
    assert "archived" not in swell("product", "unarchive", "pump")
    assert swell("product", "update", "pump", "--display-name", "Pumps")["display_name"] == "Pumps"


def test_devices_in_numbers(swell: Swell) -> None:
    swell("cohort", "create", "beta", "--label", "ring=1")
    changed = swell("cohort", "update", "beta", "--description", "volunteers", "--label", "ring=2")
    assert (changed["labels"], changed["description"]) == ({"ring": "2"}, "volunteers")
    for name in ("SN-1", "SN-2"):
        swell("device", "create", name, "--tag", "old")
    tagged = swell("device", "tag", "SN-1", "SN-2", "--add", "new", "--remove", "old")
    assert [one["tags"] for one in tagged] == [["new"], ["new"]]
    assert all(one["cohort"].endswith("/beta") for one in swell("device", "move", "SN-1", "SN-2", "--cohort", "beta"))
    assert "cohort" not in swell("device", "move", "SN-1", "--cohort", "")[0]
    assert swell("device", "quarantine", "SN-1", "--reason", "smoke")[0]["quarantine_reason"] == "smoke"
    assert [one["identifier"] for one in swell("list", "devices", "--filter", "quarantined = true")] == ["SN-1"]
    assert "quarantined" not in swell("device", "release", "SN-1")[0]
    assert swell.refused("device", "tag", "SN-1", "SN-9", "--add", "x") == "RESOURCE_NOT_FOUND"
    assert swell.refused("device", "tag", "SN-1") == "INVALID_FIELD"


def test_a_gateway_of_ones_own(swell: Swell, tmp_path: Path) -> None:
    files = []
    for number in (1, 2):
        key = Ed25519PrivateKey.generate().public_key()
        file = tmp_path / f"{number}.pem"
        file.write_bytes(key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
        files.append(str(file))
    made = swell("gateway", "create", "edge", "--public-key", files[0])
    assert swell("gateway", "disable", "edge")["disabled"]
    assert "disabled" not in swell("gateway", "enable", "edge")
    assert swell("gateway", "rotate", "edge", "--public-key", files[1])["key_id"] != made["key_id"]


def test_an_import_from_dry_run_to_deletion(swell: Swell, tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    file.write_text("identifier,tags\nSN-1,a;b\nSN-1,\n")
    dry = swell("import", "devices", str(file), "--dry-run")
    assert (dry["state"], dry["problems"][0]["code"]) == ("STATE_VALIDATED", "DUPLICATE_ROW")
    assert swell("import", "devices", str(file))["state"] == "STATE_VALIDATED", "problems stop a commit"
    done = swell("import", "devices", str(file), "--skip-problems")
    assert (done["name"], done["state"], done["created_count"]) == (dry["name"], "STATE_COMPLETED", 1)
    again = swell("import", "devices", str(file), "--skip-problems")
    assert (again["unchanged_count"], again["name"]) == (1, f"{dry['name']}-2")
    assert [one["code"] for one in swell("import", "verdicts", dry["name"])] == ["DUPLICATE_ROW"]
    assert len(swell("list", "deviceImports")) == 2
    assert swell.refused("import", "cancel", dry["name"]) == "WRONG_STATE"
    assert swell("import", "delete", dry["name"]) == {"deleted": dry["name"]}
