"""The `swell` command of a checkout works from any folder, and says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("GROUNDSWELL_")}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another folder with the command and this one's environment."""
    made = tmp_path / "checkout"
    made.mkdir()
    shutil.copy2(ROOT / "swell", made / "swell")
    (made / ".venv").symlink_to(ROOT / ".venv")
    return made


def profile(folder: Path, key: str) -> None:
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(json.dumps({"endpoints": {}, "ca": "ca.pem", "keys": {key: "k"}}))


def known_keys(checkout: Path, folder: Path, **environment: str) -> str:
    command = [checkout / "swell", "auth", "list"]
    ran = subprocess.run(command, cwd=folder, env=CLEAN | environment, capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


def test_from_elsewhere_the_profile_is_the_checkouts(checkout: Path, tmp_path: Path) -> None:
    profile(checkout / ".local", "of-the-checkout")

    assert "of-the-checkout" in known_keys(checkout, tmp_path)


def test_one_below_the_working_directory_comes_first(checkout: Path, tmp_path: Path) -> None:
    profile(checkout / ".local", "of-the-checkout")
    profile(tmp_path / "work" / ".local", "nearer")

    assert "nearer" in known_keys(checkout, tmp_path / "work")


def test_settings_come_before_both(checkout: Path, tmp_path: Path) -> None:
    profile(checkout / ".local", "of-the-checkout")
    profile(tmp_path / "other", "of-the-local-dir")
    profile(tmp_path / "third", "named")
    local = {"GROUNDSWELL_LOCAL_DIR": str(tmp_path / "other")}

    assert "of-the-local-dir" in known_keys(checkout, checkout, **local)
    named = str(tmp_path / "third" / "profile.json")
    assert "named" in known_keys(checkout, checkout, **local, GROUNDSWELL_PROFILE=named)


def test_modules_of_the_users_folder_are_not_run(checkout: Path, tmp_path: Path) -> None:
    profile(checkout / ".local", "of-the-checkout")
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "__init__.py").write_text("raise SystemExit('not ours')")

    assert "of-the-checkout" in known_keys(checkout, tmp_path)


def test_without_a_set_up_it_says_what_to_run(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".venv").unlink()

    assert "make up" in known_keys(checkout, tmp_path)
