"""The command line: files that are not written, mistakes that end in a traceback."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from serving import encoded, picture, until

from kestrel import __version__
from kestrel.api import ModelMetrics, ModelResult
from kestrel.cli import main
from kestrel.config import SHIPPED_MODELS, RuntimeConfig
from kestrel.overlay import LARGEST_SIDE, overlay
from kestrel.seg_refiner import raster
from kestrel.server.connection import protocol
from kestrel.server.sending import GRACE_S

SAMPLES = SHIPPED_MODELS / "nano" / "samples"
WIDTH, HEIGHT = 199, 149
ORIENTATION = 0x0112
WRITTEN = {"response.json", "overlay.png"}


def run(*arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command: list[Any] = [sys.executable, "-m", "kestrel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    """One line on stderr that says what is wrong, exit status 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("kestrel: ") and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A photograph that lies on its side, as cameras write them, and what is on it."""
    first = json.loads((SAMPLES / "samples.json").read_text())[0]
    with Image.open(SAMPLES / first["file"]) as image:
        upright = image.convert("RGB").resize((WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    file = tmp_path_factory.mktemp("photos") / "photo.jpg"
    file.write_bytes(encoded(lying, "JPEG", quality=95, exif=exif.tobytes()))
    return file, first["noun"]


@pytest.fixture(scope="module")
def segmented(
    photo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A finished ``segment`` and the folder that it wrote, which was not there before."""
    folder = tmp_path_factory.mktemp("answers") / "deep" / "out"
    file, noun = photo
    return run("segment", file, noun, "-o", folder), folder


# What is written


def test_segment_ends_well_and_says_what_each_stage_took(segmented) -> None:
    done, _ = segmented
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    stages = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    assert all(unit == "ms" and float(time) >= 0 for _, time, unit in stages)
    names = [name for name, _, _ in stages]
    assert names[:3] == ["load", "prefill", "model decode"] and names[-1] == "write"


def test_segment_writes_every_mask_that_the_answer_holds_and_no_other(segmented) -> None:
    done, folder = segmented
    answer = json.loads((folder / "response.json").read_text())
    kinds = {kind for kind in ("coarse", "refined") if f"{kind}_mask_base64" in answer}
    assert {file.name for file in folder.iterdir()} == WRITTEN | {f"{k}.png" for k in kinds}
    for kind in kinds:
        content = (folder / f"{kind}.png").read_bytes()
        assert content == base64.b64decode(answer[f"{kind}_mask_base64"])
        with Image.open(folder / f"{kind}.png") as mask:
            # The size at which the photograph is seen, not that of its rows and columns.
            assert (mask.size, mask.mode) == ((WIDTH, HEIGHT), "L")
    for kind in {"coarse", "refined"} - kinds:
        assert f"no {kind} mask: " in done.stderr


def test_the_written_answer_is_that_of_the_contract(segmented) -> None:
    _, folder = segmented
    answer = json.loads((folder / "response.json").read_text())
    assert set(answer) >= {"request_id", "finish_reason", "path", "bbox", "metrics"}
    assert isinstance(answer["path"], str)
    assert answer["metrics"]["output_tokens"] >= 1


def test_the_overlay_shows_three_pictures_side_by_side(segmented) -> None:
    _, folder = segmented
    with Image.open(folder / "overlay.png") as image:
        assert image.mode == "RGB"
        assert image.width > 3 * WIDTH and image.height > HEIGHT
        # The first panel is the photograph as it is seen, below its caption.
        panel = np.array(image)[-HEIGHT:, :WIDTH].astype(int)
    with Image.open(SAMPLES / json.loads((SAMPLES / "samples.json").read_text())[0]["file"]) as it:
        seen = np.array(it.convert("RGB").resize((WIDTH, HEIGHT))).astype(int)
    assert np.abs(panel - seen).mean() < 12


def test_masks_of_an_earlier_run_do_not_outlive_one_without_masks(
    photo, tmp_path, monkeypatch, capsys
) -> None:
    def nothing_paints(name: str = "auto") -> Any:
        raise raster.RasterizerMissing("nothing here paints")

    for kind in ("coarse", "refined"):
        (tmp_path / f"{kind}.png").write_bytes(b"of yesterday")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(raster, "load_rasterizer", nothing_paints)
    file, noun = photo
    assert main(["segment", str(file), noun, "-o", str(tmp_path), "--device", "cpu"]) == 0
    assert {found.name for found in tmp_path.iterdir()} == WRITTEN | {"notes.txt"}
    said = capsys.readouterr().err
    assert "no coarse mask: " in said and "no refined mask: " in said


