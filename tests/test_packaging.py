"""Installs that cannot work, walls of the house with a hole, a namesake that nobody mentions."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from project import PROJECT, ROOT, pins

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def test_the_pythons_are_those_that_the_project_claims() -> None:
    claimed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{n}" for n in range(20) if f"3.{n}" in claimed] == list(PYTHONS)


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pinned_release_refuses_a_python_that_the_project_claims(python: str) -> None:
    looked_at = 0
    for name, release in pins(python).items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another Python
        if installed.version == release:
            looked_at += 1
            needs = SpecifierSet(installed.metadata.get("Requires-Python") or "")
            assert f"{python}.9" in needs, f"{name} {release} needs Python {needs}"
    assert looked_at > 50


def test_extras_are_there_and_the_public_engine_is_no_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {"serve", "gpu", "kestrel-kernels", "pypotrace", "hq-sam", "dev"} <= set(extras)
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    assert PROJECT["name"] != "kestrel"
    assert not any(line.split(">")[0].split("=")[0].strip() == "kestrel" for line in lines)


# The namesake


def imported(*paths: Path) -> str:
    """What importing the package says, with ``paths`` before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import kestrel"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        cwd="/",
    )
    return done.stderr


def test_the_public_engine_beside_ours_is_said_at_import(tmp_path: Path) -> None:
    folder = tmp_path / "kestrel-0.9.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kestrel\nVersion: 0.9.1\n")
    said = imported(tmp_path)
    assert "RuntimeWarning" in said and "'kestrel' 0.9.1" in said and "pip uninstall" in said
    assert imported() == ""


# Walls


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a file imports; ``at_import``: not those that its functions import later."""
    left: list[ast.AST] = [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (at_import and later) and not types:
            left += ast.iter_child_nodes(node)


def importers(package: str, folder: str = "kestrel") -> set[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {
        str(file.relative_to(ROOT))
        for file in files
        if any(name.split(".")[0] == package for name in imports(file))
    }


def test_the_library_knows_nothing_of_ray_or_the_graph() -> None:
    assert importers("ray") == importers("serve_graph") == set()


def test_the_refiner_loads_no_torch_when_it_is_imported() -> None:
    for file in (ROOT / "kestrel" / "seg_refiner").rglob("*.py"):
        names = {name.split(".")[0] for name in imports(file, at_import=True)}
        assert "torch" not in names, file


@pytest.mark.parametrize(
    "package",
    ["flashinfer", "kestrel_kernels", "transformers", "resvg", "skia", "huggingface_hub"],
)
def test_an_optional_part_is_imported_by_one_module_at_most(package: str) -> None:
    assert len(importers(package)) <= 1
    assert importers(package, "serve_graph") == set()


def test_no_page_shows_a_picture_or_links_a_file_that_is_not_there() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, (page.name, missing)
