"""Thermostat firmware for the demonstration: real archives, the same bytes at every build.

Each version is a tar.gz with the program `run` (POSIX sh, so that sixty devices cost nothing) and `payload.bin`, and
a configuration that is a binary of its own and lands beside the program as `config.json`.

| version | payload | what it is |
|---|---|---|
| 1.0.0 | 300 KiB | good |
| 1.1.0 | 1 MiB | good |
| 2.0.0 | 6 MiB (two parts to upload) | good code on the bench, wrong with the configuration that ships with it |

**The defect of 2.0.0.** The program spreads boards over watchdog slots and log channels by the last digit of their
serial number. Its configuration was cut down by someone who knew only the boards on the bench:

* `watchdog_slots` is 7 where it must be above any digit: a board whose serial ends in **7** divides by zero while
  it boots, so it never comes up (digits above 7 get a negative period, whose sign the timer drops: they live).
* `log_channels` went up to 5 and `log_rotated_channels` stayed at 4: the log of boards on channel 4, whose serial
  ends in **4** or **9**, is never rotated. They boot, pass their first health checks, are confirmed, and fail
  in the soak at the health check number `log_limit` + 1, counted from the installation.

Every other board stays healthy. What a board does depends only on its serial number, so the demonstration chooses.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

BOOT_FAILS = "7"
"""Last digit of serials that 2.0.0 does not boot on."""
SOAK_FAILS = "49"
"""Last digits of serials that 2.0.0 fails on in the soak."""
LOG_LIMIT = 6
SELF_TEST_S = 2
"""Seconds a board tests itself at boot: as long as two polls, so that a stage fills its cap."""
PROGRAM_METADATA = {"role": "program"}
CONFIG_METADATA = {"role": "config", "filename": "config.json"}


@dataclass(frozen=True, slots=True)
class Firmware:
    """A version as files to upload, program first."""

    version: str
    security_version: int
    program_path: Path
    config_path: Path


@dataclass(frozen=True, slots=True)
class _Version:
    version: str
    security_version: int
    payload_bytes: int
    config: dict[str, int]


def _versions(log_limit: int) -> tuple[_Version, ...]:
    good = {
        "watchdog_slots": 12,
        "log_channels": 4,
        "log_rotated_channels": 4,
        "log_limit": log_limit,
        "self_test_s": SELF_TEST_S,
    }
    bad = {**good, "watchdog_slots": 7, "log_channels": 5}
    return (
        _Version("1.0.0", 1, 300 * 1024, good),
        _Version("1.1.0", 1, 1024 * 1024, good),
        _Version("2.0.0", 1, 6 * 1024 * 1024, bad),
    )


def build(directory: Path, *, log_limit: int = LOG_LIMIT) -> list[Firmware]:
    """Write the archives and configurations of all versions."""
    directory.mkdir(parents=True, exist_ok=True)
    return [_build(directory, one) for one in _versions(log_limit)]


def _build(directory: Path, version: _Version) -> Firmware:
    program = directory / f"thermostat-{version.version}.tar.gz"
    config = directory / f"thermostat-{version.version}.config.json"
    source = (Path(__file__).parent / "run.sh").read_text(encoding="utf-8")
    # Pseudo-random, so that it does not compress and a download takes many reads.
    payload = hashlib.shake_256(f"thermostat {version.version}".encode()).digest(version.payload_bytes)
    run = source.replace("@VERSION@", version.version).encode()
    program.write_bytes(archive({"run": (run, 0o755), "payload.bin": (payload, 0o644)}))
    # One key a line: the program reads it with nothing but the shell.
    config.write_text(json.dumps(version.config, indent=2) + "\n", encoding="utf-8")
    return Firmware(version.version, version.security_version, program, config)


def archive(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A tar.gz of these files (content, mode), byte for byte the same every time."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(raw.getvalue(), compresslevel=1, mtime=0)


if __name__ == "__main__":
    for built in build(Path(sys.argv[1])):
        sys.stdout.write(f"{built.version} {built.program_path} {built.config_path}\n")