def test_a_noun_that_is_not_in_the_picture_is_said_in_words(
    png_file, tmp_path, monkeypatch, capsys
) -> None:
    async def nothing(*_: Any) -> tuple[ModelResult, None, float]:
        return ModelResult("id", "stop", "dog", "", None, ModelMetrics()), None, 0.0

    monkeypatch.setattr("kestrel.cli._answer", nothing)
    assert main(["segment", str(png_file), "dog", "-o", str(tmp_path)]) == 0
    assert "the model finds no 'dog' in the picture" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_line(photo, tmp_path, capsys) -> None:
    file, noun = photo
    (tmp_path / "overlay.png").mkdir()
    assert main(["segment", str(file), noun, "-o", str(tmp_path), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("kestrel: ") and "overlay.png" in said
    assert json.loads((tmp_path / "response.json").read_text())["path"] is not None


def test_a_picture_too_wide_for_three_in_a_png_still_gets_its_answer(photo, tmp_path) -> None:
    wide = tmp_path / "wide.png"
    wide.write_bytes(encoded(Image.new("RGB", (350_000, 2)), "PNG"))
    assert main(["segment", str(wide), photo[1], "-o", str(tmp_path), "--device", "cpu"]) == 0
    assert "path" in json.loads((tmp_path / "response.json").read_text())
    with Image.open(tmp_path / "overlay.png") as image:
        assert 3 * 5000 < image.width <= LARGEST_SIDE


@pytest.mark.parametrize(
    ("size", "at_most"),
    [((5400, 40), None), ((6000, 4000), LARGEST_SIDE), ((40, 20_000), LARGEST_SIDE)],
)
def test_an_overlay_is_shrunk_only_where_a_side_would_be_too_long(size, at_most) -> None:
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[height // 2] = mask[:, width // 2] = True  # lines that shrinking might lose
    drawn = overlay(np.full((height, width, 3), 255, np.uint8), mask, None)
    if at_most is None:
        assert drawn.shape[1] >= 3 * width and drawn.shape[0] > height
    else:
        assert 0.95 * at_most < max(drawn.shape) <= at_most
    panels = np.array_split(drawn[80:], 3, axis=1)
    assert [bool((panel < 200).any()) for panel in panels] == [False, True, False]


def test_a_mask_of_another_size_is_refused_also_where_the_picture_is_shrunk() -> None:
    with pytest.raises(ValueError, match="mask is"):
        overlay(np.zeros((10, 9000, 3), np.uint8), np.zeros((20, 18_000), bool), None)


# Mistakes


def test_a_picture_that_is_not_there_is_named(tmp_path) -> None:
    refused(run("segment", tmp_path / "no.jpg", "dog", "-o", tmp_path / "out"), "no.jpg")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def png_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "disc.png"
    file.write_bytes(picture())
    return file


# Each of these is refused before the model is loaded; none needs a process of its own.
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{png}", ""], "object must not be empty"),
        (["{png}", " \t"], "object must not be empty"),
        (["{png}", "x" * 257], "at most 256 characters"),
        (["{png}", "a\udcff"], "surrogates"),
        (["{folder}", "dog"], "cannot be read"),
        (["{text}", "dog"], "not a JPEG, PNG or WebP image"),
        (["{empty}", "dog"], "not a JPEG, PNG or WebP image"),
        (["{png}", "dog", "--spatial-ref", "here"], "--spatial-ref 'here'"),
        (["{png}", "dog", "--spatial-ref", "0.5"], "[x, y]"),
        (["{png}", "dog", "--spatial-ref", "0.5,1.5"], "0..1"),
        (
            ["{png}", "dog", "--spatial-ref", "-.3,.4"],
            "spatial_refs[0][0] must be a number in 0..1",
        ),
        (["{png}", "dog", "--spatial-ref=-.3,.4"], "spatial_refs[0][0] must be a number in 0..1"),
        (
            ["--spatial-ref", ".1,.2", "--spatial-ref", "-1,0,1,1", "{png}", "dog"],
            "refs[1][0] must",
        ),
        (["{png}", "dog", "--spatial-ref", "nan,0.5"], "0..1"),
        (["{png}", "dog", "--spatial-ref", "0.9,0.1,0.1,0.9"], "ordered"),
        (["{png}", "dog", *["--spatial-ref", "0.5,0.5"] * 17], "at most 16"),
        (["{png}", "dog", "--refiner", "magic"], "boundary"),
        (["{png}", "dog", "--refiner", ".x:y"], "'.x:y' is not there"),
        (["{png}", "dog", "--refiner", "no_refiner:build"], "SyntaxError"),
        (["{png}", "dog", "--refiner", "os:getcwd"], "refiner 'os:getcwd'"),
        (["{png}", "dog", "--refiner", "builtins:repr"], "refiner 'builtins:repr'"),
        (["{png}", "dog", "--device", "abacus"], "device must be"),
        (["{png}", "dog", "--model-path", "{folder}/no-model"], "no-model"),
        (["{png}", "dog", "--model-path", "{folder}"], "{folder}"),
        (["{png}", "dog", "--model-path", "m" * 300], "m cannot be read: File name too long"),
        (["{png}", "dog", "-o", "{png}"], "cannot be made"),
        (["{png}", "dog", "-o", "{png}/out"], "cannot be made"),
    ],
)
def test_a_mistake_is_one_line_and_the_status_of_bad_input(
    png_file, tmp_path, monkeypatch, capsys, arguments, said
) -> None:
    (tmp_path / "no_refiner.py").write_text("def build(config:")
    monkeypatch.syspath_prepend(tmp_path)
    places = {"png": png_file, "folder": tmp_path / "in", "text": tmp_path / "notes.txt",
              "empty": tmp_path / "empty.png"}  # fmt: skip
    places["folder"].mkdir()
    places["text"].write_text("no picture")
    places["empty"].write_bytes(b"")
    out = tmp_path / "out"
    filled = [argument.format(**places) for argument in arguments]
    assert main(["segment", "-o", str(out), *filled]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert heard.err.startswith("kestrel: ") and heard.err.count("\n") == 1, heard.err
    assert said.format(**places) in heard.err
    assert not out.exists() or not any(out.iterdir())


def test_an_option_is_taken_for_the_point_that_is_missing(png_file, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["segment", str(png_file), "dog", "--spatial-ref", "-o", str(tmp_path)])
    assert "--spatial-ref: expected one argument" in capsys.readouterr().err


def test_a_folder_without_permission_is_refused_before_the_model_is_loaded(
    png_file, tmp_path, monkeypatch, capsys
) -> None:
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    monkeypatch.setattr("kestrel.engine.InferenceEngine.create", None)
    assert main(["segment", str(png_file), "dog", "-o", str(tmp_path)]) == 2
    assert f"{tmp_path} (--output) is not yours to write" in capsys.readouterr().err


def test_a_picture_that_breaks_in_decoding_is_one_line(tmp_path, capsys) -> None:
    whole = picture(300, 200)
    cut, out = tmp_path / "cut.png", tmp_path / "out"
    cut.write_bytes(whole[: len(whole) // 2])
    assert main(["segment", str(cut), "dog", "-o", str(out), "--device", "cpu"]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert heard.err.startswith("kestrel: ") and heard.err.count("\n") == 1, heard.err
    assert f"{cut}: " in heard.err and "decoded" in heard.err


def test_a_file_name_that_is_no_text_is_still_a_message(tmp_path) -> None:
    refused(run("segment", os.fsencode(tmp_path) + b"/\xff.png", "dog", "-o", tmp_path), "png")


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "a.png", "dog"], ["paint"],
                                       ["serve", "--port", "many"]])  # fmt: skip
def test_a_command_that_is_not_whole_shows_the_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: kestrel")


def test_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# serve


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def port_of(listener: socket.socket) -> int:
    port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_serve_refuses_a_port_that_is_none(port, capsys) -> None:
    assert main(["serve", f"--port={port}"]) == 2
    assert "0..65535" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["", "a..b", "local host"])
def test_serve_takes_a_host_that_is_none(host, monkeypatch, capsys) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: pytest.fail("it is served"))
    assert main(["serve", f"--host={host}"]) == 2
    assert f"--host must be a name or an address, not {host!r}" in capsys.readouterr().err


