"""A device agent of your own, on the device SDK: polls, verifies, downloads, installs, asks, switches, confirms.

    python examples/own_agent.py config.json [--until 1.1.0]

It replaces one file of firmware; a real device has two slots and a watchdog (see `clients/agent`). What no agent may
leave out is here:

* counters come from one sequence that is reserved on disk before use, so that a crash can never look like a clone;
* an offer counts only when keys pinned into the device signed its statement, and only at or above the floor;
* reports are kept until the log has them; the switch happens only after `go`; success is said by the new firmware.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from clients import device as sdk


class OwnAgent:
    """One device."""

    def __init__(self, config: dict[str, Any]) -> None:
        root = Path(config["root"])
        root.mkdir(parents=True, exist_ok=True)
        host, _, port = config["gateway"].rpartition(":")
        files = (Path(config[name]) for name in ("ca", "certificate", "key"))
        self._api = sdk.DeviceApi(sdk.Endpoint(host, int(port), config["server_name"], *files))
        keys = tuple(bytes.fromhex(key) for key in config["trusted_keys"])
        self._rules = sdk.Rules(config["product"], config["target"], keys, threshold=1)
        self._root, self._boot = root, str(uuid.uuid4())
        self._counter = sdk.Counter(sdk.StateFile(root / "counter.json"))
        self._file = sdk.StateFile(root / "state.json")
        self.state: dict[str, Any] = self._file.load() or {
            "instance": str(uuid.uuid4()),
            "running": {"version": config["factory_version"], "slot": "a", "security_version": 0},
            "floor": 0,
            "offer": None,
            "phase": "",
            "reports": [],
        }

    def poll(self) -> float:
        """One check-in and what follows from it; seconds until the next."""
        working = self.state["offer"] is not None
        if working and self.state["phase"] != "INSTALLED":
            self._fetch(sdk.Offer.from_json(self.state["offer"]))  # just taken, or a crash came between
            working = self.state["offer"] is not None
        sent = [sdk.Report.from_json(one) for one in self.state["reports"]]
        answer = self._api.check_in(
            sdk.CheckIn(
                instance=self.state["instance"],
                boot_id=self._boot,
                counter=self._counter.take(),
                running=sdk.Running.from_json(self.state["running"]),
                attempt=self.state["offer"]["attempt"] if working else "",
                ask_go=working and self.state["phase"] == "INSTALLED",
                reports=tuple(sent),
            )
        )
        kept = [one.to_json() for one in sent if one.counter > answer.reports_accepted_through]
        self._save(reports=kept)
        self._act(answer)
        return answer.poll_after_s if not self.state["reports"] and not self.state["phase"] else 0.2

    def _act(self, answer: sdk.Answer) -> None:
        if answer.offer is not None and self.state["offer"] is None:
            self._take(answer.offer)
        elif answer.go is not None and self.state["phase"] == "INSTALLED":
            self._switch()
        elif answer.kind == "cancel":
            self._save(offer=None, phase="")

    def _take(self, offered: sdk.Offer) -> None:
        try:
            offer = sdk.verify(self._rules, offered, self.state["floor"])
        except sdk.RefusedError as error:
            self._report(offered.attempt, "FAILED", error.reason, error.message)
            return
        self._report(offer.attempt, "ACCEPTED")
        self._save(offer=offer.to_json(), phase="ACCEPTED")

    def _fetch(self, offer: sdk.Offer) -> None:
        """Raises what passes: what was fetched stays, and the next poll goes on from there."""
        try:
            for binary in offer.binaries:
                path = self._root / f"{binary.digest}.part"
                sdk.fetch_once(self._api, binary, path, sdk.Pace(), lambda: None, remaining_s=600)
                sdk.verify_file(path, binary)
        except sdk.RefusedError as error:
            self._report(offer.attempt, "FAILED", error.reason, error.message)
            self._save(offer=None, phase="")
            return
        self._report(offer.attempt, "DOWNLOADED")
        (self._root / f"{offer.binaries[0].digest}.part").replace(self._root / "firmware.new")
        self._report(offer.attempt, "INSTALLED")
        self._save(phase="INSTALLED")

    def _switch(self) -> None:
        """The new firmware takes over: what was installed runs, finds itself well and says so."""
        offer = sdk.Offer.from_json(self.state["offer"])
        (self._root / "firmware.new").replace(self._root / "firmware")
        running = sdk.Running(offer.version, "b", offer.security_version, offer.release, offer.bundle)
        self._boot = str(uuid.uuid4())
        self._save(running=running.to_json(), floor=max(self.state["floor"], offer.security_version))
        self._report(offer.attempt, "BOOTED")
        self._report(offer.attempt, "CONFIRMED")
        self._save(offer=None, phase="")

    def _report(self, attempt: str, state: str, code: str = "", detail: str = "") -> None:
        report = sdk.Report(self._counter.take(), attempt, state, code, detail[:512])
        self._save(reports=[*self.state["reports"], report.to_json()])

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        self._file.save(self.state)


def main() -> int:
    """Poll until the version is confirmed and nothing waits to be said."""
    agent = OwnAgent(json.loads(Path(sys.argv[1]).read_text()))
    until = sys.argv[sys.argv.index("--until") + 1] if "--until" in sys.argv else ""
    while not until or agent.state["running"]["version"] != until or agent.state["reports"]:
        try:
            pause = agent.poll()
        except sdk.DeviceError as error:
            print(f"later: {error}", flush=True)
            pause = 2.0
        time.sleep(pause)
    return 0


if __name__ == "__main__":
    sys.exit(main())
