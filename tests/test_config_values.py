"""Values of configurations that make no sense: refused at once, by the name of their key."""

from __future__ import annotations

import copy
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kestrel.config import (
    LONGEST_TIMEOUT_S,
    MOST_IMAGE_PIXELS,
    SHIPPED_MODELS,
    ConfigError,
    Limits,
    ModelSource,
    RefinerConfig,
    RuntimeConfig,
    from_mapping,
)
from kestrel.diagnosis import read_config
from kestrel.moondream.config import MOONDREAM_2, MOONDREAM_3, MoondreamConfig
from kestrel.seg_refiner import SegmentRefiner

NANO = json.loads((SHIPPED_MODELS / "nano" / "config.json").read_text())


@pytest.mark.parametrize("value", ["1", None, [1], True, float("nan"), -1])
@pytest.mark.parametrize("key", ["alphamax", "opttolerance", "min_agreement"])
def test_a_number_of_the_refiner_is_none(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{key} must be a number"):
        from_mapping(RefinerConfig, {key: value}, "refiner")


@pytest.mark.parametrize("value", [1e10, LONGEST_TIMEOUT_S + 1, float("inf"), "60", 0])
def test_a_deadline_is_further_than_any_wait(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^request_timeout_s must be .* at most 86400"):
        RuntimeConfig(request_timeout_s=value)


def test_a_wait_for_the_longest_deadline_overflows() -> None:
    assert RuntimeConfig(request_timeout_s=LONGEST_TIMEOUT_S).request_timeout_s == 86_400
    condition = threading.Condition()
    with condition:
        threading.Timer(0.05, notify, [condition]).start()
        assert condition.wait(LONGEST_TIMEOUT_S)


def notify(condition: threading.Condition) -> None:
    with condition:
        condition.notify()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refiner": "guided"}, "refiner must be a mapping"),
        ({"refiner": {"turdsiz": 1}}, "refiner: unknown key"),
        ({"source": "x"}, "source must be a mapping"),
        ({"source": {}}, "source must give either path or repo"),
        ({"source": {"repo": "a/b", "revision": 7}}, r"source\.revision must be"),
        ({"refiner": {"seghead_vision": {"path": 5}}}, r"^seghead_vision\.path must be .* not 5$"),
        ({"refiner": {"seghead_vision": {}}}, "^seghead_vision must give either path or repo"),
        ({"limits": None}, "limits must be a mapping"),
        ({"limits": {"max_body_bytes": 0}}, "limits.max_body_bytes must be"),
        (
            {"limits": {"max_image_pixels": 178_956_971}},
            "limits.max_image_pixels must be at most 178956970, not 178956971",
        ),
        ({"device": "cuda:²"}, "device must be"),
        ({1: 2, "zz": 3}, "runtime: unknown key 1"),
    ],
)
def test_a_part_of_another_type_is_taken(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(RuntimeConfig, values, "runtime")


@pytest.mark.parametrize("value", [False, True, "", [], {}, 5, 0, b"/models/a"])
def test_a_model_path_that_is_none_serves_the_shipped_model(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model_path must be a non-empty string or null, not"):
        RuntimeConfig(model_path=value)


def test_a_part_that_is_a_mapping_stays_one() -> None:
    given: dict[str, Any] = {
        "refiner": {"refiner": "none", "selectable": []},
        "source": {"path": "/models/a"},
        "limits": {"max_spatial_refs": 3},
    }
    config = RuntimeConfig(**given)
    assert config.refiner == RefinerConfig(refiner="none", selectable=())
    assert config.refiners == ("none",)
    assert config.located == ModelSource(path="/models/a")
    assert config.limits == Limits(max_spatial_refs=3)
    assert Limits(max_image_pixels=MOST_IMAGE_PIXELS).max_image_pixels == 178_956_970


SERVE = "applications:\n- args: {runtime: {}}\n"


def test_the_doctor_looks_at_whatever_application_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "applications:\n"
        "- {name: other, import_path: 'other:app', args: {runtime: 3}}\n"
        "- {name: segment, import_path: 'serve_graph.app:build', args: {runtime: {max_queue: 7}}}\n"
    )
    assert read_config(file).runtime.max_queue == 7


def test_an_integer_larger_than_any_float_is_a_number_out_of_range() -> None:
    for key in ("request_timeout_s", "refiner_stuck_s"):
        with pytest.raises(ConfigError, match=key):
            RuntimeConfig(**{key: 10**400})
    with pytest.raises(ConfigError, match="guided_radius"):
        RefinerConfig(guided_radius=10**400)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("guided_eps", 1e-14, "1e-6..1"),
        ("guided_eps", 1e9, "1e-6..1"),
        ("guided_radius", 0, "over 0 and at most 0.5"),
        ("guided_radius", 1e6, "over 0 and at most 0.5"),
    ],
)
def test_guided_values_with_which_nothing_would_be_refined_are_refused(
    key: str, value: float, rule: str
) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be .*{re.escape(rule)}, not"):
        RefinerConfig(refiner="guided", **{key: value})