def test_serve_ends_although_a_client_does_not_read(monkeypatch) -> None:
    made: list[uvicorn.Config] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: made.append(server.config))
    main(["serve", "--port", "0"])
    (config,) = made
    # Whoever came before the end still has the longest deadline and the grace of an answer.
    assert config.timeout_graceful_shutdown == RuntimeConfig().request_timeout_s + GRACE_S
    config.load()
    assert config.http_protocol_class is protocol


def test_serve_on_a_port_that_is_taken_ends_without_a_traceback(listener) -> None:
    done = run("serve", "--port", str(port_of(listener)))
    assert done.returncode not in (0, 2)
    assert "Traceback" not in done.stderr
    assert "address already in use" in done.stderr


def test_serve_with_a_broken_checkpoint_ends_and_says_so(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    done = run("serve", "--port", "0", "--model-path", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kestrel: the model cannot be loaded: ")


def test_serve_serves_until_it_is_told_to_end(listener) -> None:
    port = port_of(listener)
    listener.close()
    process = subprocess.Popen(
        [sys.executable, "-m", "kestrel", "serve", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def ready() -> bool:
        assert process.poll() is None, "the server ended by itself"
        try:
            return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=30).status_code == 200
        except httpx.ConnectError:
            return False

    try:
        until(ready, 150)
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "nano"
        # A load balancer keeps a connection for a minute, and would send a request into its end.
        kept = http.client.HTTPConnection("127.0.0.1", port)
        kept.request("GET", "/v1/models")
        kept.getresponse().read()
        kept.sock.settimeout(7)
        with pytest.raises(TimeoutError):
            assert kept.sock.recv(1), "an idle connection was closed"
        kept.close()
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in said
    assert process.returncode in (0, -15)
