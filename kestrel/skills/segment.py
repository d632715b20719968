"""The segment skill: a noun to prompt tokens, decoded tokens to a box and an SVG path.

A request decodes as: coordinate token (centre x), coordinate token (centre y), size token, then
text tokens that spell the path, then EOS. EOS in the first place means that nothing was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from kestrel.api import (
    Bbox,
    BboxEvent,
    InvalidRequest,
    PathDelta,
    PromptTooLong,
    SegmentRequest,
    SegmentSettings,
)
from kestrel.config import Limits
from kestrel.moondream.config import MoondreamConfig, PromptConfig
from kestrel.moondream.tokens import SegmentTokenizer
from kestrel.svg import ARITY, SvgPathError, parse_path

__all__ = [
    "Coord",
    "Phase",
    "Prompt",
    "SegmentDecode",
    "SegmentRequest",
    "SegmentSettings",
    "Size",
    "Token",
    "build_prompt",
]

DECIMALS = 5
"""Of coordinates: a tenth of a pixel in a box of 10,000."""
ARC_DECIMALS = 8
"""Of an arc's radii and rotation: radii that do not reach are scaled up until they do (SVG 1.1,
F.6.6), and their rounding with them."""
MAX_DIGITS = 9
"""Digits of one integer; a longer one is no coordinate."""


class Coord(NamedTuple):
    """A coordinate token: one axis, 0..1 of the image."""

    value: float


class Size(NamedTuple):
    """A size token: width and height, 0..1 of the image."""

    width: float
    height: float


Token = int | Coord | Size
"""A text token's id, or a region token with its value."""


@dataclass(frozen=True)
class Prompt:
    """A request as the model reads it: BOS, the image's embeddings if any, then ``tokens``."""

    tokens: list[Token]
    length: int
    """Positions in all, BOS and image included."""


def build_prompt(
    request: SegmentRequest, config: MoondreamConfig, tokenizer: SegmentTokenizer
) -> Prompt:
    """Prompt of a validated request.

    A point becomes two coordinate tokens; a box its centre and its size. Raises ``PromptTooLong``
    when no position of the context is left to answer in, ``InvalidRequest`` for an object with
    a token that the model has no embedding of: the tokenizer may know more than the model.
    """
    special = config.prompt
    tokens: list[Token] = [*special.segment_prefix]
    for ref in request.spatial_refs or ():
        if len(ref) == 2:
            tokens += [Coord(ref[0]), Coord(ref[1])]
        else:
            x_min, y_min, x_max, y_max = ref
            tokens += [Coord((x_min + x_max) / 2), Coord((y_min + y_max) / 2)]
            tokens.append(Size(x_max - x_min, y_max - y_min))
    of_refs = len(tokens) - len(special.segment_prefix)
    noun = tokenizer.encode_object(request.object)
    if max(noun, default=0) >= config.text.vocab_size:
        raise InvalidRequest(
            "object holds a token that is not in the model's vocabulary of "
            f"{config.text.vocab_size}",
            "object",
        )
    tokens += noun
    tokens.append(special.answer_id)
    length = 1 + (config.vision.n_patches if request.image is not None else 0) + len(tokens)
    context = config.text.max_context
    if length >= context:
        raise PromptTooLong(
            f"the prompt takes {length} positions; the model's context of {context} must also "
            "hold the answer",
            "spatial_refs" if length - of_refs < context else "object",
        )
    return Prompt(tokens, length)


class _Malformed(Exception):
    """The tokens spell no SVG path."""


