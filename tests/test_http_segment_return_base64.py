"""Masks that are sent unasked, missing when asked for, or not those of the picture, over HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from PIL import Image
from serving import base64_text, encoded, served, sse_events, until

from kestrel.config import SHIPPED_MODELS, RuntimeConfig
from kestrel.overlay import decode_mask
from kestrel.seg_refiner import png
from kestrel.seg_refiner.box import mask_box
from kestrel.seg_refiner.raster import rasterize_relative
from kestrel.server.http import create_app

SAMPLES = SHIPPED_MODELS / "nano" / "samples"
MASKS = {"coarse_mask_base64", "refined_mask_base64"}
ANSWER = {"request_id", "finish_reason", "path", "bbox", "metrics"}
# No other picture here has this size, that of the server's own health check included: what is
# encoded at this size is encoded for the request.
WIDTH, HEIGHT = 331, 217
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The one-process server with the shipped model, once it is ready."""
    config = RuntimeConfig(device="cpu", max_batch_size=4, torch_threads=1)
    with served(create_app(config)) as url:
        until(lambda: httpx.get(f"{url}/healthz", timeout=60).status_code == 200, 120)
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as made:
        yield made


def sized(file: Path, width: int = WIDTH, height: int = HEIGHT, **options: Any) -> bytes:
    with Image.open(file) as image:
        return encoded(image.convert("RGB").resize((width, height)), "JPEG", quality=92, **options)


@pytest.fixture(scope="module")
def ask(client: httpx.Client) -> dict[str, Any]:
    """A request that the model answers with a path which is then refined: the first such sample."""
    for sample in json.loads((SAMPLES / "samples.json").read_text()):
        body = {"object": sample["noun"], "image_url": base64_text(sized(SAMPLES / sample["file"]))}
        if set(answer(client, body | {"return_base64": True})) > MASKS:
            return body
    pytest.fail("the server gives both masks for none of the samples")


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the masks that the server encodes from now on."""
    shapes: list[tuple[int, ...]] = []
    encode = png._encode_mask_png_base64

    def counted(mask: np.ndarray) -> str:
        shapes.append(mask.shape)
        return encode(mask)

    monkeypatch.setattr(png, "_encode_mask_png_base64", counted)
    return shapes


def answer(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The plain answer."""
    response = client.post("/v1/segment", json=body)
    assert response.status_code == 200, response.text
    payload = response.json()
    assert isinstance(payload, dict)
    return payload


