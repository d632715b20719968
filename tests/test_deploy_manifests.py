"""What operators deploy: manifests that Kubernetes would refuse, images that lack what they run,
and settings that drifted from configs/cluster.yaml."""

from __future__ import annotations

import ast
import copy
import fnmatch
import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import PROJECT, ROOT, pins

pytest.importorskip("ray.serve")

import ray
from ray.serve.schema import ServeDeploySchema

import kestrel
from serve_graph.args import GraphArgs
from serve_graph.environment import AFTER_DEADLINE_S, BEFORE_RAY, DRAIN_S, HAPROXY, HARD_STOP
from serve_graph.haproxy import BINARY_PATH, PROGRAM

DEPLOY = ROOT / "deploy"
DOCKERFILES = {half: DEPLOY / "docker" / f"{half}.Dockerfile" for half in ("model", "refiner")}
SCHEMA = Path(__file__).parent / "fixtures" / "kuberay" / "rayservice-v1.json.gz"


# The RayService


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The CRD's schema with unknown keys refused, which the API server would drop silently."""
    schema = copy.deepcopy(schema)

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("x-kubernetes-int-or-string"):
                node.pop("type", None)
            keep = node.get("x-kubernetes-preserve-unknown-fields")
            if isinstance(node.get("properties"), dict) and not keep:
                node.setdefault("additionalProperties", False)
            for part in node.values():
                close(part)
        elif isinstance(node, list):
            for part in node:
                close(part)

    close(schema)
    # Kinds of Kubernetes itself, whose fields the CRD does not repeat.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "kuberay" / "rayservice.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """The schema is itself checked once: that takes longer than all the rest."""
    found = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["rayClusterConfig"]
    return found


def gibibytes(memory: str) -> float:
    """Bytes of a quantity such as ``24Gi``."""
    return float(memory.removesuffix("Gi")) * 2**30


def groups(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster(manifest)["workerGroupSpecs"]}


def containers(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pods = {"head": cluster(manifest)["headGroupSpec"]} | groups(manifest)
    found = {}
    for name, pod in pods.items():
        (found[name],) = pod["template"]["spec"]["containers"]
    return found


def environment(manifest: dict[str, Any], name: str) -> dict[str, str]:
    return {one["name"]: one["value"] for one in containers(manifest)[name].get("env", ())}


def graph_args(manifest: dict[str, Any]) -> GraphArgs:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    return GraphArgs.model_validate(config["applications"][0]["args"])


def test_rayservice_is_what_the_operator_s_schema_takes(manifest, schema):
    schema.validate(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")


def test_a_typing_error_in_the_rayservice_would_be_seen(manifest, schema):
    for break_it in (
        lambda m: m["spec"].update(serveConfig=""),
        lambda m: cluster(m).update(enableInTreeAutoscaler=True),
        lambda m: containers(m)["gpu"]["readinessProbe"].update(failureThresholds=1),
        lambda m: containers(m)["cpu"].update(image=["a"]),
        lambda m: cluster(m)["authOptions"].update(mode="tokens"),
        lambda m: groups(m)["gpu"].update(maxReplicas="four"),
    ):
        broken = copy.deepcopy(manifest)
        break_it(broken)
        assert not schema.is_valid(broken)


def test_serve_config_is_the_cluster_config_but_for_where_pools_are_placed(manifest):
    deployed = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    args = deployed["applications"][0]["args"]
    assert args["ingress_pool"].pop("resources") == {"cpu_node": 0.001}
    assert deployed == config
    assert graph_args(manifest).runtime.refiner is None


def test_ray_of_the_manifest_is_the_ray_of_the_images(manifest):
    assert cluster(manifest)["rayVersion"] == pins()["ray"] == ray.__version__


def test_every_image_has_a_dockerfile_of_this_version(manifest):
    built = {f"segment-{half}:{kestrel.__version__}" for half in DOCKERFILES}
    assert {c["image"] for c in containers(manifest).values()} == built
    for half, path in DOCKERFILES.items():
        assert f"-t segment-{half}:{kestrel.__version__} ." in path.read_text()
    assert containers(manifest)["gpu"]["image"].startswith("segment-model:")
    assert containers(manifest)["cpu"]["image"].startswith("segment-refiner:")


def test_the_import_path_leads_to_the_graph(manifest):
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    module, _, name = config["applications"][0]["import_path"].partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE)


def test_ray_asks_for_a_token_that_is_not_in_the_manifest(manifest):
    text = (DEPLOY / "kuberay" / "rayservice.yaml").read_text()
    options = cluster(manifest)["authOptions"]
    assert options["mode"] == "token"
    # Nor in the arguments of a process, which all users of a machine see.
    made = f"create secret generic {options['secretName']} --from-file=auth_token=/dev/stdin"
    assert made in text
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)
    for container in containers(manifest).values():
        assert all(e["name"] != "RAY_AUTH_MODE" for e in container.get("env", ()))


