"""Whatever path a device asks for, the answer is one of ours."""

from __future__ import annotations

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from services.gateway.http import application_of


async def test_other_methods_and_paths_are_refused_with_a_reason() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = application_of([("POST", "/v1/checkin", handler), ("GET", "/v1/downloads/{grant}/{digest}", handler)])
    async with TestClient(TestServer(app, host="127.0.0.1")) as client:
        assert (await client.post("/v1/checkin")).status == 200
        assert (await client.get("/v1/downloads/a/b")).status == 200
        assert (await client.head("/v1/downloads/a/b")).status == 200, "what can be got can be asked about"
        for method, path, status, reason in (
            ("GET", "/v1/checkin", 405, "METHOD_NOT_ALLOWED"),
            ("DELETE", "/v1/downloads/a/b", 405, "METHOD_NOT_ALLOWED"),
            ("GET", "/", 404, "NO_SUCH_ROUTE"),
            ("POST", "/v1/checkin/", 404, "NO_SUCH_ROUTE"),
            ("PATCH", "/v1/downloads/a/b/c", 404, "NO_SUCH_ROUTE"),
        ):
            answer = await client.request(method, path)
            assert (answer.status, (await answer.json())["error"]["reason"]) == (status, reason), path