def events(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of the streamed answer, in the contract's order."""
    response = client.post("/v1/segment", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    found = sse_events(response.text)
    kinds = [event["type"] for event in found]
    assert kinds == ["bbox", *["path_delta"] * (len(kinds) - 2), "final"]
    return found


def final(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """What the last event of the streamed answer has in common with the plain one."""
    last = events(client, body)[-1]
    return {key: last[key] for key in last if key not in ("type", "chunk", "completed")}


def outcome(payload: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is of one request only: its name and its times."""
    counts = {key: n for key, n in payload["metrics"].items() if key.endswith("_tokens")}
    return {**payload, "request_id": None, "metrics": counts}


def picture_of(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.array(image)


# Not asked for


@pytest.mark.parametrize("flag", [{}, {"return_base64": False}], ids=["absent", "false"])
def test_a_plain_answer_holds_no_mask_and_none_was_encoded(client, ask, encodings, flag):
    payload = answer(client, ask | flag)
    assert set(payload) == ANSWER
    assert payload["path"] and payload["bbox"]
    assert (HEIGHT, WIDTH) not in encodings


@pytest.mark.parametrize("flag", [{}, {"return_base64": False}], ids=["absent", "false"])
def test_a_stream_holds_no_mask_and_none_was_encoded(client, ask, encodings, flag):
    found = events(client, ask | flag)
    assert not any(MASKS & set(event) for event in found)
    assert set(found[-1]) == ANSWER | {"type", "chunk", "completed"}
    assert (HEIGHT, WIDTH) not in encodings


@pytest.mark.parametrize("stream", [False, True])
def test_masks_without_an_image_are_a_400_and_nothing_runs(client, ask, encodings, stream):
    body = {"object": ask["object"], "return_base64": True, "stream": stream}
    response = client.post("/v1/segment", json=body)
    assert (response.status_code, response.json()["field"]) == (400, "return_base64")
    assert response.headers["content-type"] == "application/json"
    assert encodings == []


@pytest.mark.parametrize("value", ["true", 1, 0, None])
def test_a_flag_that_is_no_boolean_is_a_400(client, ask, value):
    response = client.post("/v1/segment", json=ask | {"return_base64": value})
    assert (response.status_code, response.json()["field"]) == (400, "return_base64")


# Asked for


def test_a_plain_answer_holds_both_masks_each_encoded_once(client, ask, encodings):
    assert set(answer(client, ask | {"return_base64": True})) == ANSWER | MASKS
    assert encodings.count((HEIGHT, WIDTH)) == 2


def test_a_stream_holds_the_masks_in_its_last_event_only(client, ask, encodings):
    *before, last = events(client, ask | {"return_base64": True})
    assert set(last) > MASKS
    for event in before:
        keys = {"bbox"} if event["type"] == "bbox" else {"chunk", "completed", "token_index"}
        assert set(event) == keys | {"type"}
    assert encodings.count((HEIGHT, WIDTH)) == 2


@pytest.mark.parametrize("reply", [answer, final])
def test_masks_are_grey_pictures_of_the_images_size(client, ask, reply):
    payload = reply(client, ask | {"return_base64": True})
    for key in MASKS:
        mask = picture_of(payload[key])
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.any() and set(np.unique(mask).tolist()) <= {0, 255}, key


def test_masks_of_a_turned_photograph_have_the_size_it_is_seen_at(client, ask):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(io.BytesIO(base64.b64decode(ask["image_url"]))) as image:
        lying = image.transpose(Image.Transpose.ROTATE_90)
    assert lying.size == (HEIGHT, WIDTH)
    turned = encoded(lying, "PNG", exif=exif.tobytes())
    upright = encoded(lying.transpose(Image.Transpose.ROTATE_270), "PNG")
    first, second = (
        answer(client, ask | {"image_url": base64_text(content), "return_base64": True})
        for content in (turned, upright)
    )
    assert picture_of(first["coarse_mask_base64"]).shape == (HEIGHT, WIDTH)
    assert outcome(first) == outcome(second)


def test_the_flag_changes_nothing_but_the_masks(client, ask):
    without = answer(client, ask)
    asked = answer(client, ask | {"return_base64": True})
    assert outcome(without) == {k: v for k, v in outcome(asked).items() if k not in MASKS}


@pytest.mark.parametrize("masks", [False, True])
def test_plain_and_streamed_answers_agree(client, ask, masks):
    body = ask | {"return_base64": masks}
    assert outcome(answer(client, body)) == outcome(final(client, body))


def test_the_coarse_mask_is_the_streamed_path_in_the_streamed_box(client, ask):
    found = events(client, ask | {"return_base64": True})
    path = "".join(event["chunk"] for event in found if event["type"] == "path_delta")
    drawn = rasterize_relative(path, found[0]["bbox"], WIDTH, HEIGHT)
    assert np.array_equal(drawn != 0, decode_mask(found[-1]["coarse_mask_base64"]))


def test_the_box_is_that_of_the_refined_mask(client, ask):
    payload = answer(client, ask | {"return_base64": True})
    box = mask_box(decode_mask(payload["refined_mask_base64"]))
    assert box is not None
    x0, y0, x1, y1 = box
    expected = {
        "x_min": x0 / WIDTH,
        "y_min": y0 / HEIGHT,
        "x_max": x1 / WIDTH,
        "y_max": y1 / HEIGHT,
    }
    assert payload["bbox"] == pytest.approx(expected)


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_a_path_that_was_cut_off_has_no_masks_though_they_were_asked_for(
    client, ask, encodings, max_tokens
):
    body = ask | {"return_base64": True, "settings": {"max_tokens": max_tokens}}
    payload = answer(client, body)
    assert payload["finish_reason"] == "length"
    assert payload["path"] == "" and "cut off" in payload["parse_error"]
    assert not MASKS & set(payload)
    assert (payload["bbox"] is not None) == (max_tokens >= 3)
    assert (HEIGHT, WIDTH) not in encodings


def test_neighbours_in_a_batch_get_their_own_answers(client, ask):
    bodies = [
        ask | {"return_base64": masks, "stream": stream}
        for masks in (False, True)
        for stream in (False, True)
    ]
    alone = outcome(answer(client, ask | {"return_base64": True}))

    def send(body: dict[str, Any]) -> dict[str, Any]:
        return outcome((final if body["stream"] else answer)(client, body))

    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(send, bodies))
    for body, payload in zip(bodies, found, strict=True):
        expected = {k: v for k, v in alone.items() if body["return_base64"] or k not in MASKS}
        assert payload == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_is_decoded_once_for_model_and_refiner(client, ask, monkeypatch, stream):
    from kestrel import image, pictures

    decoded: list[int] = []
    decode = image.decode

    def counted(content: Any, *rest: Any, **smaller: int) -> np.ndarray:
        decoded.append(len(content))
        return decode(content, *rest, **smaller)

    monkeypatch.setattr(image, "decode", counted)
    monkeypatch.setattr(pictures, "decode_image", counted)
    with Image.open(io.BytesIO(base64.b64decode(ask["image_url"]))) as opened:
        # One that the engine does not remember.
        new = encoded(opened, "JPEG", quality=96 + stream)
    body = ask | {"image_url": base64_text(new), "return_base64": True, "stream": stream}
    assert (final if stream else answer)(client, body)["path"]
    assert decoded.count(len(new)) == 1


# The published schema


@pytest.mark.parametrize("masks", [False, True])
def test_answers_are_what_the_published_schema_says(client, ask, masks):
    document = client.get("/openapi.json").json()

    def check(name: str, payload: dict[str, Any]) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(payload, schema, cls=jsonschema.Draft202012Validator)

    body = ask | {"return_base64": masks}
    check("SegmentResponse", answer(client, body))
    for event in events(client, body):
        check("SegmentEvent", event)
