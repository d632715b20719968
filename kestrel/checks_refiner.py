"""The doctor's checks of what the refiner works with, and of the refiner itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from kestrel.diagnosis import Finding, Machine, Wanted, bad, line_of, ok


def check_torchvision(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    torch, vision = machine.version("torch"), machine.version("torchvision")
    needed = wanted.refiner is not None and wanted.refiner.refiner == "hq-sam"
    if torch is None:
        return
    # 0.N + 15 belongs to torch 2.N.
    match = re.match(r"2\.(\d+)", torch)
    pair = f"0.{int(match[1]) + 15}" if match else "of the same day"
    remedy = f"pip install --no-deps 'torchvision=={pair}.*' (without --no-deps pip changes torch)"
    if vision is None:
        if needed:
            yield bad("torchvision", "not installed; hq-sam imports it", remedy)
        else:
            yield ok("torchvision", "not installed, not needed")
    elif match and not vision.startswith(pair + "."):
        text = f"{vision} does not belong to torch {torch}"
        yield bad("torchvision", text, remedy, needed=needed)
    else:
        yield ok("torchvision", f"{vision}, belongs to torch {torch}")


def check_tracers(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    if wanted.refiner is None:
        return
    tracers = machine.load("kestrel.seg_refiner.tracers")
    chosen = wanted.refiner.tracer
    yield from _first_of(
        "tracer",
        ("libpotrace", "pypotrace", "potracer") if chosen == "auto" else (chosen,),
        tracers.load_tracer,
        "there is no package named potrace: apt-get install libpotrace0, or pip install potracer",
    )


def check_rasterizers(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    if wanted.refiner is None:
        return
    resvg = machine.version("resvg")
    old = resvg is not None and resvg.startswith("0.1")
    if old:
        remedy = "pip install --only-binary :all: 'resvg>=0.2,<0.3' (wheels, no Rust needed)"
        yield bad("resvg", f"{resvg} has another interface and no wheel", remedy)
    raster = machine.load("kestrel.seg_refiner.raster")
    chosen = wanted.refiner.rasterizer
    yield from _first_of(
        "rasterizer",
        ("skia", "resvg") if chosen == "auto" else (chosen,),
        raster.load_rasterizer,
        "pip install skia-python, or pip install --only-binary :all: 'resvg>=0.2,<0.3'",
    )


def _first_of(
    subject: str, names: tuple[str, ...], load: Callable[[str], Any], remedy: str
) -> Iterator[Finding]:
    """The first that loads; a warning for those that would be faster."""
    reasons = []
    for name in names:
        try:
            load(name)
        except ImportError as error:
            reasons.append(line_of(error))
            continue
        text = f"{name} does the work"
        if reasons:
            yield bad(subject, text, f"faster: {'; '.join(reasons)}", needed=False)
        else:
            yield ok(subject, text)
        return
    yield bad(subject, "; ".join(reasons), remedy)


def check_opencv(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    try:
        cv2 = machine.load("cv2")
    except (ImportError, OSError) as error:
        remedy = "pip install opencv-python-headless (the other build needs libGL)"
        yield bad("OpenCV", f"does not load ({line_of(error)})", remedy)
        return
    yield ok("OpenCV", cv2.__version__)
