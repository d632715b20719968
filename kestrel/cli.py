"""The command line: segment one picture, serve, or check the machine."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kestrel import __version__
from kestrel.answers import segment_response
from kestrel.api import (
    ModelResult,
    RequestError,
    SegmentRequest,
    validate_segment,
)
from kestrel.api_keys import hash_key_command
from kestrel.config import ConfigError, RefinerConfig, RuntimeConfig
from kestrel.folders import made_writable, unreadable
from kestrel.ports import is_port
from kestrel.serve_config import names_a_host

if TYPE_CHECKING:
    from kestrel.seg_refiner.result import SegmentRefineBitmapsResult

BAD_INPUT = 2
"""Exit status, the one that argparse uses too."""
FAILED = 1
KEEP_ALIVE_S = 90
"""An idle connection is closed after this, seconds: longer than a load balancer keeps it, which
else sends a request into its end. The graph's configs have the same."""


class InputError(Exception):
    """Something that the caller gave cannot be used; the message says what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    arguments = _parser().parse_args(_bound(sys.argv[1:] if argv is None else argv))
    try:
        if arguments.command == "hash-key":
            if (wrong := hash_key_command()) is not None:
                raise InputError(wrong)
            return 0
        if arguments.command == "doctor":
            from kestrel.doctor import doctor_command

            return doctor_command(arguments.config)
        config = _config(arguments)
        _tell_of_compiling()
        if arguments.command == "serve":
            return _serve(config, arguments.host, arguments.port)
        return _segment(config, arguments)
    except (InputError, ConfigError, RequestError) as error:
        print(f"kestrel: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count


def _bound(argv: Sequence[str]) -> list[str]:
    """``argv`` with the numbers that follow ``--spatial-ref`` made one argument with it: argparse
    takes those that begin with a dash for options, and would call them missing."""
    bound: list[str] = []
    for argument in argv:
        if bound and bound[-1] == "--spatial-ref" and re.match(r"-[\d.]", argument):
            bound[-1] += f"={argument}"
        else:
            bound.append(argument)
    return bound


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kestrel", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model-path", metavar="P", help="checkpoint; default: the shipped model")
    common.add_argument("--refiner", default="boundary", help="boundary (default), guided, ...")
    common.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")

    segment = commands.add_parser("segment", parents=[common], help="segment one picture")
    segment.add_argument("image", type=Path, help="JPEG, PNG or WebP file")
    segment.add_argument("noun", help="what to segment; quote one of several words")
    segment.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the answer's files",
    )
    segment.add_argument(
        "--spatial-ref",
        action="append",
        metavar="x,y | x0,y0,x1,y1",
        help="a point or a box in 0..1; may be given several times",
    )

    serve = commands.add_parser("serve", parents=[common], help="serve HTTP from this process")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0: a free one (8000)")

    doctor = commands.add_parser("doctor", help="check that this machine can serve a config")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="Serve config (YAML)")

    commands.add_parser("hash-key", help="read an API key from stdin, print its hash for a config")
    return parser


def _tell_of_compiling() -> None:
    """A first start takes a minute in which nothing else is said."""
    from kestrel.ops.jit import log

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kestrel: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _config(arguments: argparse.Namespace) -> RuntimeConfig:
    from kestrel.seg_refiner.backends import find_backend

    find_backend(arguments.refiner)
    config = RuntimeConfig(
        model_path=arguments.model_path,
        device=arguments.device,
        refiner=RefinerConfig(refiner=arguments.refiner),
    )
    if config.model_path is not None:
        problem = unreadable(Path(config.model_path))
        if problem is not None:
            raise InputError(problem)
    return config


# segment


def _segment(config: RuntimeConfig, arguments: argparse.Namespace) -> int:
    try:
        image = arguments.image.read_bytes()
    except OSError as error:
        raise InputError(f"{arguments.image} cannot be read: {error.strerror}") from error
    request = validate_segment(
        object=arguments.noun,
        image=image,
        spatial_refs=[_spatial_ref(text) for text in arguments.spatial_ref or ()],
        return_base64=True,
        limits=config.limits,
        refiners=config.refiners,
        image_field=str(arguments.image),
    )
    problem = made_writable(arguments.output)
    if problem is not None:  # before the model is loaded
        raise InputError(f"the folder {arguments.output} (--output) {problem}")
    model, refined, load_ms = asyncio.run(_answer(config, request, arguments.image))
    started = time.perf_counter()
    try:
        _write(arguments.output, request, model, refined, config)
    except OSError as error:
        where = error.filename or arguments.output
        raise InputError(f"{where} cannot be written: {error.strerror}") from error
    write_ms = (time.perf_counter() - started) * 1e3
    stages = {
        "load": load_ms,
        "prefill": model.metrics.prefill_time_ms,
        "model decode": model.metrics.decode_time_ms,
    }
    if refined is not None:
        # The refiner's own decode is that of the picture, not of tokens.
        named = {"decode": "image decode"}
        stages |= {named.get(stage, stage): ms for stage, ms in refined.timings_ms.items()}
    for stage, ms in (stages | {"write": write_ms}).items():
        print(f"{stage:<13}{ms:>9.1f} ms")
    return 0


def _spatial_ref(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--spatial-ref {text!r} is not x,y or x0,y0,x1,y1") from None


async def _answer(
    config: RuntimeConfig, request: SegmentRequest, picture: Path
) -> tuple[ModelResult, SegmentRefineBitmapsResult | None, float]:
    from kestrel.engine import InferenceEngine

    started = time.perf_counter()
    try:
        engine = await InferenceEngine.create(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model cannot be loaded: {_one_line(error)}") from error
    load_ms = (time.perf_counter() - started) * 1e3
    try:
        model, refined = await engine.complete(request)
        return model, refined, load_ms
    except RequestError as error:
        raise InputError(f"{picture}: {error}") from error
    finally:
        await engine.shutdown()


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _write(
    folder: Path,
    request: SegmentRequest,
    model: ModelResult,
    refined: SegmentRefineBitmapsResult | None,
    config: RuntimeConfig,
) -> None:
    import cv2

    from kestrel.image import decode
    from kestrel.overlay import decode_mask, overlay

    answer: dict[str, Any] = segment_response(model, refined, return_base64=True)
    # First: no picture to look at is to keep the answer from being written.
    (folder / "response.json").write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")
    if not answer["path"] and "parse_error" not in answer:
        print(f"the model finds no {request.object!r} in the picture", file=sys.stderr)
    masks = {}
    for kind in ("coarse", "refined"):
        target = folder / f"{kind}.png"
        encoded = answer.get(f"{kind}_mask_base64")
        if encoded is None:
            target.unlink(missing_ok=True)  # not to leave an earlier run's mask
            print(f"no {kind} mask: {refined.reason if refined else 'no refiner'}", file=sys.stderr)
            continue
        target.write_bytes(base64.b64decode(encoded))
        masks[kind] = decode_mask(encoded)
    assert request.image is not None
    picture = overlay(
        decode(request.image, config.limits), masks.get("coarse"), masks.get("refined")
    )
    # OpenCV's own file writer fails silently; bytes are written here instead.
    done, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise InputError(f"{folder / 'overlay.png'} cannot be encoded; the other files are written")
    (folder / "overlay.png").write_bytes(png.tobytes())


# serve


def _serve(config: RuntimeConfig, host: str, port: int) -> int:
    import uvicorn

    from kestrel.job import EngineEnded
    from kestrel.server.connection import protocol
    from kestrel.server.http import create_app
    from kestrel.server.sending import send_by

    if not names_a_host(host):  # the empty one is every interface
        raise InputError(f"--host must be a name or an address, not {host!r}")
    if not is_port(port):
        raise InputError(f"--port must be in 0..65535, not {port}")
    failures: list[Exception] = []

    def stop(failure: Exception) -> None:
        failures.append(failure)
        server.should_exit = True

    app = create_app(config, on_failure=stop)
    # No request that came before the end takes longer; a connection that nobody reads from would.
    longest_s = math.ceil(send_by(config.request_timeout_s))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=cast("type[asyncio.Protocol]", protocol),
            timeout_graceful_shutdown=longest_s,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
    server.run()
    if failures and isinstance(failures[0], EngineEnded):
        print(f"kestrel: {_one_line(failures[0])}", file=sys.stderr)
        return FAILED  # whoever supervises this process is to start it again
    if failures:
        raise InputError(f"the model cannot be loaded: {_one_line(failures[0])}")
    return 0 if server.started else FAILED
