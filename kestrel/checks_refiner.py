"""The doctor's checks of what the refiner works with, and of the refiner itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kestrel.config import ConfigError, RefinerConfig
from kestrel.diagnosis import (
    TRACEBACK,
    Finding,
    Machine,
    Wanted,
    bad,
    causes,
    line_of,
    ok,
    out_of_memory,
)

log = logging.getLogger(__name__)

INSTALL = {
    "cv2": "pip install opencv-python-headless",
    "onnxruntime": "pip install 'onnxruntime>=1.18'",
    "torch": "pip install torch, as the line on torch says",
    "transformers": "pip install '.[hq-sam]'",
}
"""By the module that does not load."""
SETTINGS = {
    "hq-sam": "refiner.hq_sam_model",
    "seghead": "refiner.seghead_weights or seghead_vision",
}
"""What a backend cannot be without."""


def check_torchvision(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Nothing here calls it, but transformers, which hq-sam runs on, import it where it is."""
    torch, vision = machine.version("torch"), machine.version("torchvision")
    needed = wanted.refiner is not None and "hq-sam" in wanted.refiner.loaded
    if torch is None:
        return
    # 0.N + 15 belongs to torch 2.N.
    match = re.match(r"2\.(\d+)", torch)
    pair = f"0.{int(match[1]) + 15}" if match else "of the same day"
    remedy = f"pip install --no-deps 'torchvision=={pair}.*' (without --no-deps pip changes torch)"
    if vision is None:
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
    raster = machine.load("kestrel.seg_refiner.raster")
    chosen = wanted.refiner.rasterizer
    names = ("skia", "resvg") if chosen == "auto" else (chosen,)
    resvg = machine.version("resvg")
    if resvg is not None and resvg.startswith("0.1"):
        paints = names == ("resvg",) or not _loads(raster.load_rasterizer, "skia")
        needed = "resvg" in names and paints
        remedy = "pip install --only-binary :all: 'resvg>=0.2,<0.3' (wheels, no Rust needed)"
        yield bad("resvg", f"{resvg} has another interface and no wheel", remedy, needed=needed)
        if needed:
            return
    yield from _first_of(
        "rasterizer",
        names,
        raster.load_rasterizer,
        "pip install skia-python, or pip install --only-binary :all: 'resvg>=0.2,<0.3'",
    )


def _loads(load: Callable[[str], Any], name: str) -> bool:
    try:
        load(name)
    except ImportError:
        return False
    return True


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


def check_refiners(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    """Build and try every backend that the configuration loads, as its server does at the start."""
    if wanted.refiner is None:
        return
    config = wanted.refiner.served_with(wanted.runtime)
    for name in config.loaded:
        yield _refiner(replace(config, refiner=name, selectable=()), wanted)


def _refiner(config: RefinerConfig, wanted: Wanted) -> Finding:
    """``config`` loads one backend alone."""
    subject = f"refiner {config.refiner}"
    try:
        from kestrel.seg_refiner import SegmentRefiner

        SegmentRefiner(config, limits=wanted.runtime.limits).self_check()
    except Exception as error:  # backends may be of the user's own
        return bad(subject, line_of(error), _remedy(config.refiner, error))
    return ok(subject, "refines the built-in picture")


def _remedy(name: str, error: Exception) -> str:
    without = f"take {name} out of refiner.refiner and refiner.selectable"
    if out_of_memory(error) is not None:
        return f"free memory, set refiner.device: cpu, or {without}"
    for cause in causes(error):
        if type(cause).__name__ in ("RasterizerMissing", "TracerMissing"):
            return "see rasterizer and tracer above"
        missing = (cause.name or "").split(".")[0] if isinstance(cause, ImportError) else ""
        if missing in INSTALL:
            return f"{INSTALL[missing]}, or {without}"
    if isinstance(error, ConfigError):
        return f"set {SETTINGS[name]}, or {without}" if name in SETTINGS else without
    log.error("the refiner %s does not work", name, exc_info=error)
    return f"{TRACEBACK}, or {without}"
