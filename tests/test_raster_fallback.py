"""A machine where Skia or resvg does not load: what paints then, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kestrel.config import ConfigError, RefinerConfig
from kestrel.seg_refiner import SegmentRefiner, bitmap_to_path
from kestrel.seg_refiner import raster as raster_module
from kestrel.seg_refiner.raster import RasterizerMissing, load_rasterizer, rasterize_relative

BOX = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.75, "y_max": 0.75}
SQUARE = "M0 0H1V1H0Z"
SYSTEM_PACKAGES = "apt-get install libgl1 libegl1 libexpat1"


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    raster_module._auto.cache_clear()
    yield
    raster_module._auto.cache_clear()


@pytest.fixture
def no_skia(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the import system does for a module that is not there.
    monkeypatch.setitem(sys.modules, "skia", None)


@pytest.fixture
def no_resvg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg", None)


@pytest.fixture
def unlinked_skia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skia's wheel on a system without OpenGL: it is found and does not load."""
    (tmp_path / "skia.py").write_text(
        'raise ImportError("libGL.so.1: cannot open shared object file")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "skia", raising=False)


def picture() -> np.ndarray:
    pixels = np.full((48, 64, 3), 40, np.uint8)
    pixels[12:36, 16:48] = 220
    return pixels


def test_auto_is_the_default() -> None:
    assert RefinerConfig().rasterizer == "auto"


def test_auto_paints_with_resvg_where_skia_is_missing(no_skia: None) -> None:
    mask = rasterize_relative(SQUARE, BOX, 64, 48)
    assert mask[12:36, 16:48].all() and mask.sum() == 24 * 32


def test_auto_refines_and_traces_without_skia(no_skia: None) -> None:
    refiner = SegmentRefiner(RefinerConfig())
    refiner.self_check()
    result = refiner.refine_with_bitmaps(picture(), SQUARE, BOX, return_base64=True)
    assert result.reason == "refined"
    assert result.refined_svg_path and result.coarse_mask_base64 and result.refined_mask_base64


def test_the_slow_rasteriser_is_announced_once_with_the_command(
    no_skia: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        rasterize_relative(SQUARE, BOX, 64, 48)
    said = [r.getMessage() for r in caplog.records if "rasterising with resvg" in r.getMessage()]
    assert len(said) == 1 and "pip install skia-python" in said[0]


def test_the_announcement_reaches_stderr_without_any_logging_set_up() -> None:
    script = (
        "import sys; sys.modules['skia'] = None\n"
        "from kestrel.seg_refiner.raster import rasterize_relative\n"
        f"for _ in range(2): rasterize_relative({SQUARE!r}, {BOX!r}, 8, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip install skia-python") == 1
    assert done.stderr.count("\n") == 1


def test_skia_that_does_not_link_names_the_system_packages(unlinked_skia: None) -> None:
    with pytest.raises(RasterizerMissing, match=SYSTEM_PACKAGES) as caught:
        load_rasterizer("skia")
    assert "libGL.so.1" in str(caught.value)
    assert rasterize_relative(SQUARE, BOX, 64, 48).sum() == 24 * 32


@pytest.mark.parametrize("missing", ["no_skia", "unlinked_skia"])
def test_skia_asked_for_by_name_is_never_replaced(
    missing: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(missing)
    command = "pip install skia-python" if missing == "no_skia" else SYSTEM_PACKAGES
    with pytest.raises(ConfigError, match=command):
        SegmentRefiner(RefinerConfig(rasterizer="skia"))
    with pytest.raises(RasterizerMissing, match=command):
        rasterize_relative(SQUARE, BOX, 64, 48, "skia")


def test_resvg_asked_for_by_name_does_without_skia_and_says_nothing(
    no_skia: None, caplog: pytest.LogCaptureFixture
) -> None:
    refiner = SegmentRefiner(RefinerConfig(rasterizer="resvg"))
    assert refiner.refine_with_bitmaps(picture(), SQUARE, BOX).reason == "refined"
    assert "skia" not in caplog.text


def test_resvg_asked_for_by_name_and_missing_names_its_package(no_resvg: None) -> None:
    with pytest.raises(ConfigError, match='pip install "resvg'):
        SegmentRefiner(RefinerConfig(rasterizer="resvg"))


def test_no_rasteriser_at_all_leaves_the_models_path_and_names_both_ways(
    no_skia: None, no_resvg: None, caplog: pytest.LogCaptureFixture
) -> None:
    refiner = SegmentRefiner(RefinerConfig())
    result = refiner.refine_with_bitmaps(picture(), SQUARE, BOX, return_base64=True)
    assert result.reason == "unavailable"
    assert result.refined_svg_path is result.coarse_mask_base64 is None
    assert "pip install skia-python" in caplog.text and 'pip install "resvg' in caplog.text
    with pytest.raises(RuntimeError, match=r"skia-python.*resvg"):
        refiner.self_check()


def test_a_trace_is_judged_by_the_rasteriser_of_the_configuration(no_skia: None) -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 1
    assert bitmap_to_path(mask, rasterizer="resvg") is not None
    with pytest.raises(RasterizerMissing):
        bitmap_to_path(mask, rasterizer="skia")


@pytest.mark.parametrize("name", ["Skia", "cairo", "", None, 1])
def test_unknown_rasteriser_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="rasterizer"):
        RefinerConfig(rasterizer=name)  # type: ignore[arg-type]
