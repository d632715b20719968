"""Checkpoints that load wrong, or in part, or run code; messages that do not name what is wrong."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tiny_models import (
    TINY_2,
    TINY_3,
    TOKENIZER,
    engine_tensors,
    hugging_face_tensors,
    own_tensors,
    random_model,
    write_checkpoint,
    write_companions,
)
from torch import Tensor

from kestrel.config import ConfigError, ModelSource, RuntimeConfig
from kestrel.moondream.checkpoint import local_checkpoint, locate, published_architecture
from kestrel.moondream.config import MOONDREAM_2, MOONDREAM_3, MoondreamConfig
from kestrel.moondream.model import Moondream, load
from kestrel.moondream.weights import LoadReport, load_weights

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]
WQ = "text.blocks.0.attn.tau.wq"


@pytest.fixture(scope="module")
def model() -> Moondream:
    return random_model()


def filled(
    files: list[Path], config: MoondreamConfig = TINY_3, dtype: torch.dtype = torch.float32
) -> tuple[Moondream, LoadReport]:
    with torch.device("meta"):
        empty = Moondream(config)
    return empty, load_weights(empty, files, CPU, dtype)


def filled_from(path: Path) -> tuple[Moondream, LoadReport]:
    """A float32 model of a folder, an index or a file that :func:`local_checkpoint` finds."""
    found = local_checkpoint(path)
    with torch.device("meta"):
        empty = Moondream(found.architecture())
    return empty, load_weights(empty, found.weights, CPU, torch.float32, ties=found.ties)


def assert_same(
    got: Moondream, wanted: Moondream, dtype: torch.dtype = torch.float32, *, fused: bool = False
) -> None:
    """``fused``: the text decoder's layers are joined, and its parameters views of them."""
    found, expected = dict(got.named_parameters()), dict(wanted.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        joined = fused and name.startswith("text.blocks.")
        assert found[name].dtype == dtype and (joined or found[name].is_contiguous())
        assert torch.equal(found[name], parameter.to(dtype)), name


def refusal(tensors: Tensors, folder: Path, config: MoondreamConfig = TINY_3) -> str:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        filled([folder / "model.safetensors"], config)
    return str(caught.value)


# Formats


def compiled(tensors: Tensors) -> Tensors:
    """As ``torch.compile`` renames them."""
    return {re.sub(r"\.(\d+)\.", r".\1._orig_mod.", name): t for name, t in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """Both token weights of tau in one tensor, as the engine keeps them in memory."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith("tau_wq")]:
        wv = tensors.pop(name.replace("tau_wq", "tau_wv"))
        tensors[name.replace("tau_wq", "tau_wqwv")] = torch.cat([tensors.pop(name), wv])
    return tensors


LAYOUTS: dict[str, Callable[[Moondream], Tensors]] = {
    "own names": own_tensors,
    "Hugging Face names": hugging_face_tensors,
    "engine names": engine_tensors,
}


@pytest.mark.parametrize("form", ["safetensors", "pt", "pt under state_dict"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [TINY_2, TINY_3], ids=["md2", "md3"])
def test_a_public_layout_fills_the_model_wrongly(config, layout, form, tmp_path):
    wanted = random_model(config)
    tensors = LAYOUTS[layout](wanted)
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors} if "under" in form else tensors, file)
    got, report = filled([file], config)
    assert_same(got, wanted)
    assert (report.scheme, report.tensors) == (layout, len(tensors))
    assert report.nbytes == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("change", [compiled, fused])
def test_a_compiled_or_fused_engine_checkpoint_does_not_load(model, change, tmp_path):
    tensors = change(engine_tensors(model))
    assert tensors.keys() != engine_tensors(model).keys()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(filled([tmp_path / "model.safetensors"])[0], model)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_on_disk_decides_the_type_in_memory(model, stored, dtype, tmp_path):
    tensors = {name: t.to(stored) for name, t in own_tensors(model).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    got, report = filled([tmp_path / "model.safetensors"], dtype=dtype)
    assert report.dtypes == (str(stored).removeprefix("torch."),)
    for name, parameter in got.named_parameters():
        assert torch.equal(parameter, tensors[name].to(dtype)), name


def test_parameters_are_views_of_the_file(model, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(own_tensors(model), file)
    got, _ = filled([file])
    # Written over in place, as a copy onto it would: a view, and only a view, sees that.
    with file.open("r+b") as opened:
        opened.seek(8 + struct.unpack("<Q", opened.read(8))[0])
        opened.write(bytes(file.stat().st_size - opened.tell()))
    assert_same(got, model)


# Float8 experts


def quantised(tensors: Tensors, *, keep: bool = False) -> tuple[Tensors, Tensors]:
    """Engine tensors with float8 experts and scales, and what they stand for by stored name."""
    stored, meant = dict(tensors), {}
    for name in [name for name in tensors if "experts" in name]:
        scale = tensors[name].abs().amax(dim=-1) / 448
        stored[name] = (tensors[name] / scale[..., None]).to(torch.float8_e4m3fn)
        side = "down" if "output_experts" in name else "up"
        scale_name = f"{name.split('.mlp.')[0]}.moe_quant.{side}_scale"
        stored[scale_name] = scale[..., None].clone() if keep else scale
        meant[name] = stored[name].float() * scale[..., None]
    assert meant
    return stored, meant


@pytest.mark.parametrize("keep", [False, True], ids=["[E, N]", "[E, N, 1]"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_float8_experts_lose_their_scales(model, keep, suffix, tmp_path):
    stored, meant = quantised(engine_tensors(model), keep=keep)
    file = tmp_path / f"model.{suffix}"
    torch.save(stored, file) if suffix == "pt" else save_file(stored, file)
    got, report = filled([file])
    assert report.dtypes == ("float32", "float8_e4m3fn")
    parameters = dict(got.named_parameters())
    for name, numbers in meant.items():
        layer = name.split(".")[3]
        which = "fc2" if "output_experts" in name else "fc1"
        assert torch.equal(parameters[f"text.blocks.{layer}.mlp.{which}.weight"], numbers)


def test_scales_in_another_shard_are_not_found(model, tmp_path):
    stored, meant = quantised(engine_tensors(model))
    scales = {name: t for name, t in stored.items() if "moe_quant" in name}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({name: t for name, t in stored.items() if name not in scales}, files[0])
    save_file(scales, files[1])
    got, _ = filled(files)
    name = "text_model.transformer.h.1.mlp.experts.weight"
    assert torch.equal(dict(got.named_parameters())["text.blocks.1.mlp.fc1.weight"], meant[name])


def test_float8_experts_without_scales_are_taken_as_they_are(model, tmp_path):
    stored, _ = quantised(engine_tensors(model))
    del stored["text_model.transformer.h.2.moe_quant.down_scale"]
    message = refusal(stored, tmp_path)
    assert "h.2.mlp.output_experts.weight is float8 and has no scales" in message


def test_scales_of_plain_experts_are_dropped_silently(model, tmp_path):
    tensors = engine_tensors(model)
    tensors["text_model.transformer.h.1.moe_quant.up_scale"] = torch.ones(4, 24)
    assert "moe_quant.up_scale: its experts are not float8" in refusal(tensors, tmp_path)


def test_scales_of_another_shape_are_broadcast(model, tmp_path):
    stored, _ = quantised(engine_tensors(model))
    stored["text_model.transformer.h.1.moe_quant.up_scale"] = torch.ones(4, 1)
    assert "up_scale has shape [4, 1], not [4, 24]" in refusal(stored, tmp_path)


def test_one_of_two_scales_is_chosen_silently(model, tmp_path):
    stored, _ = quantised(engine_tensors(model))
    name = "text_model.transformer.h.1.moe_quant.up_scale"
    twin = name.replace("text_model.", "text_model._orig_mod.")
    stored[twin] = stored[name] * 1000
    message = refusal(stored, tmp_path)
    pair = {f"{name} and {twin}", f"{twin} and {name}"}
    assert any(f"{both} both scale text.blocks.1.mlp.fc1.weight" in message for both in pair)


@pytest.mark.parametrize("kind", ["integers", "NaN", "infinity"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_scales_that_scale_nothing_are_multiplied_in(model, kind, suffix, tmp_path):
    stored, _ = quantised(engine_tensors(model))
    name = "text_model.transformer.h.1.moe_quant.down_scale"
    if kind == "integers":
        stored[name] = torch.ones(stored[name].shape, dtype=torch.int32)
        said = f"{name} holds {'I32' if suffix == 'safetensors' else 'int32'}"
    else:
        stored[name][1, 2] = float(kind if kind == "NaN" else "inf")
        said = f"{name} holds a scale that is no finite number"
    file = tmp_path / f"model.{suffix}"
    torch.save(stored, file) if suffix == "pt" else save_file(stored, file)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        filled([file])
    assert str(file) in str(caught.value)


# Tied tensors


def tied_model() -> Moondream:
    model = random_model()
    model.text.lm_head.weight.copy_(model.text.wte)
    return model


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tied_weights_are_missing_or_stay_one_tensor(suffix, tmp_path):
    wanted = tied_model()
    tensors = own_tensors(wanted)
    file = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        tensors["text.lm_head.weight"] = tensors["text.wte"]
        torch.save(tensors, file)
    else:
        # As safetensors.torch.save_model leaves them: one tensor, the other named beside it.
        del tensors["text.lm_head.weight"]
        save_file(tensors, file, metadata={"text.lm_head.weight": "text.wte", "format": "pt"})
    got, report = filled([file])
    assert_same(got, wanted)
    assert got.text.lm_head.weight.data_ptr() != got.text.wte.data_ptr()
    assert [set(pair) for pair in report.tied] == [{"text.lm_head.weight", "text.wte"}]
    assert report.nbytes == sum(t.nbytes for t in own_tensors(wanted).values()) - (
        wanted.text.wte.nbytes
    )


def test_weights_tied_by_an_index_of_shards_are_missing(tmp_path):
    wanted = tied_model()
    tensors = hugging_face_tensors(wanted)
    tensors["model.text.lm_head.weight"] = tensors["model.text.wte"]
    save_torch_state_dict(tensors, tmp_path, max_shard_size="40KB")
    write_companions(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    names = {"model.text.lm_head.weight", "model.text.wte"}
    (dropped,) = json.loads(index.read_text())["metadata"].keys() & names
    assert len(local_checkpoint(tmp_path).weights) > 1
    assert_same(load(tmp_path, CPU, torch.float32), wanted, fused=True)
    report = filled_from(tmp_path)[1]
    assert report.tied == [(dropped, *(names - {dropped}))]


@pytest.mark.parametrize("metadata", [{"text.wte": 3, "text.a": "text.b"}, [], None, "text"])
def test_what_an_index_says_of_itself_is_taken_for_tied_weights(model, metadata, tmp_path):
    sharded(model, tmp_path, index=True)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": metadata}))
    got, report = filled_from(tmp_path)
    assert_same(got, model)
    assert report.tied == []


def test_a_transposed_view_of_the_same_bytes_is_taken_for_a_tied_tensor(tmp_path):
    first, second = (f"text.blocks.{n}.attn.proj.weight" for n in range(2))
    tensors = own_tensors(random_model())
    tensors[second] = tensors[first].T
    torch.save(tensors, tmp_path / "model.pt")
    got, report = filled([tmp_path / "model.pt"])
    assert torch.equal(got.text.blocks[1].attn.proj.weight, tensors[first].T)
    assert report.tied == []


# What does not fit


def test_missing_and_unexpected_tensors_are_not_named(model, tmp_path):
    tensors = hugging_face_tensors(model)
    del tensors[f"model.{WQ}"]
    tensors["model.text.blocks.0.attn.tau.wk"] = torch.zeros(2)
    tensors["something.else"] = torch.zeros(2)
    message = refusal(tensors, tmp_path)
    assert f"missing tensor {WQ}" in message
    assert "unexpected tensor model.text.blocks.0.attn.tau.wk" in message
    assert "unexpected tensor something.else" in message


def test_two_tensors_fill_one_parameter(model, tmp_path):
    tensors = own_tensors(model) | {f"model.{WQ}": torch.zeros(2, 96)}
    message = refusal(tensors, tmp_path)
    pair = {f"model.{WQ} and {WQ}", f"{WQ} and model.{WQ}"}
    assert any(f"{both} both fill {WQ}" in message for both in pair)


def test_a_shape_that_differs_is_not_named(model, tmp_path):
    tensors = engine_tensors(model)
    name = "region_model.size_features.weight"
    tensors[name] = tensors[name].T.contiguous()
    assert f"{name} has shape [2, 6], not [6, 2]" in refusal(tensors, tmp_path)


def test_integers_become_weights(model, tmp_path):
    tensors = own_tensors(model)
    tensors["text.wte"] = tensors["text.wte"].to(torch.int32)
    assert "text.wte holds I32" in refusal(tensors, tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_another_float8_is_said_to_be_no_floating_point_numbers(model, suffix, tmp_path):
    stored = own_tensors(model)
    stored["text.wte"] = stored["text.wte"].to(torch.float8_e5m2)
    file = tmp_path / f"model.{suffix}"
    torch.save(stored, file) if suffix == "pt" else save_file(stored, file)
    with pytest.raises(ConfigError, match=r"text\.wte holds (F8_E5M2|float8_e5m2).*float8_e4m3fn"):
        filled([file])


def test_a_hundred_problems_fill_the_screen(model, tmp_path):
    message = refusal({"text.wte": own_tensors(model)["text.wte"]}, tmp_path)
    missing = len(own_tensors(model)) - 1
    assert message.count("missing tensor") == 8 and f"and {missing - 8} more" in message


def test_unexpected_tensors_hide_the_missing_ones(model, tmp_path, caplog):
    tensors = own_tensors(model) | {f"stray.{n}": torch.zeros(2) for n in range(30)}
    del tensors[WQ]
    tensors["text.wte"] = tensors["text.wte"].T.contiguous()
    message = refusal(tensors, tmp_path)
    kinds = (f"missing tensor {WQ}", "text.wte has shape", "unexpected tensor")
    places = [message.find(kind) for kind in kinds]
    assert -1 not in places and places == sorted(places)
    assert message.count("unexpected tensor") == 8 and "and 22 more" in message
    # The log has them all.
    assert all(f"unexpected tensor stray.{n}\n" in caplog.text + "\n" for n in range(30))


def test_nothing_is_moved_before_all_is_known_to_fit(model, tmp_path):
    tensors = own_tensors(model) | {"text.stray": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = Moondream(TINY_3)
    with pytest.raises(ConfigError):
        load_weights(empty, [tmp_path / "model.safetensors"], CPU, torch.float32)
    assert all(parameter.is_meta for parameter in empty.parameters())


# Broken and hostile files


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_a_traceback(model, suffix, kept, tmp_path):
    file = tmp_path / f"model.{suffix}"
    tensors = own_tensors(model)
    torch.save(tensors, file) if suffix == "pt" else save_file(tensors, file)
    size = file.stat().st_size
    os.truncate(file, kept if isinstance(kept, int) else round(size * kept))
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        filled([file])


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_runs_its_code(model, tmp_path):
    torch.save(own_tensors(model) | {"text.extra": Hostile(tmp_path / "ran")}, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="holds more than tensors and is not loaded"):
        filled([tmp_path / "m.pt"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        ({"text.wte": 3}, "text.wte is no tensor but int"),
        ({0: torch.zeros(2)}, "names a tensor 0, which is int"),
    ],
)
def test_a_pt_file_of_something_else_is_a_traceback(content, message, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match=message):
        filled([tmp_path / "m.pt"])


def test_a_file_that_no_copy_mends_is_to_be_copied_again(model, tmp_path):
    torch.save(own_tensors(model), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    write_companions(tmp_path)
    with pytest.raises(ConfigError, match=r"m\.pt: .*before torch 1\.6.*save it again"):
        filled_from(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: neither a safetensors file nor"):
        filled_from(tmp_path / "tokenizer.json")


# Folders


def sharded(model: Moondream, folder: Path, *, index: bool, count: int = 3) -> list[Path]:
    tensors = hugging_face_tensors(model)
    names = sorted(tensors)
    files, weight_map = [], {}
    for number in range(count):
        part = names[number::count]
        files.append(folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors")
        save_file({name: tensors[name] for name in part}, files[-1])
        weight_map |= dict.fromkeys(part, files[-1].name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_companions(folder)
    return files


@pytest.mark.parametrize("index", [True, False])
def test_a_sharded_folder_loads_in_part(model, index, tmp_path):
    files = sharded(model, tmp_path, index=index)
    assert local_checkpoint(tmp_path).weights == tuple(files)
    if index:
        named = local_checkpoint(tmp_path / "model.safetensors.index.json")
        assert named == local_checkpoint(tmp_path)
    assert_same(load(tmp_path, CPU, torch.float32), model, fused=True)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_not_named(model, index, tmp_path):
    files = sharded(model, tmp_path, index=index)
    files[1].unlink()
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, CPU, torch.float32)
    expected = f"lacks {files[1].name}" if index else "has 2 of 3 shards"
    assert expected in str(caught.value)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/hosts", 3])
def test_an_index_points_out_of_its_folder(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    write_companions(tmp_path)
    with pytest.raises(ConfigError, match=r"is no file of this folder"):
        local_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"other": {}}']
)
def test_a_broken_index_is_a_traceback(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    write_companions(tmp_path)
    with pytest.raises(ConfigError, match="not a readable index"):
        local_checkpoint(tmp_path)


def test_one_of_two_checkpoints_of_a_folder_is_chosen_silently(model, tmp_path):
    write_checkpoint(tmp_path, own_tensors(model))
    save_file(own_tensors(model), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors, other\.safetensors\); name one"):
        local_checkpoint(tmp_path)
    assert local_checkpoint(tmp_path / "other.safetensors").weights[0].name == "other.safetensors"


@pytest.mark.parametrize("index", [True, False])
def test_one_of_two_formats_of_a_folder_is_chosen_silently(model, index, tmp_path):
    sharded(model, tmp_path, index=index)
    torch.save(own_tensors(model), tmp_path / "seg-model.pt")
    with pytest.raises(ConfigError, match=r"seg-model\.pt\); name one file in model\.path"):
        local_checkpoint(tmp_path)
    assert local_checkpoint(tmp_path / "seg-model.pt").weights == (tmp_path / "seg-model.pt",)


def test_an_index_without_its_shards_hides_the_whole_file(model, tmp_path):
    shards = sharded(model, tmp_path, index=True)
    shards[0].unlink()
    save_file(own_tensors(model), tmp_path / "model.safetensors")
    assert local_checkpoint(tmp_path).weights == (tmp_path / "model.safetensors",)
    assert_same(filled_from(tmp_path)[0], model)


def test_what_a_folder_lacks_is_not_named(model, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint at"):
        local_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no \.safetensors or \.pt"):
        local_checkpoint(tmp_path)
    save_file(own_tensors(model), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*model\.tokenizer"):
        local_checkpoint(tmp_path)
    write_companions(tmp_path)
    (tmp_path / "config.json").unlink()
    found = local_checkpoint(tmp_path)
    assert found.config is None and found.folder == tmp_path


def test_a_path_that_cannot_be_read_is_a_traceback_or_called_empty(model, tmp_path, monkeypatch):
    folder, long = write_checkpoint(tmp_path, own_tensors(model)), tmp_path / ("a" * 300)
    with pytest.raises(
        ConfigError, match=r"^model\.path: .*/a+ cannot be read: File name too long"
    ):
        local_checkpoint(long)
    with pytest.raises(ConfigError, match=r"^model\.path: there is no checkpoint at a\0"):
        local_checkpoint(Path("a\0"))
    # Root may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.R_OK)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ConfigError, match=f"^model.path: {re.escape(str(path))} is not yours"):
            local_checkpoint(path)


def test_a_tokenizer_elsewhere_is_not_found(model, tmp_path):
    folder = write_checkpoint(tmp_path / "model", own_tensors(model))
    other = tmp_path / "words"
    other.mkdir()
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    for named in (other, other / "tokenizer.json"):
        found = locate(ModelSource(path=str(folder), tokenizer=str(named)))
        assert found.tokenizer == other / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"model\.tokenizer: nowhere is neither"):
        locate(ModelSource(path=str(folder), tokenizer="nowhere"))


def test_a_tokenizer_larger_than_the_vocabulary_goes_unnoticed(tmp_path, caplog):
    config = replace(TINY_3, text=replace(TINY_3.text, vocab_size=1200))
    folder = write_checkpoint(tmp_path, hugging_face_tensors(random_model(config)), config)
    assert load(folder, CPU, torch.float32).tokenizer.size == 1616
    assert f"{folder / 'tokenizer.json'} has 1616 ids" in caplog.text
    assert "text.vocab_size of the model is 1200" in caplog.text


def test_the_context_of_the_configuration_is_blamed_on_the_checkpoint(model, tmp_path):
    folder = write_checkpoint(tmp_path, hugging_face_tensors(model))
    with pytest.raises(ConfigError, match=r"^max_context must be larger than the 5 .*not 4$"):
        load(folder, CPU, torch.float32, max_context=4)


@pytest.mark.parametrize("form", ["plain", "under config", "published"])
def test_the_sizes_of_a_config_are_not_read(form, tmp_path):
    file = tmp_path / "config.json"
    sizes = TINY_3.to_dict()
    hub = {"architectures": ["HfMoondream"], "model_type": "moondream3"}
    content = {"plain": sizes, "under config": hub | {"config": sizes}, "published": hub}[form]
    file.write_text(json.dumps(content))
    save_file(engine_tensors(random_model()), tmp_path / "m.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    expected = MOONDREAM_3 if form == "published" else TINY_3
    assert local_checkpoint(tmp_path).architecture() == expected


@pytest.mark.parametrize("left_out", [("decoder_arch", "use_ln"), ("use_ln",)])
@pytest.mark.parametrize("config", [TINY_2, TINY_3], ids=["md2", "md3"])
def test_what_a_config_leaves_out_of_the_region_is_moondream_2_s(config, left_out, tmp_path):
    """Moondream 3's own implementation leaves out what is its default there."""
    sizes = config.to_dict()
    for key in left_out:
        del sizes["region"][key]
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_file(engine_tensors(random_model(config)), tmp_path / "m.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    assert local_checkpoint(tmp_path).architecture().region == config.region


@pytest.mark.parametrize("sizes", [{"text": {"n_heads": 0}}, {"text": 3}, {"region": [1]}])
def test_a_size_that_cannot_work_does_not_name_its_file(model, sizes, tmp_path):
    folder = write_checkpoint(tmp_path, own_tensors(model))
    file = folder / "config.json"
    file.write_text(json.dumps(TINY_3.to_dict() | sizes))
    (section,) = sizes
    for read in (local_checkpoint(folder).architecture, lambda: MoondreamConfig.from_file(file)):
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: {section}\b.* must be"):
            read()


@pytest.mark.parametrize("under", [None, "config"])
@pytest.mark.parametrize(
    ("config", "published"), [(TINY_2, MOONDREAM_2), (TINY_3, MOONDREAM_3)], ids=["md2", "md3"]
)
def test_a_config_without_the_text_s_sizes_is_passed_over(config, published, under, tmp_path):
    given = {"prompt": {"path_grid": 480}, "vision": {"max_crops": 4}, "name": "mine"}
    (tmp_path / "config.json").write_text(json.dumps({under: given} if under else given))
    save_file(engine_tensors(random_model(config)), tmp_path / "m.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    found = local_checkpoint(tmp_path).architecture()
    assert (found.prompt.path_grid, found.vision.max_crops, found.name) == (480, 4, "mine")
    assert (found.text, found.region) == (published.text, published.region)


@pytest.mark.parametrize(
    ("config", "expected"), [(TINY_2, MOONDREAM_2), (TINY_3, MOONDREAM_3)], ids=["md2", "md3"]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_models_are_confused(config, expected, layout, tmp_path):
    save_file(LAYOUTS[layout](random_model(config)), tmp_path / "m.safetensors")
    assert published_architecture([tmp_path / "m.safetensors"]) is expected


def test_tensors_of_another_model_pass_for_moondream(tmp_path):
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError, match=r"no known Moondream; put the model's config\.json"):
        published_architecture([tmp_path / "m.safetensors"])


# The configuration's words


def test_a_model_of_the_config_is_not_served_under_its_name(model, tmp_path):
    folder = write_checkpoint(tmp_path / "seg-model", own_tensors(model))
    config = RuntimeConfig(model={"path": str(folder)})  # type: ignore[arg-type]
    assert (config.model, config.located.path) == ("seg-model", str(folder))
    named = RuntimeConfig(model={"repo": "a/b", "name": "mine"})  # type: ignore[arg-type]
    assert (named.model, named.located.repo) == ("mine", "a/b")
    short = RuntimeConfig(model_path=str(folder))
    assert (short.model, short.located) == ("seg-model", config.located)
    assert RuntimeConfig(source=config.located).model == "seg-model"
    given = RuntimeConfig(model="m", model_path="/x")
    assert (given.model, given.located) == ("m", ModelSource(path="/x"))
    unnamed = RuntimeConfig(model=None, model_path="/models/a")  # type: ignore[arg-type]
    assert (unnamed.model, RuntimeConfig().model) == ("a", "nano")
    for wrong in (5, False, []):
        with pytest.raises(ConfigError, match=r"^model must be a string, not"):
            RuntimeConfig(model=wrong)  # type: ignore[arg-type]
    assert RuntimeConfig().located.path.endswith("nano")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {}}, "either path or repo"),
        ({"model": {"path": "/x", "repo": "a/b"}}, "either path or repo"),
        ({"model": {"path": "/x", "revision": "0" * 40}}, "model.revision belongs to repo"),
        ({"model": {"path": "/x", "filename": "m.pt"}}, "model.filename belongs to repo"),
        ({"model": {"path": 3}}, "model.path must be a non-empty string"),
        ({"model": {"url": "x"}}, "unknown key 'url'"),
        ({"model": {"path": "/x"}, "model_path": "/y"}, "more than one checkpoint"),
    ],
)
def test_a_model_of_the_config_that_makes_no_sense_is_taken(values, message):
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(**values)
