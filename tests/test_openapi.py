"""The published document: what it leaves out, what it says that is not so."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
from scripted import ASK, ScriptedBackend
from serving import served, sse_events

from kestrel.api import Overloaded, RateLimited, RequestError
from kestrel.api_keys import parse_keys
from kestrel.config import Limits, RuntimeConfig
from kestrel.openapi import openapi_document
from kestrel.seg_refiner.result import SegmentRefineBitmapsResult
from kestrel.server.routes import build_app

pytest_plugins = ["scripted"]


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def fits(document: dict[str, Any], schema: dict[str, Any], value: Any) -> bool:
    whole = schema | {"components": document["components"]}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(value))


def unknown_keys(
    document: dict[str, Any], schema: dict[str, Any], value: dict[str, Any]
) -> set[str]:
    schema = resolve(document, schema)
    parts = [schema, *(resolve(document, part) for part in schema.get("allOf", ()))]
    return set(value) - {key for part in parts for key in part.get("properties", {})}


async def test_the_document_describes_the_answers_that_are_given(client, backend):
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/segment"]["post"]["responses"]
    plain = responses["200"]["content"]["application/json"]["schema"]
    event = responses["200"]["content"]["text/event-stream"]["schema"]

    body = (await client.post("/v1/segment", json=ASK)).json()
    assert fits(document, plain, body) and not unknown_keys(document, plain, body)
    assert not fits(document, plain, body | {"finish_reason": "tired"})

    mapping = event_mapping(document, event)
    backend.refinement = RuntimeError("broken")
    streams = [await client.post("/v1/segment", json=ASK | {"stream": True})]
    backend.refinement = None
    streams.append(await client.post("/v1/segment", json=ASK | {"stream": True}))
    seen = {e["type"]: e for response in streams for e in sse_events(response.text)}
    assert set(seen) == set(mapping)
    for kind, payload in seen.items():
        assert fits(document, event, payload), kind
        assert not unknown_keys(document, {"$ref": mapping[kind]}, payload), kind


def event_mapping(document: dict[str, Any], event: dict[str, Any]) -> dict[str, str]:
    mapping: dict[str, str] = resolve(document, event)["discriminator"]["mapping"]
    return mapping


async def test_the_document_knows_every_refusal(client, backend):
    document = (await client.get("/openapi.json")).json()
    responses = document["paths"]["/v1/segment"]["post"]["responses"]

    def statuses(kind: type[RequestError]) -> set[int]:
        return {kind.status}.union(*(statuses(sub) for sub in kind.__subclasses__()))

    assert {str(status) for status in statuses(RequestError)} <= set(responses)
    answer = await client.post("/v1/segment", json={})
    schema = responses["400"]["content"]["application/json"]["schema"]
    assert fits(document, schema, answer.json())
    assert not unknown_keys(document, schema, answer.json())
    for status, response in responses.items():
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503")), status


async def test_the_document_names_every_header_that_is_read(client):
    document = (await client.get("/openapi.json")).json()
    parameters = document["paths"]["/v1/segment"]["post"]["parameters"]
    schemes = document["components"]["securitySchemes"].values()
    named = {p["name"] for p in parameters} | {s["name"] for s in schemes if "name" in s}
    assert named == {"X-Request-Timeout-Ms", "X-Request-Id", "X-Moondream-Auth"}
    assert {"type": "http", "scheme": "bearer"} in schemes
    for path in document["paths"].values():
        for operation in path.values():
            (own,) = [p for p in operation["parameters"] if p["name"] == "X-Request-Id"]
            assert re.fullmatch(own["schema"]["pattern"], "edge-7:abc.DEF_1")
            assert not re.fullmatch(own["schema"]["pattern"], "two words")
            assert "X-Request-Id" in operation["responses"]["400"]["description"]


def own_headers(response: httpx.Response) -> set[str]:
    """Headers of an answer, without those that frame any HTTP message."""
    framing = {"content-length", "content-type", "cache-control", "x-accel-buffering"}
    return set(response.headers) - framing


async def test_the_document_describes_every_header_that_is_given(client, backend):
    paths = (await client.get("/openapi.json")).json()["paths"]

    def described(response: httpx.Response) -> set[str]:
        operation = paths[response.request.url.path][response.request.method.lower()]
        return {
            name.lower() for name in operation["responses"][str(response.status_code)]["headers"]
        }

    backend.refinement = SegmentRefineBitmapsResult(reason="unavailable")
    plain = await client.post("/v1/segment", json=ASK)
    assert own_headers(plain) == described(plain)
    backend.refinement = None
    answers = [await client.post("/v1/segment", json=ASK | {"stream": True})]
    answers += [await client.get(path) for path in ("/v1/models", "/healthz")]
    for error in (Overloaded("full"), RateLimited("too often"), KeyError("a bug")):
        backend.script = [error]
        answers.append(await client.post("/v1/segment", json=ASK))
    backend.not_ready = "starting"
    answers.append(await client.get("/healthz"))
    object.__setattr__(backend.config, "api_keys", parse_keys(["a-key-for-this-test"]))
    answers += [await client.post("/v1/segment", json=ASK), await client.get("/v1/models")]
    assert [a.status_code for a in answers] == [200, 200, 200, 503, 429, 500, 503, 401, 401]
    for answer in answers:
        assert own_headers(answer) <= described(answer)
        missing = described(answer) - own_headers(answer)
        assert missing <= {"server-timing", "x-refinement"}, answer.request.url


def test_the_document_gives_the_bounds_of_its_own_server():
    limits = Limits(max_image_pixels=123_456, max_object_chars=77, max_spatial_refs=5)
    document = openapi_document(RuntimeConfig(limits=limits, max_context=640))
    schemas = document["components"]["schemas"]
    fields, tokens = schemas["SegmentRequest"]["properties"], schemas["Settings"]["properties"]
    assert tokens["max_tokens"]["maximum"] == tokens["max_tokens"]["default"] == 640
    assert "123456 pixels" in fields["image_url"]["description"]
    assert "77 characters" in fields["object"]["description"]
    assert fields["spatial_refs"]["maxItems"] == 5


async def test_every_reference_of_the_document_leads_somewhere(client):
    text = (await client.get("/openapi.json")).text
    document = json.loads(text)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names and names <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_the_docs_page_loads_nothing_from_elsewhere(client):
    response = await client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    for said in ("/v1/segment", "return_base64", "Retry-After", "X-Request-Timeout-Ms"):
        assert said in response.text
    for loader in ("<script", "<link", "<img", "src=", "//", "@import", "url("):
        assert loader not in response.text, loader


@pytest.mark.parametrize(("prefix", "server"), [("", "/"), ("/seg", "/seg")])
async def test_the_document_leads_to_its_own_server_below_a_prefix(backend, prefix, server):
    transport = httpx.ASGITransport(build_app(backend), root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        document = (await client.get(f"{prefix}/openapi.json")).json()
        assert document["servers"] == [{"url": server}]
        (path,) = [path for path, methods in document["paths"].items() if "post" in methods]
        base = httpx.URL("http://test/").join(document["servers"][0]["url"])
        url = f"{str(base).rstrip('/')}{path}"
        assert (await client.post(url, json=ASK)).status_code == 200
        assert f"POST {prefix}/v1/segment<" in (await client.get(f"{prefix}/docs")).text


def test_two_servers_do_not_share_their_document():
    one, two = ScriptedBackend(), ScriptedBackend(model="other", api_keys=("k",))
    documents = []
    for backend in (one, two):
        with served(build_app(backend)) as url:
            documents.append(httpx.get(f"{url}/openapi.json").json())
    served_names = [
        d["components"]["schemas"]["SegmentRequest"]["properties"]["model"]["enum"][0]
        for d in documents
    ]
    assert served_names == ["nano", "other"]
    operations = [d["paths"]["/v1/segment"]["post"] for d in documents]
    assert [bool(o["security"]) for o in operations] == [False, True]