def test_probes_need_nothing_that_the_images_lack(manifest):
    """The operator's own probes of a RayService call wget."""
    for name, container in containers(manifest).items():
        for probe in ("livenessProbe", "readinessProbe"):
            assert "httpGet" in container[probe], name
        assert container["livenessProbe"]["httpGet"]["path"] == "/api/healthz"
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        assert ports["serve"] == config["http_options"]["port"]
        if name != "head":
            get = container["readinessProbe"]["httpGet"]
            assert (get["path"], get["port"]) == ("/-/healthz", ports["serve"])


def test_no_container_runs_as_root(manifest):
    for container in containers(manifest).values():
        context = container["securityContext"]
        assert context["runAsNonRoot"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_replica_finds_a_node_when_all_pools_are_at_their_largest(manifest):
    args, gpu, cpu = graph_args(manifest), groups(manifest)["gpu"], groups(manifest)["cpu"]
    per_node = min(
        math.floor(float(gpu["resources"]["GPU"]) / args.model_pool.num_gpus),
        math.floor(float(gpu["resources"]["CPU"]) / args.model_pool.num_cpus),
    )
    assert per_node >= 1
    for bound, group in (("min_replicas", "minReplicas"), ("max_replicas", "maxReplicas")):
        assert getattr(args.model_pool, bound) <= per_node * gpu[group]
        needed = sum(
            pool.num_cpus * getattr(pool, bound) for pool in (args.ingress_pool, args.refiner_pool)
        )
        assert needed <= float(cpu["resources"]["CPU"]) * cpu[group]
        for pool, nodes in ((args.ingress_pool, cpu), (args.model_pool, gpu)):
            if pool.max_replicas_per_node is not None:
                assert getattr(pool, bound) <= pool.max_replicas_per_node * nodes[group]


def test_a_pod_full_of_replicas_has_the_memory_that_they_may_take(manifest):
    """What docs/operations.md says of the largest pictures, all at once."""
    args, cpu = graph_args(manifest), groups(manifest)["cpu"]
    pixels, threads = args.runtime.limits.max_image_pixels, args.refiner_pool.threads
    refiner = 0.2e9 + pixels * (12 * (threads - 1) + max(12, 17))
    ingress = 0.3e9 + args.runtime.max_held_bytes
    refiners = float(cpu["resources"]["CPU"]) - args.ingress_pool.num_cpus
    memory = containers(manifest)["cpu"]["resources"]["limits"]["memory"]
    assert refiners / args.refiner_pool.num_cpus * refiner + ingress <= gibibytes(memory)


def test_no_refiner_or_ingress_takes_the_cpu_that_a_model_needs(manifest):
    args, gpu, cpu = graph_args(manifest), groups(manifest)["gpu"], groups(manifest)["cpu"]
    for pool in (args.ingress_pool, args.refiner_pool):
        for resource in pool.resources:
            assert resource in cpu["resources"] and resource not in gpu["resources"]
    assert set(args.refiner_pool.resources) == {"cpu_node"}
    most = args.refiner_pool.max_replicas + args.ingress_pool.max_replicas
    assert most * 0.001 <= float(cpu["resources"]["cpu_node"])


def test_ray_never_hands_out_more_than_a_pod_has(manifest):
    for name, group in groups(manifest).items():
        pod = containers(manifest)[name]["resources"]
        assert float(group["resources"]["CPU"]) < float(pod["requests"]["cpu"])
        gpus = float(group["resources"].get("GPU", 0))
        assert gpus == float(pod["limits"].get("nvidia.com/gpu", 0))
        assert pod["requests"]["memory"] == pod["limits"]["memory"]
    assert cluster(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True


def test_a_pod_may_live_as_long_as_its_replicas_finish_their_requests(manifest):
    args = graph_args(manifest)
    replicas = {
        "gpu": [args.model_pool.graceful_shutdown_timeout_s],
        "cpu": [args.refiner_pool.graceful_shutdown_timeout_s, args.ingress_drain_s],
    }
    for name, seconds in replicas.items():
        # Ray first lets the node's replicas finish, then stops its own processes.
        drain = float(environment(manifest, name)[DRAIN_S])
        grace = groups(manifest)[name]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert max(seconds) < drain <= grace - 10


def test_haproxy_of_a_pod_lives_as_long_as_its_requests(manifest):
    longest = graph_args(manifest).runtime.request_timeout_s
    assert int(HAPROXY[HARD_STOP]) >= longest + AFTER_DEADLINE_S


def test_pods_set_nothing_otherwise_than_other_nodes_do(manifest):
    for name in containers(manifest):
        given = environment(manifest, name)
        assert given.items() <= {**BEFORE_RAY, **HAPROXY}.items()


# The images

BUILD_TOOLS = ("gcc", "g++", "make", "cmake", "build-essential", "git", "curl", "python3-dev")
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "COMMENT"}


def stages(half: str) -> list[list[tuple[str, str]]]:
    """The instructions of each stage: (name, value)."""
    path = DOCKERFILES[half]
    parser = DockerfileParser(fileobj=path.open("rb"))
    found: list[list[tuple[str, str]]] = []
    for step in parser.structure:
        if step["instruction"] == "FROM":
            found.append([])
        if step["instruction"] != "COMMENT":
            found[-1].append((step["instruction"], step["value"]))
    return found


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in stage if name == instruction]


