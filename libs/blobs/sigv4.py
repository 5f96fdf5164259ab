"""AWS Signature Version 4 in the query string ("presigned"), path style.

Every header given is signed, and must then be sent exactly so; that is how a link binds ``x-amz-checksum-sha256``.
The payload is left to that header (``UNSIGNED-PAYLOAD``), because the store checks it against the body.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit

ALGORITHM: Final = "AWS4-HMAC-SHA256"
_UNRESERVED: Final = "-_.~"


@dataclass(frozen=True, slots=True)
class Signer:
    """Signs requests to one bucket."""

    bucket: str
    region: str
    access_key: str
    secret_key: str = field(repr=False)

    def url(
        self,
        endpoint: str,
        method: str,
        key: str,
        now: datetime,
        expires_s: int,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """The signed link. An empty key is the bucket itself."""
        split = urlsplit(endpoint)
        stamp = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{stamp[:8]}/{self.region}/s3/aws4_request"
        signed = {name.lower(): " ".join(value.split()) for name, value in (headers or {}).items()}
        signed["host"] = split.netloc
        names = ";".join(sorted(signed))
        fields = {
            **(query or {}),
            "X-Amz-Algorithm": ALGORITHM,
            "X-Amz-Credential": f"{self.access_key}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(expires_s),
            "X-Amz-SignedHeaders": names,
        }
        pairs = sorted((_encode(name), _encode(value)) for name, value in fields.items())
        canonical_query = "&".join(f"{name}={value}" for name, value in pairs)
        path = split.path.rstrip("/") + quote(f"/{self.bucket}/{key}" if key else f"/{self.bucket}", "/" + _UNRESERVED)
        lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
        request = "\n".join((method, path, canonical_query, lines, names, "UNSIGNED-PAYLOAD"))
        to_sign = "\n".join((ALGORITHM, stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
        signature = hmac.new(self._key(stamp[:8]), to_sign.encode(), hashlib.sha256).hexdigest()
        return f"{split.scheme}://{split.netloc}{path}?{canonical_query}&X-Amz-Signature={signature}"

    def _key(self, day: str) -> bytes:
        key = f"AWS4{self.secret_key}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return key


def _encode(text: str) -> str:
    return quote(text, safe=_UNRESERVED)
