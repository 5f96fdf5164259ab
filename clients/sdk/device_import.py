"""Import devices from a CSV file: upload its rows, have them judged, make devices of them.

The import's id comes from the file's contents, so that a run that broke off goes on where it was when it is simply
started again, on this machine or another. An import that has ended is left alone and a new one begun beside it.

```python
job = DeviceImportJob.of_file(client, "organizations/acme/products/thermostat", Path("devices.csv"))
job.upload()
verdicts = job.validate()
if not verdicts.problem_count:
    done = job.commit()
```
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundswell.registry.v1 import device_imports_pb2 as pb

from clients.sdk.client import Client
from clients.sdk.errors import ApiError, SdkError

COLUMNS: Final = ("identifier", "description", "tags", "cohort", "target")
ROWS_AT_ONCE: Final = 1_000
ROWS_MOST: Final = 100_000
POLL_S: Final = 0.2
ATTEMPTS: Final = 100
"""Ids tried beside imports of the same file that have ended."""
Progress = Callable[[int, int], None]
"""Called with what is done and what there is."""
ENDED: Final = (pb.DeviceImport.STATE_COMPLETED, pb.DeviceImport.STATE_CANCELLED)


class CsvError(SdkError):
    """The file is no list of devices; the message says where."""


def read_rows(path: Path) -> list[pb.DeviceImportRow]:
    """Rows of a CSV file with a header; `identifier` is required, tags are separated by `;`. Raises CsvError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or ())
            rows = [_row(path, reader.line_num, record) for record in reader]
    except UnicodeDecodeError as error:
        raise CsvError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise CsvError(f"{path} is not CSV: {error}") from None
    if not 1 <= len(rows) <= ROWS_MOST:
        raise CsvError(f"{path} has {len(rows)} rows: an import takes 1 to {ROWS_MOST}")
    return rows


def _check_header(path: Path, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown or "identifier" not in names or len(set(names)) != len(names):
        shown = f"does not know '{unknown[0]}'" if unknown else "needs 'identifier', and each column once"
        raise CsvError(f"the header of {path} {shown}; columns: {', '.join(COLUMNS)}")


def _row(path: Path, line: int, record: dict[str, str | None]) -> pb.DeviceImportRow:
    if None in record or None in record.values():
        raise CsvError(f"line {line} of {path} has another number of cells than the header")
    cells = {name: (value or "").strip() for name, value in record.items()}
    tags = [tag for part in cells.pop("tags", "").split(";") if (tag := part.strip())]
    return pb.DeviceImportRow(tags=tags, **cells)


@dataclass(slots=True)
class DeviceImportJob:
    """One import, from the rows to the devices. Every step may be repeated."""

    client: Client
    product: str
    import_id: str
    display_name: str
    rows: Sequence[pb.DeviceImportRow]
    name: str = ""
    """Resource name, once it is found or made."""

    @classmethod
    def of_file(cls, client: Client, product: str, path: Path) -> DeviceImportJob:
        """For a CSV file. Raises CsvError."""
        rows = read_rows(path)
        digest = hashlib.sha256(b"".join(row.SerializeToString(deterministic=True) + b"\n" for row in rows))
        return cls(client, product, f"csv-{digest.hexdigest()[:24]}", path.name, rows)

    def get(self) -> pb.DeviceImport:
        """As it is now."""
        return self.client.registry.GetDeviceImport(pb.GetDeviceImportRequest(name=self.name))

    def begin(self) -> pb.DeviceImport:
        """The import of these rows that has not ended, found or made."""
        for attempt in range(1, ATTEMPTS):
            import_id = self.import_id if attempt == 1 else f"{self.import_id}-{attempt}"
            self.name = f"{self.product}/deviceImports/{import_id}"
            wanted = pb.DeviceImport(display_name=self.display_name, row_count=len(self.rows))
            request = pb.CreateDeviceImportRequest(
                parent=self.product, device_import_id=import_id, device_import=wanted
            )
            try:
                return self.client.registry.CreateDeviceImport(request)
            except ApiError as error:
                if error.reason != "ALREADY_EXISTS":
                    raise
            found = self.get()
            if found.state not in ENDED:
                return found
        raise CsvError(f"this file was imported {ATTEMPTS} times: delete some of those imports")

    def upload(self, progress: Progress = lambda _done, _total: None) -> pb.DeviceImport:
        """Send the rows that have not arrived."""
        image = self.begin()
        while image.next_row < image.row_count:
            first = image.next_row
            request = pb.AppendDeviceImportRowsRequest(
                name=self.name, first_row=first, rows=self.rows[first : first + ROWS_AT_ONCE]
            )
            image = self.client.registry.AppendDeviceImportRows(request)
            progress(image.received_count, image.row_count)
        return image

    def validate(self, progress: Progress = lambda _done, _total: None) -> pb.DeviceImport:
        """The dry run; returns when every row has its verdict."""
        self.client.registry.ValidateDeviceImport(pb.ValidateDeviceImportRequest(name=self.name))
        return self._wait(
            pb.DeviceImport.STATE_VALIDATING, lambda image: progress(image.validated_count, image.row_count)
        )

    def commit(
        self, *, skip_problems: bool = False, progress: Progress = lambda _done, _total: None
    ) -> pb.DeviceImport:
        """Make the devices; returns when the import has ended."""
        request = pb.CommitDeviceImportRequest(name=self.name, skip_problems=skip_problems)
        self.client.registry.CommitDeviceImport(request)
        return self._wait(
            pb.DeviceImport.STATE_COMMITTING, lambda image: progress(image.committed_count, image.row_count)
        )

    def problems(self) -> Iterator[pb.DeviceImportVerdict]:
        """Rows with a problem, in order."""
        request = pb.ListDeviceImportVerdictsRequest(parent=self.name, page_size=1_000)
        return self.client.pages(self.client.registry.ListDeviceImportVerdicts, request, "verdicts")

    def _wait(self, while_in: int, seen: Callable[[pb.DeviceImport], None]) -> pb.DeviceImport:
        while True:
            image = self.get()
            seen(image)
            if image.state != while_in:
                return image
            time.sleep(POLL_S)