@dataclass(frozen=True)
class _Frame:
    """From the model's integer grid to 0..1 of the box that is given out.

    The model draws on its own box, which may reach over the edge of the image; the box that is
    given out is cut off there, and the path keeps its place. Per axis: scale and offset.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]

    def written(self, letter: str, numbers: list[int]) -> str:
        """One whole command as path data."""
        if letter in "Aa":
            return letter + " ".join(self._arc(numbers, letter.islower()))
        axes = (1,) if letter in "Vv" else (0, 1)
        return letter + " ".join(
            self._scaled(value, axes[place % len(axes)], letter.islower())
            for place, value in enumerate(numbers)
        )

    def _arc(self, numbers: list[int], relative: bool) -> Iterator[str]:
        rx, ry, rotation, *flags, x, y = numbers
        for flag in flags:
            if flag not in (0, 1):
                raise _Malformed(f"an arc's flag is {flag}, not 0 or 1")
        if rotation % 180 == 0 or self.scale[0] == self.scale[1]:
            turned: tuple[float, float, float] = rx * self.scale[0], ry * self.scale[1], rotation
        else:
            turned = _stretched(rx, ry, rotation, self.scale)
        for value in turned:
            yield _decimal(value, ARC_DECIMALS)
        yield from map(str, flags)
        yield from (self._scaled(x, 0, relative), self._scaled(y, 1, relative))

    def _scaled(self, value: int, axis: int, length: bool) -> str:
        return _decimal(value * self.scale[axis] + (0.0 if length else self.offset[axis]))


def _decimal(value: float, decimals: int = DECIMALS) -> str:
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _stretched(
    rx: float, ry: float, rotation: float, scale: tuple[float, float]
) -> tuple[float, float, float]:
    """Radii and rotation, degrees, of a turned ellipse whose axes are scaled apart.

    It is the unit circle under the matrix scale · rotation · radii, so its radii are the singular
    values, turned as the left singular vectors are: J. Blinn, "Consider the lowly 2×2 matrix", IEEE
    Computer Graphics and Applications 16(2), 1996.
    """
    turn = math.radians(rotation % 360)
    (sx, sy), rx, ry = scale, abs(rx), abs(ry)
    a, b = sx * math.cos(turn) * rx, -sx * math.sin(turn) * ry
    c, d = sy * math.sin(turn) * rx, sy * math.cos(turn) * ry
    same, other = math.hypot(a + d, c - b) / 2, math.hypot(a - d, c + b) / 2
    angle = (math.atan2(c + b, a - d) + math.atan2(c - b, a + d)) / 2
    return same + other, abs(same - other), math.degrees(angle)


class _PathReader:
    """Path tokens, one at a time, to whole commands; every method raises ``_Malformed``."""

    def __init__(self, frame: _Frame) -> None:
        self._frame = frame
        self._letter = ""
        self._numbers: list[int] = []
        self._minus = False
        self._fed = True
        """Whether the letter has had its numbers at least once."""
        self.chunks: list[str] = []

    def feed(self, piece: str) -> str | None:
        """Take a command letter, an integer or ``-``; give the command that it completes, if any.

        Implicit repeats of a command come with their letter, so that every chunk stands alone.
        """
        if piece.isdecimal() and len(piece) <= MAX_DIGITS:
            return self._number(int(piece))
        if piece == "-":
            if self._minus:
                raise _Malformed("two minus signs")
            self._minus = True
            return None
        if piece.upper() not in ARITY:
            raise _Malformed(f"{piece[:16]!r} is no part of a path")
        self.finish()
        if not self.chunks and piece not in "Mm":
            raise _Malformed(f"the path begins with {piece}, not with M")
        self._letter, self._fed = piece, False
        return self._whole() if piece in "Zz" else None

    def finish(self) -> None:
        """Check that no command is open."""
        if self._minus:
            raise _Malformed("a minus sign without a number")
        if self._numbers or not self._fed:
            raise _Malformed(
                f"{self._letter} has {len(self._numbers)} of {ARITY[self._letter.upper()]} numbers"
            )

    def _number(self, value: int) -> str | None:
        if not self._letter or self._letter in "Zz":
            raise _Malformed(f"the number {value} stands where a command must")
        self._numbers.append(-value if self._minus else value)
        self._minus = False
        return self._whole() if len(self._numbers) == ARITY[self._letter.upper()] else None

    def _whole(self) -> str:
        # The first move is absolute also as ``m``, and has a place in the box (SVG 1.1, 8.3.2).
        letter = self._letter if self.chunks else "M"
        chunk = self._frame.written(letter, self._numbers)
        self.chunks.append(chunk)
        self._numbers, self._fed = [], True
        # Further pairs of a move are lines (SVG 1.1, 8.3.2).
        self._letter = {"M": "L", "m": "l"}.get(self._letter, self._letter)
        return chunk


class Phase(IntEnum):
    """What the grammar allows next."""

    FIRST = 0
    """Centre x, or EOS: nothing found."""
    CENTRE_Y = 1
    SIZE = 2
    TEXT = 3
    """Any text token: neither a coordinate nor a size."""
    DONE = 4


@dataclass
class SegmentDecode:
    """One request's answer as it is decoded. ``push`` takes any tokens and never raises."""

    prompt: PromptConfig
    tokenizer: SegmentTokenizer
    max_tokens: int
    limits: Limits = field(default_factory=Limits)
    phase: Phase = Phase.FIRST
    finish_reason: str = "stop"
    parse_error: str | None = None
    bbox: Bbox | None = None
    """The model's box, clipped to the image."""
    output_tokens: int = 0
    """Every sampled token, EOS included."""
    token_ids: list[int] = field(default_factory=list)
    """Text tokens without EOS."""
    path_tokens: list[str] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    """The box's centre, unclipped."""
    sizes: list[tuple[float, float]] = field(default_factory=list)
    _centre: list[float] = field(default_factory=list)
    _reader: _PathReader | None = None

    def push(self, token: Token) -> BboxEvent | PathDelta | None:
        """Take the next sampled token; give what it completes. Phase DONE ends the request."""
        if self.phase is Phase.DONE:
            return None
        self.output_tokens += 1
        event: BboxEvent | PathDelta | None = None
        try:
            event = self._text(token) if self.phase is Phase.TEXT else self._region(token)
        except _Malformed as error:
            # What follows can never make it a path again: the slot is better given to another.
            self._end(f"not an SVG path: {error}")
        if self.phase is not Phase.DONE and self.output_tokens >= self.max_tokens:
            self.finish_reason = "length"
            self._end(f"cut off after {self.output_tokens} tokens")
        return event

    @property
    def path(self) -> str:
        """SVG path data in 0..1 relative to ``bbox``: what could be read."""
        return "".join(self._reader.chunks) if self._reader is not None else ""

    @property
    def text(self) -> str:
        """The path as the model spelled it, numbers on its own grid."""
        return " ".join(self.path_tokens).replace("- ", "-")

    def _end(self, error: str | None = None) -> None:
        self.phase = Phase.DONE
        self.parse_error = error

    def _region(self, token: Token) -> BboxEvent | None:
        if self.phase is Phase.FIRST and token == self.prompt.eos_id:
            self._end()
            return None
        if self.phase is Phase.SIZE:
            if not isinstance(token, Size):
                raise _Malformed("the third token is no size")
            return self._box(token)
        if not isinstance(token, Coord):
            raise _Malformed("the first two tokens are no coordinates")
        self._centre.append(token.value)
        self.phase = Phase(self.phase + 1)
        return None

    def _box(self, size: Size) -> BboxEvent:
        self.points.append((self._centre[0], self._centre[1]))
        self.sizes.append((size.width, size.height))
        edges: list[tuple[float, float]] = []
        scale, offset = [], []
        for centre, extent in zip(self._centre, size, strict=True):
            low, high = centre - extent / 2, centre + extent / 2
            inner_low, inner_high = max(low, 0.0), min(high, 1.0)
            inner = inner_high - inner_low
            if not inner > 0:
                raise _Malformed("the box lies outside the image")
            edges.append((inner_low, inner_high))
            scale.append((high - low) / inner / self.prompt.path_grid)
            offset.append((low - inner_low) / inner)
        (x_min, x_max), (y_min, y_max) = edges
        self.bbox = {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max}
        self._reader = _PathReader(_Frame((scale[0], scale[1]), (offset[0], offset[1])))
        self.phase = Phase.TEXT
        return BboxEvent(dict(self.bbox))

    def _text(self, token: Token) -> PathDelta | None:
        assert self._reader is not None
        if not isinstance(token, int):
            raise _Malformed("a coordinate or size within the path")
        if token == self.prompt.eos_id:
            self._end_of_path(self._reader)
            return None
        self.token_ids.append(token)
        if token < self.prompt.first_path_id:
            return None
        piece = self.tokenizer.decode_path_token(token)
        if not piece:
            raise _Malformed(f"token {token} is no part of a path")
        self.path_tokens.append(piece)
        if len(self._reader.chunks) >= self.limits.max_path_commands:
            raise _Malformed(f"more than {self.limits.max_path_commands} segments")
        chunk = self._reader.feed(piece)
        return PathDelta(chunk, self.output_tokens) if chunk is not None else None

    def _end_of_path(self, reader: _PathReader) -> None:
        reader.finish()
        if not reader.chunks:
            raise _Malformed("a box and no path; is this checkpoint trained for segmentation?")
        try:
            # The grammar's own judge has the last word, its limits included.
            parse_path(self.path, self.limits)
        except SvgPathError as error:
            raise _Malformed(str(error)) from error
        self._end()