def requirements(half: str) -> list[str]:
    lines = (DEPLOY / "docker" / f"{half}-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(params=["model", "refiner"])
def half(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_dockerfile_has_known_instructions_and_two_pinned_stages(half):
    build, final = stages(half)
    assert {name for name, _ in build + final} <= KNOWN
    (first,), (last,) = values(build, "FROM"), values(final, "FROM")
    assert first == f"{last} AS build"
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", last)


def test_image_runs_as_a_numbered_user(half):
    name, value = [step for step in stages(half)[-1] if step[0] in ("USER", "RUN", "COPY")][-1]
    assert name == "USER" and re.fullmatch(r"[1-9]\d*:[1-9]\d*", value)


def test_final_stage_has_no_build_tools_and_no_package_lists(half):
    for command in values(stages(half)[-1], "RUN"):
        words = command.split()
        assert not set(words) & set(BUILD_TOOLS) and "pip" not in words
        if "apt-get" in words:
            assert "--no-install-recommends" in words and "/var/lib/apt/lists/*" in words


def test_everything_copied_is_in_the_repository_and_in_the_build_context(half):
    ignore = (ROOT / ".dockerignore").read_text().split()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert ignore[0] == "*"
    copied = [v.split() for stage in stages(half) for v in values(stage, "COPY")]
    sources = [p for words in copied if not words[0].startswith("--from") for p in words[:-1]]
    assert {"kestrel", "serve_graph", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), source


def test_images_set_what_ray_reads_when_it_starts_alike(half):
    (text,) = values(stages(half)[-1], "ENV")
    found = dict(pair.split("=") for pair in text.split())
    assert {**BEFORE_RAY, **HAPROXY}.items() <= found.items()
    # Where ``pip install --prefix=/install`` puts it, and the last stage copies that.
    assert found[BINARY_PATH] == f"/usr/local/bin/{PROGRAM}"
    assert PROGRAM in PROJECT["scripts"]
    assert found["RAY_AUTH_MODE"] == "token"


def test_installed_packages_are_pinned_and_declared(half):
    lines = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["serve"]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    for line in requirements(half):
        assert canonicalize_name(Requirement(line).name) in declared & set(pins())


MODULES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "potracer": "potrace",
    "ray[serve]": "ray",
    "skia-python": "skia",
}
"""Names that packages are imported by, where those are others."""


def imported(roots: list[str], others: str) -> set[str]:
    """Top-level names of what ``roots`` import, at any depth and in functions too, but not for
    types alone; modules that begin with ``others`` are not followed."""
    found, seen, left = set(), set(), list(roots)
    while left:
        module = left.pop()
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or module.startswith(others) or not path.is_file():
            continue
        seen.add(module)
        tree = ast.parse(path.read_text())
        types_only = [
            statement
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
        ]
        for node in ast.walk(tree):
            if node in types_only or not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                found.add(name.split(".")[0])
                left += [name] if name.split(".")[0] in ("kestrel", "serve_graph") else []
    return found - set(sys.stdlib_module_names) - {"kestrel", "serve_graph"}


def test_an_image_has_what_its_half_imports_however_late(half):
    roots = ["serve_graph.app", "serve_graph.ingress", f"serve_graph.{half}"]
    others = {
        "model": ("kestrel.seg_refiner.", "serve_graph.refiner"),
        # The neural backends are not in this image: one for them adds what they say is missing.
        "refiner": (
            "kestrel.engine",
            "kestrel.moondream",
            "kestrel.seg_refiner.hq_sam",
            "kestrel.seg_refiner.seghead",
            "serve_graph.model",
        ),
    }[half]
    needed = imported(roots, others)
    there = {MODULES.get(name, name) for name in requirements(half)}
    brought_by_ray = {"grpc", "opentelemetry", "pydantic"}
    # The second rasteriser, not for ARM; faster kernels.
    optional = {"resvg", "flashinfer", "kestrel_kernels"}
    assert needed - there - brought_by_ray - optional == set()
    assert there - needed - {"ray"} == set(), "the image holds what its half never imports"


def test_only_the_model_image_has_torch_and_only_the_refiner_image_potrace():
    assert "torch" in requirements("model") and "torch" not in requirements("refiner")
    installs = {half: " ".join(values(stages(half)[-1], "RUN")) for half in DOCKERFILES}
    assert "libpotrace0" in installs["refiner"] and "libpotrace0" not in installs["model"]


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
# torch only looks whether there is one: no spec is the answer, not an error.
if "onnxruntime" in {missing!r}:
    sys.modules["onnxruntime"] = None
"""

MODEL = """
import asyncio, serve_graph.app, serve_graph.model
from kestrel.config import RuntimeConfig
from kestrel.engine import InferenceEngine
async def main():
    engine = await InferenceEngine.create(RuntimeConfig(device="cpu", refiner=None))
    await engine.shutdown()
asyncio.run(main())
"""

REFINER = """
import serve_graph.app
from kestrel.config import Limits, RefinerConfig
from serve_graph.refiner import RefinerDeployment
RefinerDeployment(RefinerConfig(), Limits(), 1, 30.0)
"""


@pytest.mark.parametrize(
    ("half", "program"),
    [("model", MODEL), ("refiner", REFINER)],
)
def test_a_half_runs_with_the_packages_of_its_image_alone(half, program):
    """The packages that only the other image names are away, and it does its self-check."""
    other = {"model": "refiner", "refiner": "model"}[half]
    away = set(requirements(other)) - set(requirements(half))
    missing = {MODULES.get(name, name) for name in away} | {"resvg"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing) + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
