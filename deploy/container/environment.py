"""`python -m deploy.container.environment`: writes `.env` for `docker compose`, with secrets of this installation.

Nothing in the repository holds a secret; what `docker-compose.yml` needs is made here once, readable by its owner only.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def content(uid: int) -> str:
    """The file: credentials of the S3 server, and who owns the state folder."""
    return (
        "# Made by `make compose-env`; read by docker compose. Never commit it.\n"
        f"GROUNDSWELL_S3_ACCESS_KEY={secrets.token_hex(10)}\n"
        f"GROUNDSWELL_S3_SECRET_KEY={secrets.token_hex(20)}\n"
        f"GROUNDSWELL_UID={uid}\n"
    )


def main(target: Path) -> int:
    """Leaves an existing file alone."""
    state = ROOT / ".local" / "compose"
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    if target.exists():
        print(f"{target.name} exists: left as it is")
        return 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content(os.getuid()))
    print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(ROOT / ".env"))
