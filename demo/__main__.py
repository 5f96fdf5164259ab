"""The main job on real input: enrol sixty devices, walk a good release through them, be saved from a bad one.

Everything goes through public interfaces: the ``swell`` command, the gRPC APIs behind it, and the device API. Run by
``make demo``, or ``python -m demo`` while the stack is up. Exit status 0 only if every check holds.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clients.sdk import Profile
from demo import firmware
from demo.factory import Factory, server_identity
from demo.fleet import DevicePlan, Fleet, PowerCuts, Site
from demo.steps import ROOT, DemoError, Journal, Swell, wait_until
from deploy.local.settings import Settings, load

TARGET: Final = "board-a"
PRODUCT: Final = "thermostat"
OPERATOR_SCOPES: Final = (
    "artifacts.*",
    "releases.*",
    "rollout.*",
    "webhooks.*",
    "registry.devices.get",
    "registry.devices.list",
)
POWER_CUTS: Final = {
    "canary-02": "downloaded",
    "beta-03": "mid-download",
    "beta-07": "installed",
    "prod-05": "before-download",
    "prod-21": "before-switch",
}
GATE_TIMES: Final = {"soak": "8s", "dark_after": "6s", "stall_after": "600s"}
IDLE_EVENTS: Final = (
    "groundswell.registry.v1.OrganizationCreated",
    "groundswell.registry.v1.MemberSaved",
    "groundswell.registry.v1.ApiKeySaved",
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the demo is; the end-to-end test runs it in small."""

    canary: int = 5
    beta: int = 15
    production: int = 40
    canary_cap: int = 5
    beta_cap: int = 5
    production_cap: int = 10
    power_cuts: dict[str, str] = field(default_factory=lambda: dict(POWER_CUTS))

    @property
    def all(self) -> int:
        """Devices in all."""
        return self.canary + self.beta + self.production


SMALL: Final = Scale(5, 4, 5, 5, 2, 3, {"canary-02": "downloaded", "prod-03": "before-switch"})