@pytest.mark.parametrize(("radius", "eps"), [(1e-9, 1e-6), (0.08, 1), (0.5, 1e-4)])
def test_the_guided_filter_works_at_the_ends_of_its_ranges(radius: float, eps: float) -> None:
    refiner = SegmentRefiner(RefinerConfig("guided", guided_radius=radius, guided_eps=eps))
    refiner.self_check()
    picture = np.random.default_rng(0).integers(0, 60, (300, 400, 3), np.uint8)
    picture[70:230, 90:310] += 150
    box = {"x_min": 0.22, "y_min": 0.23, "x_max": 0.77, "y_max": 0.76}
    assert refiner.refine_with_bitmaps(picture, "M0 0H1V1H0Z", box).reason == "refined"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime:\n  limits:\n", "limits must be a mapping"),
        ("runtime:\n  limits: [1]\n", "limits must be a mapping"),
        ("runtime: [1]\n", "runtime must be a mapping"),
        ("runtime: abc\n", "runtime must be a mapping"),
        ("refiner: none\n", "refiner must be a mapping"),
        ("runtime: []\n", "runtime must be a mapping"),
        ("runtime: false\n", "runtime must be a mapping"),
        ("refiner: ''\n", "refiner must be a mapping"),
        ("[]\n", "no mapping with runtime and refiner"),
        ("runtme: {device: cuda}\n", r"c\.yaml: unknown key 'runtme'; .*runtime, refiner"),
        ("device: cuda\n", r"c\.yaml: unknown key 'device'; .*runtime, refiner"),
        ("runtime: {refiner: {refiner: none}}\n", r"runtime\.refiner: .* refiner, beside runtime"),
        (SERVE + "http_options: [1]\n", "http_options must be a mapping"),
        (SERVE + "http_options: {port: abc}\n", r"http_options\.port must be .*'abc'"),
        (SERVE + "http_options: {port: 70000}\n", r"http_options\.port must be"),
        (SERVE + "http_options: {host: 7}\n", r"http_options\.host must be"),
    ],
)
def test_a_file_of_odd_values_is_a_traceback(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(file)


MOE = {"num_experts": 4, "experts_per_token": 100}


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text", "n_heads", 0, r"text\.n_heads must be an integer of at least 1, not 0"),
        ("text", "n_kv_heads", 0, r"text\.n_kv_heads must be"),
        ("text", "dim", "192", r"text\.dim must be an integer .*'192'"),
        ("text", "dim", 192.0, r"text\.dim must be an integer"),
        ("text", "max_context", None, r"text\.max_context must be"),
        ("text", "n_layers", 0, r"text\.n_layers must be"),
        ("text", "n_layers", True, r"text\.n_layers must be"),
        ("text", "rope_theta", 0, r"text\.rope_theta must be a number over 0"),
        pytest.param("text", "rope_theta", 10**400, r"text\.rope_theta must be", id="huge"),
        ("text", "tau_attn", 1, r"text\.tau_attn must be true or false"),
        ("text", "moe", MOE, r"text\.moe\.experts_per_token must be at most .*num_experts"),
        ("text", "moe", {"num_experts": 0}, r"text\.moe\.num_experts must be"),
        ("text", "moe", 3, r"text\.moe must be an object or null"),
        ("vision", "enc_patch_size", 0, r"vision\.enc_patch_size must be"),
        ("vision", "enc_n_heads", 0, r"vision\.enc_n_heads must be"),
        ("vision", "max_crops", -1, r"vision\.max_crops must be an integer of at least 0"),
        ("vision", "in_channels", 1, r"vision\.in_channels must be 3"),
        ("region", "size_out_dim", 3, r"region\.size_out_dim must be an even"),
        ("region", "size_out_dim", 2, r"region\.size_out_dim must be an even"),
        ("region", "coord_feat_dim", 7, r"region\.coord_feat_dim must be even"),
        ("region", "decoder_arch", ["mlp"], r"region\.decoder_arch must be"),
        ("region", "decoder_arch", "mlp", r"region\.inner_dim must be"),
        ("prompt", "path_grid", 0, r"prompt\.path_grid must be"),
        ("prompt", "segment_prefix", 5, r"prompt\.segment_prefix must be a list of token ids"),
        ("prompt", "segment_prefix", [1, "a"], r"prompt\.segment_prefix must be a list"),
        ("prompt", "eos_id", -1, r"prompt\.eos_id must be"),
        ("prompt", "segment_prefix", [1, 17374, 2], r"prompt\.segment_prefix .*1664.*not 17374"),
        ("prompt", "coord_id", 99999, r"prompt\.coord_id must be under text\.vocab_size"),
        ("prompt", "first_path_id", 1664, r"prompt\.first_path_id must be under .*\(1664\)"),
        ("prompt", "size_id", 0, r"prompt\.coord_id, size_id and eos_id must differ"),
        ("prompt", "coord_id", 0, r"prompt\.coord_id, size_id and eos_id must differ"),
        ("prompt", "coord_id", 6, r"prompt\.coord_id, size_id and eos_id must differ"),
        ("text", "n_kv_heads", 2, r"text\.n_kv_heads must equal text\.n_heads .*text\.tau_attn"),
    ],
)
def test_a_size_of_a_checkpoint_that_cannot_work_is_taken(
    section: str, key: str, value: Any, message: str
) -> None:
    values = copy.deepcopy(NANO)
    values[section][key] = value
    with pytest.raises(ConfigError, match=message):
        MoondreamConfig.from_dict(values)


def test_margins_as_wide_as_a_crop_are_taken() -> None:
    values = copy.deepcopy(NANO)
    vision = values["vision"]
    grid = vision["crop_size"] // vision["enc_patch_size"]
    vision |= {"max_crops": 4, "overlap_margin": grid // 2}
    with pytest.raises(ConfigError, match=r"vision\.overlap_margin must be"):
        MoondreamConfig.from_dict(values)


@pytest.mark.parametrize("section", ["text", "vision", "region", "prompt"])
def test_a_section_of_a_checkpoint_is_a_list(section: str) -> None:
    with pytest.raises(ConfigError, match=f"{section} must be an object"):
        MoondreamConfig.from_dict({**NANO, section: [1]})


@pytest.mark.parametrize("config", [MOONDREAM_2, MOONDREAM_3], ids=["md2", "md3"])
def test_the_published_sizes_are_refused(config: MoondreamConfig) -> None:
    config.check()
    assert MoondreamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
