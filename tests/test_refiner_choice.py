"""`settings.refiner`: what a request may choose, and what a deployment loads."""

from __future__ import annotations

import gc
import logging
import weakref

import numpy as np
import pytest

from kestrel.api import InvalidRequest, parse_segment_json, validate_segment
from kestrel.config import ConfigError, Limits, ModelSource, RefinerConfig, RuntimeConfig
from kestrel.openapi import openapi_document
from kestrel.seg_refiner import BACKENDS, SegmentRefiner

BOX = {"x_min": 0.2, "y_min": 0.2, "x_max": 0.8, "y_max": 0.8}
SQUARE = "M0 0H1V1H0Z"


def parse(settings: str, refiners=("guided", "none")):
    body = b'{"object": "dog", "settings": ' + settings.encode() + b"}"
    return parse_segment_json(body, limits=Limits(), served_model="nano", refiners=refiners)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [("{}", None), ('{"refiner": null}', None), ('{"refiner": "none"}', "none")],
)
def test_a_request_chooses_among_those_loaded(settings, chosen):
    assert parse(settings).settings.refiner == chosen


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"refiner": "hq-sam"}', r"'hq-sam' is not loaded here; loaded are guided, none"),
        ('{"refiner": ""}', "not loaded"),
        ('{"refiner": "Guided"}', "not loaded"),
        ('{"refiner": 1}', "must be a string"),
        ('{"refiner": ["none"]}', "must be a string"),
    ],
)
def test_another_is_a_400_that_names_the_field_and_what_is_loaded(settings, said):
    with pytest.raises(InvalidRequest, match=said) as caught:
        parse(settings)
    assert caught.value.status == 400
    assert caught.value.field == "settings.refiner"


def test_without_refinement_none_can_be_chosen():
    with pytest.raises(InvalidRequest, match="no refiner is loaded"):
        validate_segment(object="dog", settings={"refiner": "none"}, refiners=())


def test_a_client_leaves_the_names_to_its_server():
    request = validate_segment(object="dog", settings={"refiner": "theirs"})
    assert request.settings.refiner == "theirs"


def test_the_document_lists_what_is_loaded():
    config = RuntimeConfig(refiner=RefinerConfig(refiner="none", selectable=("guided",)))
    settings = openapi_document(config)["components"]["schemas"]["Settings"]
    assert settings["properties"]["refiner"]["enum"] == ["none", "guided", None]


@pytest.fixture
def inverted(monkeypatch) -> list[RefinerConfig]:
    """Registers a backend that gives the rest of the picture; the configurations it was built of.

    This is all that a backend takes: see ``kestrel.seg_refiner.backends``.
    """
    built: list[RefinerConfig] = []

    def build(config: RefinerConfig):
        built.append(config)
        return lambda image, mask: 1 - mask

    monkeypatch.setitem(BACKENDS, "inverted", build)
    return built


def test_the_chosen_backend_is_the_one_that_runs(inverted):
    config = RefinerConfig(refiner="none", selectable=["inverted"], min_agreement=0)
    refiner = SegmentRefiner(config)
    assert inverted == [config]
    image = np.zeros((50, 50, 3), np.uint8)
    boxes = [
        refiner.refine_with_bitmaps(image, SQUARE, BOX, refiner=name).refined_bbox
        for name in (None, "none", "inverted")
    ]
    assert boxes[0] == boxes[1] == BOX
    assert boxes[2] == {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}
    assert refiner.outcomes["refined"] == 3


def test_what_is_not_loaded_is_not_run_even_when_registered(inverted):
    refiner = SegmentRefiner(RefinerConfig(refiner="none", selectable=()))
    with pytest.raises(ValueError, match="'inverted' is not loaded; loaded are none"):
        refiner.refine_with_bitmaps(np.zeros((9, 9, 3), np.uint8), SQUARE, BOX, refiner="inverted")
    assert inverted == []


def test_every_loaded_backend_is_checked_at_start(monkeypatch):
    def broken(image, mask):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(BACKENDS, "broken", lambda config: broken)
    refiner = SegmentRefiner(RefinerConfig(selectable=("none", "broken")))
    said = r"the refiner broken does not work: refine_failed \(refine: no such kernel\)"
    with pytest.raises(RuntimeError, match=said):
        refiner.self_check()
    assert not refiner.outcomes


