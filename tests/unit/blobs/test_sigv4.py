"""The signer gives what the S3 documentation's worked example gives, binds headers, and shows no secret."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

from libs.blobs.sigv4 import Credentials, presign

EXAMPLE = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
WHEN = datetime(2013, 5, 24, tzinfo=UTC)
URL = "https://examplebucket.s3.amazonaws.com/test.txt"


def field(url: str, name: str) -> str:
    return parse_qs(urlsplit(url).query)[name][0]


def test_the_documented_example() -> None:
    url = presign(EXAMPLE, "GET", URL, {}, {}, 86400, WHEN)
    assert field(url, "X-Amz-Signature") == "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"


def test_headers_are_bound_whatever_their_case() -> None:
    lower = presign(EXAMPLE, "PUT", URL, {}, {"x-amz-checksum-sha256": "abc="}, 60, WHEN)
    upper = presign(EXAMPLE, "PUT", URL, {}, {"X-Amz-Checksum-Sha256": "abc="}, 60, WHEN)
    other = presign(EXAMPLE, "PUT", URL, {}, {"x-amz-checksum-sha256": "abd="}, 60, WHEN)
    assert lower == upper
    assert field(lower, "X-Amz-SignedHeaders") == "host;x-amz-checksum-sha256"
    assert field(lower, "X-Amz-Signature") != field(other, "X-Amz-Signature")


def test_method_path_query_and_life_are_bound() -> None:
    signatures = {
        field(presign(EXAMPLE, method, url, query, {}, life, WHEN), "X-Amz-Signature")
        for method, url, query, life in (
            ("GET", URL, {}, 60),
            ("PUT", URL, {}, 60),
            ("GET", URL + "x", {}, 60),
            ("GET", URL, {"uploadId": "1"}, 60),
            ("GET", URL, {}, 61),
        )
    }
    assert len(signatures) == 5


def test_the_secret_is_not_shown() -> None:
    assert EXAMPLE.secret_key not in repr(EXAMPLE)
    assert EXAMPLE.secret_key not in presign(EXAMPLE, "GET", URL, {}, {}, 60, WHEN)
