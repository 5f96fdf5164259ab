"""Writing files: whole or not at all, and readable by nobody else."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from deploy.local.errors import StackError

_NEEDED_BYTES = 256 * 1024 * 1024


def write(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def private_directory(path: Path) -> Path:
    """A folder only its owner can enter."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def check_room(folder: Path, needed: int = _NEEDED_BYTES) -> None:
    """Say now, in one line, what would otherwise end a server much later with a stack trace."""
    move = "or set GROUNDSWELL_LOCAL_DIR to a folder elsewhere"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise StackError(f"cannot write to {folder} ({error.strerror}): make it writable, {move}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StackError(
            f"{folder} has {free // 2**20} MiB free and the stack needs {needed // 2**20}: free some space, {move}"
        )
