"""AWS Signature Version 4 in the query string, for plain S3: path style, unsigned payload, any method and headers.

The rules are those of "Authenticating Requests: Using Query Parameters" in the S3 API reference. Every header given is
signed, so that a presigned PUT binds ``x-amz-checksum-sha256`` and with it the body.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key of a region."""

    access_key: str
    secret_key: str = field(repr=False)
    region: str


def presign(
    credentials: Credentials,
    method: str,
    url: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    expires_s: int,
    now: datetime | None = None,
) -> str:
    """The URL with its signature; ``url`` has a path and no query."""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{moment[:8]}/{credentials.region}/s3/aws4_request"
    parts = urlsplit(url)
    signed = {"host": parts.netloc} | {name.lower(): value.strip() for name, value in headers.items()}
    names = ";".join(sorted(signed))
    parameters = {
        **query,
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{credentials.access_key}/{scope}",
        "X-Amz-Date": moment,
        "X-Amz-Expires": str(expires_s),
        "X-Amz-SignedHeaders": names,
    }
    canonical_query = "&".join(f"{_escape(name)}={_escape(parameters[name])}" for name in sorted(parameters))
    canonical_headers = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = (
        f"{method}\n{quote(parts.path, safe='/~')}\n{canonical_query}\n{canonical_headers}\n{names}\nUNSIGNED-PAYLOAD"
    )
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{credentials.secret_key}".encode()
    for part in (moment[:8], credentials.region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    return (
        f"{parts.scheme}://{parts.netloc}{quote(parts.path, safe='/~')}?{canonical_query}&X-Amz-Signature={signature}"
    )


def _escape(text: str) -> str:
    return quote(text, safe="~")