class Demo:
    """One run with its own organization; everything it started, it ends."""

    def __init__(self, profile: Path, scale: Scale, settings: Settings) -> None:
        self.journal = Journal()
        self.scale = scale
        self.kafka, self.env = settings.kafka, settings.env
        self.run_id = secrets.token_hex(3)
        self.organization = f"demo-{self.run_id}"
        self.idle = self._idle_organization()
        self.profile = Profile.load(profile)
        self.directory = profile.parent / "demo" / self.run_id
        self.directory.mkdir(parents=True)
        commands = self.commands_file = self.directory / "commands.txt"
        self.platform = Swell(profile, key="platform", journal=commands)
        self.owner = Swell(profile, self.organization, PRODUCT, f"{self.organization}-owner", commands)
        self.operator = Swell(profile, self.organization, PRODUCT, f"{self.organization}-operator", commands)
        self.product = f"organizations/{self.organization}/products/{PRODUCT}"
        self.fleet = Fleet(self.directory / "devices")
        self.receiver_address = settings.webhook_receiver
        self.receiver: subprocess.Popen[bytes] | None = None
        self.webhooks_since_ms = 0
        self.watchers: list[subprocess.Popen[str]] = []

    def _idle_organization(self) -> str:
        """An id on another partition than the demo's organization."""
        taken = zlib.crc32(self.organization.encode()) % 4
        number = 0
        while zlib.crc32(f"idle-{self.run_id}-{number}".encode()) % 4 == taken:
            number += 1
        return f"idle-{self.run_id}-{number}"

    def run(self) -> int:
        """All steps; the table at the end even when one breaks off."""
        try:
            self._steps()
        except (DemoError, OSError, subprocess.SubprocessError, KeyError) as error:
            self.journal.check("the demo ran to its end", holds=False, detail=f"{type(error).__name__}: {error}")
        finally:
            self.close()
        return self.journal.finish()

    def close(self) -> None:
        """End what was started here, by pid."""
        self.fleet.stop()
        for watcher in self.watchers:
            if watcher.poll() is None:
                watcher.terminate()
            watcher.wait()
        if self.receiver is not None and self.receiver.poll() is None:
            self.receiver.terminate()
            self.receiver.wait()

    def _steps(self) -> None:
        step = self.journal.step
        with step("organization, product, cohorts, an operator's key; a second, idle organization"):
            self._organizations()
        with step("webhook receiver in a process of its own"):
            self._receiver()
        with step("factory CA with proof of possession, just-in-time provisioning"):
            factory = self._factory()
        with step("firmware 1.0.0, 1.1.0 and 2.0.0: built, uploaded in parts, hashed by the server, bundled, signed"):
            key = self._firmware()
        with step(f"{self.scale.all} devices as {self.scale.all} processes enrol at first contact"):
            cuts = self._enrol(factory, key)
        with step("rollout of 1.1.0: canary, beta, production"):
            self._good_rollout(cuts)
        with step("rollout of 2.0.0, which is bad: halted, retracted, rolled back"):
            self._bad_rollout()
        with step("why does a production device run 1.1.0, and why not 2.0.0?"):
            self._explain()
        with step("independent checker over the raw log, and every webhook"):
            self._check_log()

    def _organizations(self) -> None:
        self.platform("org", "create", self.organization)
        self.platform("org", "create", self.idle)
        self.owner("product", "create", PRODUCT, "--poll-interval", "1", "--poll-jitter", "0.1")
        for cohort in ("canary", "beta", "production"):
            self.owner("cohort", "create", cohort)
        scopes = [argument for scope in OPERATOR_SCOPES for argument in ("--scope", scope)]
        self.owner("key", "create", "operator", "--prefix", f"organizations/{self.organization}", *scopes)
        try:
            self.operator("key", "create", "more-power")
        except DemoError as error:
            self.journal.check("the operator's key cannot make keys", "PERMISSION" in str(error), "PERMISSION_DENIED")
        else:
            self.journal.check("the operator's key cannot make keys", holds=False, detail="it made one")

    def _receiver(self) -> None:
        identity, ca_file = server_identity(self.directory / "receiver")
        secrets_file = self.directory / "receiver" / "secrets.json"
        with (self.directory / "receiver" / "log").open("wb") as log:
            self.receiver = subprocess.Popen(
                [
                    *(sys.executable, "-m", "demo.receiver", "serve", "--listen", self.receiver_address),
                    *("--certificate", str(identity.certificate), "--key", str(identity.key)),
                    *("--secrets", str(secrets_file), "--journal", str(self.journal_file)),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        url = f"https://{self.receiver_address}/hooks"
        created = self.operator("webhook", "create", "receiver", url, "--ca", str(ca_file))
        endpoint = created["webhook_endpoint"]
        secrets_file.write_text(
            json.dumps({"secret": created["secret"]["secret"], "public_key": endpoint["public_key"]})
        )

        def verified() -> bool:
            # Asked by itself before it ran or knew its secret; asked again it can answer.
            return bool(self.operator("webhook", "verify", "receiver")["state"] == "STATE_ACTIVE")

        wait_until("the receiver to say that it is meant", 30, verified, 0.3)
        self.webhooks_since_ms = int(time.time() * 1000)

    @property
    def journal_file(self) -> Path:
        """Where the receiver writes what it verified."""
        return self.directory / "receiver" / "journal.jsonl"

    def _factory(self) -> Factory:
        factory = Factory(f"factory {self.run_id}", self.directory / "factory")
        code = self.owner("ca", "code", "factory")["code"]
        proof = factory.proof(code)
        registered = self.owner(
            *("ca", "register", "factory", "--certificate", str(factory.certificate_file), "--proof", str(proof)),
            *("--jitp", "--rule", "canary-*=canary", "--rule", "beta-*=beta", "--cohort", "production"),
            *("--tag", "demo", "--target", TARGET),
        )
        self.journal.check("CA registered with proof of possession", registered["state"] == "STATE_ACTIVE", "ACTIVE")
        return factory

    def _firmware(self) -> str:
        key_file = self.directory / "release.pem"
        key = self.operator("signing-key", "generate", str(key_file))["public_key"]
        self.operator("signing-key", "register", "release", str(key_file))
        sign = ("--sign-with", str(key_file))
        for built in firmware.build(self.directory / "firmware"):
            parts = (
                ("main", TARGET, built.program_path, firmware.PROGRAM_METADATA),
                ("config", "portable", built.config_path, firmware.CONFIG_METADATA),
            )
            for artifact, target, path, metadata in parts:
                self.operator(
                    *("upload", str(path), "--artifact", artifact, "--version", built.version, "--target", target),
                    *("--part-size", str(5 * 1024 * 1024), "--metadata", json.dumps(metadata), *sign),
                )
            bundle = self.operator(
                *("bundle", "create", f"fw-{built.version.replace('.', '-')}", "--version", built.version),
                *("--security-version", str(built.security_version)),
                *("--binary", f"main/{built.version}/{TARGET}", "--binary", f"config/{built.version}/portable", *sign),
            )
            self.journal.say(f"{built.version}: bundle digest {bundle['digest'][:16]}…, signed here")
            self.journal.check(f"bundle {built.version} is offerable", bundle.get("offerable", False))
        return str(key)

    def _enrol(self, factory: Factory, key: str) -> PowerCuts:
        listed = self.operator("list", "devices")
        self.journal.check("registry lists no device before first contact", listed == [], f"{len(listed)} devices")
        site = Site(
            gateway=self.profile.gateway,
            server_name=f"{self.organization}.{self.profile.gateway_domain}",
            ca_file=self.profile.ca.resolve(),
            product=self.product,
            target=TARGET,
            trusted_keys=[key],
            factory_version="1.0.0",
        )
        for device_id, serial in self._device_ids():
            self.fleet.add(DevicePlan(device_id, factory.device(device_id), serial), site)
        begin = time.monotonic()
        self.fleet.start(self.scale.power_cuts)
        self._await_enrolment()
        self.journal.say(
            f"all enrolled after {time.monotonic() - begin:.1f} s, {self.fleet.resident_mib():.0f} MiB resident"
        )
        return PowerCuts(self.fleet, self.scale.power_cuts)

    def _device_ids(self) -> list[tuple[str, str]]:
        """Ids and serials: on 2.0.0 one canary fails to boot, two fail in soak."""
        troubled = [firmware.BOOT_FAILS, firmware.SOAK_FAILS[0], firmware.SOAK_FAILS[1]]
        devices = []
        for index in range(self.scale.canary):
            digit = troubled[index - 2] if 2 <= index < 5 else "1"
            devices.append((f"canary-{index + 1:02d}", f"{1000 + index}{digit}"))
        devices += [(f"beta-{index + 1:02d}", f"{2000 + index}2") for index in range(self.scale.beta)]
        devices += [(f"prod-{index + 1:02d}", f"{3000 + index}3") for index in range(self.scale.production)]
        return devices

    def _await_enrolment(self) -> None:
        wanted = {"canary": self.scale.canary, "beta": self.scale.beta, "production": self.scale.production}

        def enrolled() -> dict[str, int] | None:
            counts = dict.fromkeys(wanted, 0)
            for device in self.operator("list", "devices"):
                cohort = device.get("cohort", "").rsplit("/", 1)[-1]
                counts[cohort] = counts.get(cohort, 0) + 1
            self.journal.say(f"enrolled: {counts}")
            return counts if counts == wanted else None

        counts = wait_until(f"cohorts {wanted}", 60, enrolled, 1.0)
        self.journal.check("every device is in the cohort of its rule", counts == wanted, str(counts))

    def _rollout(self, version: str, stages: list[dict[str, Any]]) -> str:
        """Create and start; returns the rollout's id."""
        rollout_id = f"to-{version.replace('.', '-')}"
        document = {
            "bundle": f"fw-{version.replace('.', '-')}",
            "failure_action": "FAILURE_ACTION_ROLL_BACK",
            "attempt_policy": {"lease": "60s", "go_valid": "10s"},
            "stages": stages,
        }
        file = self.directory / f"{rollout_id}.json"
        file.write_text(json.dumps(document, indent=1))
        self.operator("rollout", "create", rollout_id, "--file", str(file), "--start")
        return rollout_id

    def _follow(self, rollout_id: str, timeout_s: float, cuts: PowerCuts | None) -> dict[str, Any]:
        """Show each change until the rollout has ended; the last state."""
        watcher = self.operator.stream("rollout", "watch", rollout_id)
        self.watchers.append(watcher)
        updates: list[dict[str, Any]] = []

        def read() -> None:
            updates.extend(json.loads(line) for line in watcher.stdout or ())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        shown = ""
        give_up = time.monotonic() + timeout_s
        while reader.is_alive():
            if cuts is not None:
                cuts.poll()
            if updates and (line := _progress(updates[-1]["rollout"])) != shown:
                shown = line
                self.journal.say(line)
            if time.monotonic() > give_up:
                raise DemoError(f"rollout {rollout_id} did not end within {timeout_s:.0f} s: {shown}")
            reader.join(0.2)
        ended: dict[str, Any] = self.operator("get", f"{self.product}/rollouts/{rollout_id}")
        return ended

    def _stages(self, production_cap: int, canary_cap: int) -> list[dict[str, Any]]:
        scale = self.scale
        plan = (
            ("canary", scale.canary, canary_cap, 3),
            ("beta", scale.beta, scale.beta_cap, 3),
            ("production", scale.production, production_cap, 3),
        )
        return [
            {
                "display_name": name,
                "cohort": name,
                "max_in_flight": cap,
                "gate": {"min_sample": size, "success_ppm": 1_000_000, "failure_limit": limit, **GATE_TIMES},
            }
            for name, size, cap, limit in plan
        ]

    def _good_rollout(self, cuts: PowerCuts) -> None:
        rollout_id = self._rollout("1.1.0", self._stages(self.scale.production_cap, self.scale.canary_cap))
        ended = self._follow(rollout_id, 150, cuts)
        statuses = ended["stage_statuses"]
        self.journal.check("rollout of 1.1.0 completed", ended["state"] == "STATE_COMPLETED", ended["state"])
        confirmed = sum(int(status.get("confirmed", 0)) for status in statuses)
        self.journal.check(
            "every device confirmed 1.1.0", confirmed == self.scale.all, f"{confirmed} of {self.scale.all}"
        )
        caps = [stage["max_in_flight"] for stage in ended["stages"]]
        peaks = [status.get("peak_in_flight", 0) for status in statuses]
        self.journal.check(
            "each stage reached its cap and none exceeded it", peaks == caps, f"peaks {peaks}, caps {caps}"
        )
        killed = ", ".join(f"{device} at {step}" for device, step, _ in cuts.done)
        self.journal.check(
            f"{len(self.scale.power_cuts)} devices killed before their switch came through",
            not cuts.waiting and not self.fleet.dead(),
            killed or "none was killed",
        )
        versions = self._versions()
        self.journal.check(
            "the registry says so too", set(versions.values()) == {"1.1.0"}, f"{len(versions)} devices on 1.1.0"
        )

    def _versions(self) -> dict[str, str]:
        return {
            device["identifier"]: device.get("reported", {}).get("version", "")
            for device in self.operator("list", "devices")
        }

    def _bad_rollout(self) -> None:
        rollout_id = self._rollout("2.0.0", self._stages(self.scale.production_cap, self.scale.canary_cap))
        ended = self._follow(rollout_id, 120, None)
        canary = ended["stage_statuses"][0]
        later = ended["stage_statuses"][1:]
        self.journal.check(
            "rollout of 2.0.0 was halted and rolled back", ended["state"] == "STATE_ROLLED_BACK", ended["state"]
        )
        self.journal.check(
            "one reverted at boot, two were withdrawn in soak",
            (int(canary.get("reverted", 0)), int(canary.get("withdrawn", 0))) == (1, 2),
            f"reverted {canary.get('reverted', 0)}, withdrawn {canary.get('withdrawn', 0)}",
        )
        back = int(canary.get("rolled_back", 0))
        self.journal.check(
            "every canary that ran 2.0.0 came back", back == self.scale.canary - 1, f"{back} rolled back"
        )
        claimed = [int(status.get("claimed", 0)) for status in later]
        self.journal.check("beta and production were never offered 2.0.0", not any(claimed), f"claims {claimed}")
        versions = wait_until(
            "every device to report 1.1.0",
            30,
            lambda: (seen := self._versions()) and set(seen.values()) == {"1.1.0"} and seen,
        )
        self.journal.check("the whole fleet runs 1.1.0", len(versions) == self.scale.all, f"{len(versions)} devices")
        release = ended["stage_statuses"][0]["release"]
        self.journal.check(
            "2.0.0 is retracted", self.operator("get", release).get("retracted", False), release.rsplit("/", 1)[-1]
        )

    def _explain(self) -> None:
        answer = self.operator("explain", "device", "prod-01")
        grants = [grant["attempt"]["bundle"].rsplit("/", 1)[-1] for grant in answer.get("grants", [])]
        self.journal.check("explained: why 1.1.0", grants == ["fw-1-1-0"], f"granted {grants}")
        steps = answer.get("last_check_in", {}).get("steps", [])
        why_not = [
            step
            for step in steps
            if step.get("metadata", {}).get("version") == "2.0.0" or "2-0-0" in step.get("subject", "")
        ]
        self.journal.check(
            "explained: why not 2.0.0", bool(why_not), why_not[0]["message"] if why_not else str(steps)[:300]
        )
        for step in answer.get("grants", [{}])[0].get("reasons", [])[:6]:
            self.journal.say(f"{step['code']}: {step.get('message', '')}")

    def _check_log(self) -> None:
        self.fleet.stop()
        rollouts = f"{self.product}/rollouts"
        scale = self.scale
        caps = [
            (f"{rollouts}/to-1-1-0", index, cap)
            for index, cap in enumerate((scale.canary_cap, scale.beta_cap, scale.production_cap))
        ]
        expect = {
            "organization": self.organization,
            "request_ids": [line.split()[0] for line in self.commands_file.read_text().splitlines()],
            "caps_reached": [*caps, (f"{rollouts}/to-2-0-0", 0, scale.canary_cap)],
            "bundle_only_in_cohorts": {f"{self.product}/bundles/fw-2-0-0": [f"{self.product}/cohorts/canary"]},
            "idle_organizations": [self.idle],
            "idle_allowed_events": list(IDLE_EVENTS),
            "webhooks": {"organization": self.organization, "since_ms": self.webhooks_since_ms},
        }
        expect_file, result_file = self.directory / "expect.json", self.directory / "result.json"
        expect_file.write_text(json.dumps(expect, indent=1))
        subprocess.run(
            [
                *(sys.executable, "-m", "demo.checker", "--kafka", self.kafka, "--env", self.env),
                *("--expect", str(expect_file), "--output", str(result_file)),
            ],
            cwd=ROOT,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        if not result_file.exists():
            raise DemoError("the checker gave no result")
        result = json.loads(result_file.read_text())
        for check in result["checks"]:
            self.journal.check(check["name"], check["holds"], check["detail"])
        self._compare_webhooks(result_file, len(result["webhook_events"]))

    def _compare_webhooks(self, result_file: Path, expected: int) -> None:
        command = [
            *(sys.executable, "-m", "demo.receiver", "compare"),
            *("--journal", str(self.journal_file), "--expected", str(result_file)),
        ]
        deadline = time.monotonic() + 20
        while True:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode == 0 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        detail = done.stdout.strip().replace("\n", "; ")[-400:]
        self.journal.check("every webhook once, signed v1 and v1a", done.returncode == 0 and expected > 0, detail)


def _progress(rollout: dict[str, Any]) -> str:
    parts = []
    for stage, status in zip(rollout["stages"], rollout.get("stage_statuses", []), strict=False):
        state = status.get("state", "STATE_PENDING").removeprefix("STATE_").lower()
        counts = [
            f"{name} {status[name]}"
            for name in ("in_flight", "confirmed", "soaked", "failed", "reverted", "withdrawn", "rolled_back")
            if status.get(name)
        ]
        parts.append(f"{stage['display_name']}: {state}" + (f" ({', '.join(counts)})" if counts else ""))
    return f"{rollout['state'].removeprefix('STATE_').lower():>12} | " + " | ".join(parts)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="fourteen devices instead of sixty")
    arguments = parser.parse_args()
    settings = load()
    profile = settings.local_dir / "profile.json"
    if not profile.exists():
        print(f"no profile at {profile}: run `make up` first", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    demo = Demo(profile, SMALL if arguments.small else Scale(), settings)
    return demo.run()


if __name__ == "__main__":
    sys.exit(main())
