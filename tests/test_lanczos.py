"""Resizing of pictures: the same bits as Pillow's two passes."""

import numpy as np
import pytest
from PIL import Image

from kestrel.ops import lanczos

SIDES = ((126, 126), (378, 378), (266, 742))


@pytest.fixture(scope="module")
def compiled():
    passes = lanczos._passes()
    assert passes is not None
    return passes


def noise(*shape: int) -> np.ndarray:
    # Noise over the whole range: sums leave 0..255 on both sides.
    return np.random.default_rng(shape).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize("to", SIDES)
@pytest.mark.parametrize(
    "size", [(1, 1), (3, 500), (500, 3), (126, 126), (126, 300), (300, 126), (378, 377), (719, 963)]
)
def test_pixels_are_pillow_s(compiled, size, to) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(
        lanczos.resized(image, *to), lanczos.resized_by_pillow(image, *to)
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_sizes(compiled, seed) -> None:
    rng = np.random.default_rng(seed)
    rows, columns, height, width = np.exp(rng.uniform(0, np.log(700), 4)).astype(int)
    image = noise(rows, columns)
    np.testing.assert_array_equal(
        lanczos.resized(image, height, width), lanczos.resized_by_pillow(image, height, width)
    )


def test_bands_and_stretches_do_not_show(compiled) -> None:
    image = noise(2 * lanczos.BAND + 1, 2 * lanczos.STRETCH // 3 + 5)
    np.testing.assert_array_equal(
        lanczos.resized(image, 90, 1000), lanczos.resized_by_pillow(image, 90, 1000)
    )


@pytest.mark.parametrize("size", [(40_000, 2), (3, 40_000), (1, 1), (700, 900)])
def test_few_output_pixels_at_once_are_the_same(compiled, monkeypatch, size) -> None:
    image = noise(*size)
    whole = lanczos.resized(image, 126, 266)
    by_pillow = lanczos.resized_by_pillow(image, 126, 266)
    monkeypatch.setattr(lanczos, "WEIGHTS", 5000)
    assert len(lanczos._spans(40_000, 126)) > 50
    np.testing.assert_array_equal(lanczos.resized(image, 126, 266), whole)
    # Pillow takes the limits of a part in 32 bits.
    parts = lanczos.resized_by_pillow(image, 126, 266).astype(int)
    assert abs(parts - by_pillow).max() <= 1
    np.testing.assert_array_equal(whole, by_pillow)


def test_a_picture_too_tall_to_be_widened_first_is_shrunk_first(compiled) -> None:
    rows = lanczos.WIDENED // 742 + 1
    image = np.repeat(noise(rows // 10 + 1, 9), 10, 0)[:rows]
    shrunk = Image.fromarray(image).resize((9, 126), Image.Resampling.LANCZOS)
    expected = shrunk.resize((742, 126), Image.Resampling.LANCZOS)
    for resize in (lanczos.resized, lanczos.resized_by_pillow):
        np.testing.assert_array_equal(resize(image, 126, 742), np.array(expected))


def test_a_picture_that_can_be_widened_first_is(compiled) -> None:
    image = noise(lanczos.WIDENED // 742, 9)
    widened = Image.fromarray(image).resize((742, len(image)), Image.Resampling.LANCZOS)
    expected = widened.resize((742, 126), Image.Resampling.LANCZOS)
    for resize in (lanczos.resized, lanczos.resized_by_pillow):
        np.testing.assert_array_equal(resize(image, 126, 742), np.array(expected))


def test_a_wide_picture_is_what_one_call_of_pillow_gives(compiled) -> None:
    image = noise(120, 400)
    once = Image.fromarray(image).resize((126, 126), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(lanczos.resized(image, 126, 126), np.array(once))


def test_views_are_read_and_nothing_is_written_into_the_picture(compiled) -> None:
    image = noise(200, 300)
    view = image[::-1, 10:-10]
    kept = image.copy()
    result = lanczos.resized(view, 200, 280)
    np.testing.assert_array_equal(result, view)
    result[:] = 0
    lanczos.resized(view, 50, 60)
    np.testing.assert_array_equal(image, kept)


def test_without_numba_pillow_does_it(monkeypatch) -> None:
    monkeypatch.setattr(lanczos, "_passes", lambda: None)
    image = noise(60, 80)
    result = lanczos.resized(image, 30, 40)
    np.testing.assert_array_equal(result, lanczos.resized_by_pillow(image, 30, 40))
    assert result.flags.writeable
