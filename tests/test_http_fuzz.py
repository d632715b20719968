"""Whatever is sent to the one-process server: no 5xx but 503 and 504, no hang, no answer that the
served OpenAPI document does not know."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import base64_text, picture, served, sse_events, until

from kestrel.config import Limits, RuntimeConfig
from kestrel.server.http import create_app

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.specs.openapi import checks  # noqa: E402

PICTURE = base64_text(picture())
TIMEOUT_S = 20.0
"""An answer that takes longer is a hang; the server's own deadline is half of it."""
FEW = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The real server with the shipped model."""
    config = RuntimeConfig(
        device="cpu",
        torch_threads=1,
        request_timeout_s=TIMEOUT_S / 2,
        limits=Limits(max_body_bytes=200_000, max_image_pixels=1_000_000),
    )
    failures: list[Exception] = []
    with served(create_app(config, on_failure=failures.append)) as url:
        until(lambda: failures or httpx.get(f"{url}/healthz").status_code == 200, 120)
        assert not failures
        yield url


@pytest.fixture(scope="module")
def document(address: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()
    return found


def allowed(status: int) -> bool:
    return 200 <= status < 500 or status in (503, 504)


def conforms(document: dict[str, Any], path: str, method: str, response: Any) -> None:
    """The answer, of httpx or of schemathesis, is one that the document describes."""
    headers = {
        name: value if isinstance(value, str) else value[0]
        for name, value in response.headers.items()
    }
    text = response.content.decode()
    assert allowed(response.status_code), text
    assert headers["x-request-id"]
    described = document["paths"][path][method]["responses"][str(response.status_code)]
    kind = headers["content-type"].split(";")[0]
    schema = described["content"][kind]["schema"] | {"components": document["components"]}
    bodies = sse_events(text) if kind == "text/event-stream" else [json.loads(text)]
    for body in bodies:
        jsonschema.validate(body, schema, jsonschema.Draft202012Validator)
    if response.status_code in (429, 503):
        assert int(headers["retry-after"]) >= 1


# What the document invites


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    loaded = schemathesis.openapi.from_url(f"{address}/openapi.json")

    @loaded.hook  # type: ignore[untyped-decorator]
    def map_body(context: Any, body: Any) -> Any:
        # Text that happens to be a picture in base64 is not found by chance.
        if isinstance(body, dict) and isinstance(body.get("image_url"), str):
            length = len(body["image_url"])
            if length % 3:
                prefix = "data:image/png;base64," if length % 3 == 1 else ""
                body = {**body, "image_url": prefix + PICTURE}
        return body

    return loaded


@pytest.mark.parametrize(
    ("route", "mode"),
    [
        ("POST /v1/segment", "positive"),
        ("POST /v1/segment", "negative"),
        ("GET /v1/models", "positive"),
        ("GET /healthz", "positive"),
    ],
)
@given(choice=st.data())
@settings(FEW, max_examples=30)
def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(
    api: Any, document: dict[str, Any], choice: st.DataObject, route: str, mode: str
) -> None:
    method, path = route.split()
    generation = schemathesis.GenerationMode(mode)
    case = choice.draw(api[path][method].as_strategy(generation_mode=generation))
    response = case.call(timeout=TIMEOUT_S)
    conforms(document, path, method.lower(), response)
    case.validate_response(
        response,
        checks=[
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_headers_conformance,
            checks.negative_data_rejection,
        ],
    )


# What nobody invited


def json_texts() -> st.SearchStrategy[bytes]:
    """JSON of any shape, most of it with the keys of a request and hostile values."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(["disc", PICTURE, f"data:image/png;base64,{PICTURE}", "file:///etc/x"])
    )
    values = st.recursive(
        scalars,
        lambda inner: (
            st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=12,
    )
    names = ("object", "image_url", "spatial_refs", "stream", "return_base64", "settings", "model")
    requests = st.fixed_dictionaries(
        {"object": st.just("disc") | values},
        optional=dict.fromkeys(names[1:], values),
    )
    return (values | requests).map(lambda value: json.dumps(value).encode())


def broken(texts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The same texts cut, with bytes changed, or in another encoding."""
    place = st.integers(0, 2000)
    return st.one_of(
        texts,
        st.binary(max_size=200),
        st.builds(lambda text, at: text[: at % (len(text) + 1)], texts, place),
        st.builds(
            lambda text, at, piece: (
                text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) + len(piece) :]
            ),
            texts,
            place,
            st.binary(min_size=1, max_size=4),
        ),
        st.builds(
            lambda text, encoding: text.decode().encode(encoding),
            texts,
            st.sampled_from(["utf-8-sig", "utf-16", "utf-16-be", "utf-32"]),
        ),
        texts.map(gzip.compress),
    )


@given(
    body=broken(json_texts()),
    kind=st.sampled_from([None, "application/json", "text/plain", "multipart/form-data", "\xff"]),
)
@settings(FEW, max_examples=60)
def test_no_body_breaks_the_server(
    address: str, document: dict[str, Any], body: bytes, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    with httpx.Client(timeout=TIMEOUT_S) as client:
        response = client.post(
            f"{address}/v1/segment",
            content=body,
            headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        )
    conforms(document, "/v1/segment", "post", response)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="a hundred thousand open lists"),
        pytest.param(b'{"object":' * 20_000, id="twenty thousand open objects"),
        pytest.param(b'{"object":"a","x":' + b"9" * 100_000 + b"}", id="a number of 100 kB"),
        pytest.param(b'{"object":"a","settings":{"max_tokens":1e999}}', id="beyond a float"),
        pytest.param(b'{"object":"a","settings":{"temperature":1e308}}', id="temperature 1e308"),
        pytest.param(b'{"object":"a","settings":{"temperature":5e-324}}', id="temperature 5e-324"),
        pytest.param(b'{"object":"a","settings":{"top_p":5e-324,"temperature":1}}', id="top_p"),
        pytest.param(b'{"object":"\\ud800"}', id="a lone surrogate"),
        pytest.param(b'{"object":"\\u0000"}', id="NUL"),
        pytest.param(b'{"object":"a","model":"\\ud800"}', id="a lone surrogate as the model"),
        pytest.param(b'{"object":"a","settings":{"\\ud800":1}}', id="a lone surrogate as a key"),
        pytest.param(b'{"object":"a","image_url":"\\ud800:"}', id="a lone surrogate as the image"),
        pytest.param(b'{"object":"a","object":7}', id="the same key twice"),
        pytest.param('{"object":"' + "𝔸" * 256 + '"}', id="256 characters of four bytes"),
        pytest.param('{"object":"' + "️‍" * 128 + '"}', id="256 joiners"),
        pytest.param(b'{"object":"a","image_url":"' + b"A" * 150_000 + b'"}', id="zeros for image"),
        pytest.param(b'{"object":"a","image_url":"data:image/png;base64,"}', id="an empty image"),
    ],
)
def test_hostile_body_is_answered_in_time(
    address: str, document: dict[str, Any], body: bytes | str
) -> None:
    started = time.monotonic()
    response = httpx.post(f"{address}/v1/segment", content=body, timeout=TIMEOUT_S)
    conforms(document, "/v1/segment", "post", response)
    assert time.monotonic() - started < TIMEOUT_S / 2


# Below HTTP


def exchange(address: str, sent: bytes) -> bytes:
    """All that the server answers to bytes on a connection whose sending half is then closed."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname or "", parts.port or 0), TIMEOUT_S) as sock:
        try:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # answered and closed before all was sent
        answer = b""
        try:
            while chunk := sock.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
    return answer


HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
BODY = b'{"object": "disc"}'


BROKEN_FRAMING = [
    b"",
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /v1/segment\r\n\r\n",
    b"POST  /v1/segment  HTTP/9.9\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    HEAD + b"Content-Length: 18\r\nContent-Length: 4\r\n\r\n" + BODY,
    HEAD + b"Content-Length: 1e3\r\n\r\n" + BODY,
    HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    HEAD + b"Content-Length: 500\r\n\r\n" + BODY,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + BODY,
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    HEAD + b"Expect: 100-continue\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"Upgrade: websocket\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"X-Request-Timeout-Ms: 1\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"X-Request-Timeout-Ms: " + b"9" * 5000 + b"\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"Authorization: \xff\xfe\r\nContent-Length: 18\r\n\r\n" + BODY,
    HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /%ff%00%2e%2e/%zz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET http://elsewhere/v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"BREW /v1/segment HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
]


@pytest.mark.parametrize(
    "sent",
    BROKEN_FRAMING,
    ids=lambda sent: repr(sent[:24] + sent[-24:]),
)
def test_broken_framing_is_refused_and_the_connection_ends(address: str, sent: bytes) -> None:
    answer = exchange(address, sent)
    if answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.split(b"\r\n\r\n", 1)[1]
    if answer:
        assert allowed(int(answer.split(b" ", 2)[1])), answer[:200]


@given(sent=st.binary(max_size=300) | st.binary(max_size=300).map(lambda tail: HEAD + tail))
@settings(FEW, max_examples=100)
def test_no_bytes_break_the_server(address: str, sent: bytes) -> None:
    answer = exchange(address, sent)
    if answer:
        assert allowed(int(answer.split(b" ", 2)[1])), answer[:200]


def test_the_server_is_still_well(address: str) -> None:
    ask = {"object": "disc", "image_url": PICTURE, "return_base64": True}
    assert httpx.get(f"{address}/healthz", timeout=30).status_code == 200
    assert httpx.post(f"{address}/v1/segment", json=ask, timeout=30).status_code == 200
