"""`python -m deploy.local up | down | status | clean | logs | renew-certificates`; each has a `--help`."""

from __future__ import annotations

import argparse
import contextlib
import sys

from deploy.local import control
from deploy.local.credentials import renew_certificates
from deploy.local.errors import StackError
from deploy.local.settings import load


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Run one command; what a person can act on is one line, not a traceback."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description="The local stack, without Docker.")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start what is not running yet")
    up.add_argument("--servers-only", action="store_true", help="Kafka, Redis and S3 only")
    commands.add_parser("down", help="end exactly what was started")
    commands.add_parser("status", help="one line a process; exit 1 unless all are ready")
    commands.add_parser("clean", help="down, and remove the data")
    renew = commands.add_parser("renew-certificates", help="new certificates for all services, without a restart")
    renew.add_argument("--new-ca", action="store_true", help="from a new CA; the old one stays an anchor")
    renew.add_argument("--forget-old-ca", action="store_true", help="leave only the newest CA as an anchor")
    logs = commands.add_parser("logs", help="the end of the logs")
    logs.add_argument("names", nargs="*", metavar="NAME", help="of these processes only")
    logs.add_argument("--follow", "-f", action="store_true", help="go on as they grow")
    chosen = parser.parse_args(arguments)
    try:
        settings = load()
        match chosen.command:
            case "up":
                control.up(settings, servers_only=chosen.servers_only, say=_say)
            case "down":
                control.down(settings, _say)
            case "clean":
                control.clean(settings, _say)
            case "renew-certificates":
                new_ca, forget = chosen.new_ca, chosen.forget_old_ca
                done = renew_certificates(settings, new_ca=new_ca, forget_old_ca=forget)
                _say(f"renewed {', '.join(done)}; services take them at their next connections")
            case "logs":
                return control.logs(settings, chosen.names, follow=chosen.follow, say=_say)
            case _:
                return 0 if control.status(settings, _say) else 1
    except StackError as error:
        if error.detail:
            print(error.detail, file=sys.stderr)
        print(f"groundswell: {error.line}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"groundswell: {error}: free some space, or set GROUNDSWELL_LOCAL_DIR elsewhere", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