@pytest.mark.parametrize("reason", ["rejected", "refine_failed", "no_path"])
def test_a_picture_that_was_not_refined_is_freed_at_once(reason, monkeypatch, caplog):
    def behave(image, mask):
        if reason == "refine_failed":
            raise RuntimeError("no such kernel")
        return 1 - mask

    monkeypatch.setitem(BACKENDS, "odd", lambda config: behave)
    # What is logged is kept for the test's report.
    caplog.set_level(logging.CRITICAL, "kestrel.seg_refiner.refiner")
    refiner = SegmentRefiner(RefinerConfig(refiner="odd"))
    image = np.zeros((50, 50, 3), np.uint8)
    freed = weakref.ref(image)
    path = "M0 0H" if reason == "no_path" else SQUARE
    gc.disable()
    try:
        assert refiner.refine_with_bitmaps(image, path, BOX).reason == reason
        del image
        assert freed() is None, "it waits for the garbage collector"
    finally:
        gc.enable()


def test_a_backend_without_its_libraries_gives_no_mask_and_one_that_fails_the_coarse_one(
    monkeypatch, caplog
):
    def missing(config):
        raise ImportError("no module named cv2")

    def late(image, mask):
        raise ImportError("a plugin is missing")

    monkeypatch.setitem(BACKENDS, "missing", missing)
    monkeypatch.setitem(BACKENDS, "late", lambda config: late)
    refiner = SegmentRefiner(RefinerConfig(selectable=("missing", "late")))
    image = np.zeros((50, 50, 3), np.uint8)
    masks = {}
    for name in ("missing", "late"):
        result = refiner.refine_with_bitmaps(image, SQUARE, BOX, return_base64=True, refiner=name)
        assert result.refined_svg_path is result.refined_mask_base64 is None
        masks[result.reason] = result.coarse_mask_base64
    assert set(masks) == {"unavailable", "refine_failed"}
    assert masks["unavailable"] is None and masks["refine_failed"] is not None
    assert "no module named cv2" in caplog.text and "a plugin is missing" in caplog.text


@pytest.mark.parametrize("key", ["refiner", "selectable"])
def test_an_unknown_backend_is_refused_when_the_refiner_is_built(key):
    value = "magic" if key == "refiner" else ("none", "magic")
    with pytest.raises(ConfigError, match=r"'magic' is not known; known refiners are .*guided"):
        SegmentRefiner(RefinerConfig(**{key: value}))


def inside(config: RefinerConfig):
    return lambda image, mask: mask


def test_a_backend_of_ones_own_is_named_by_where_it_is():
    place = f"{__name__}:inside"
    refiner = SegmentRefiner(RefinerConfig(refiner=place))
    image = np.zeros((50, 50, 3), np.uint8)
    assert refiner.refine_with_bitmaps(image, SQUARE, BOX).reason == "refined"


def test_a_request_names_no_place_that_is_not_loaded():
    with pytest.raises(InvalidRequest, match="not loaded"):
        parse('{"refiner": "os:system"}')


@pytest.mark.parametrize(
    "place", ["no_such_module:build", "math:no_such_function", "math:pi", ":build", "m:", ".x:y"]
)
def test_a_place_without_a_backend_is_refused_when_the_refiner_is_built(place):
    with pytest.raises(ConfigError, match="is not there"):
        SegmentRefiner(RefinerConfig(selectable=(place,)))


def fails(config: RefinerConfig):
    raise KeyError("no such weight")


def builds_nothing(config: RefinerConfig) -> None:
    pass


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("os:getcwd", "takes no arguments"),
        (f"{__name__}:fails", "KeyError: 'no such weight'"),
        (f"{__name__}:builds_nothing", "NoneType"),
    ],
)
def test_a_place_whose_function_builds_no_backend_is_refused_by_its_name(place, said):
    with pytest.raises(ConfigError, match=f"refiner '{place}' .*{said}"):
        SegmentRefiner(RefinerConfig(selectable=(place,)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"selectable": "none"}, "selectable must be a list of names"),
        ({"selectable": [""]}, "selectable must be a list of names"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"device": 0}, "device must be auto, cpu, cuda or cuda:N"),
        ({"decimals": 0}, "decimals must be an integer in 1..9 or null"),
        ({"decimals": True}, "decimals must be"),
        ({"max_vertices": 15}, "max_vertices must be an integer of at least 16"),
        ({"seghead_vision": {"repo": "a/b", "path": "c"}}, "either path or repo"),
        ({"seghead_vision": 3}, "seghead_vision must be a mapping"),
        ({"hq_sam_model": ""}, "hq_sam_model must be"),
    ],
)
def test_a_wrong_value_is_named(values, said):
    with pytest.raises(ConfigError, match=said):
        RefinerConfig(**values)


def test_the_neural_head_sees_through_the_served_model_unless_told_otherwise():
    served = RuntimeConfig(model_path="/models/md3")
    neural = RefinerConfig(selectable=("seghead",))
    assert neural.served_with(served).seghead_vision == ModelSource(path="/models/md3")
    other = RefinerConfig(refiner="seghead", seghead_vision="/models/other")
    assert other.served_with(served).seghead_vision == ModelSource(path="/models/other")
    assert RefinerConfig().served_with(served) == RefinerConfig()
