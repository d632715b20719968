"""The segment skill: noun and spatial refs to a prompt, decoded tokens to a path and its box.

A model answers with its box (two coordinate tokens for the centre, one size token) and then spells
SVG path data on an integer grid relative to the box, one command letter, integer or minus sign a
token. Everything here is total: any token sequence gives a result, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kestrel.api import Bbox, BboxEvent, PathDelta, SegmentRequest, SegmentSettings, SpatialRef
from kestrel.config import Limits
from kestrel.moondream.config import PromptConfig
from kestrel.moondream.tokens import SegmentTokenizer

__all__ = ["Prompt", "SegmentRequest", "SegmentSettings", "SegmentState", "build_prompt"]

ARITY = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}
DECIMALS = 4
"""Of a path in 0..1: a tenth of a grid step of 960."""


@dataclass
class Prompt:
    """A prompt in order, BOS and image left out: token ids, ("coord", x) and ("size", (w, h))."""

    steps: list[int | tuple[str, float] | tuple[str, tuple[float, float]]]


def build_prompt(
    noun: str,
    refs: list[SpatialRef] | None,
    tokenizer: SegmentTokenizer,
    prompt: PromptConfig,
) -> Prompt:
    """``[prefix] [refs: x, y (, size) each] [noun] [answer]``; a box is given by its centre."""
    steps: list = list(prompt.segment_prefix)
    for ref in refs or []:
        if len(ref) == 2:
            steps += [("coord", ref[0]), ("coord", ref[1])]
        else:
            x0, y0, x1, y1 = ref
            steps += [("coord", (x0 + x1) / 2), ("coord", (y0 + y1) / 2)]
            steps.append(("size", (x1 - x0, y1 - y0)))
    return Prompt([*steps, *tokenizer.encode_object(noun), prompt.answer_id])


@dataclass
class _Frame:
    """Maps grid integers of the model's box to 0..1 of the box that is given out.

    The model's box may reach over the edge of the image; the given one is clipped to it, and the
    path is mapped so that it stays where the model put it.
    """

    bbox: Bbox
    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def of(cls, centre: tuple[float, float], size: tuple[float, float], grid: int) -> _Frame:
        spans, scale, offset = [], [], []
        for middle, extent in zip(centre, size, strict=True):
            low, high = middle - extent / 2, middle + extent / 2
            inner_low = min(max(low, 0.0), 1.0)
            inner_high = max(min(max(high, 0.0), 1.0), inner_low)
            inner = max(inner_high - inner_low, 1e-9)
            spans.append((inner_low, inner_high))
            scale.append((high - low) / grid / inner)
            offset.append((low - inner_low) / inner)
        (x_min, x_max), (y_min, y_max) = spans
        bbox = {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max}
        return cls(bbox, (scale[0], scale[1]), (offset[0], offset[1]))

    def command(self, letter: str, arguments: list[int]) -> str:
        """One whole command in 0..1 path data."""
        relative = letter.islower()
        out = []
        for i, value in enumerate(arguments):
            kind = _axis(letter.upper(), i)
            if kind is None:
                out.append(str(value))
            else:
                shift = 0.0 if relative or kind[1] else self.offset[kind[0]]
                out.append(_short(value * self.scale[kind[0]] + shift))
        return letter + " ".join(out)


def _axis(letter: str, index: int) -> tuple[int, bool] | None:
    """(0 for x or 1 for y, whether it is a length) of an argument; None for angles and flags."""
    if letter == "H":
        return 0, False
    if letter == "V":
        return 1, False
    if letter == "A":
        return {0: (0, True), 1: (1, True), 5: (0, False), 6: (1, False)}.get(index)
    return index % 2, False


def _short(value: float) -> str:
    text = f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


@dataclass
class SegmentState:
    """Reads the tokens of one answer as they come.

    ``decode_text`` gives the text of a path token ("" for anything else).
    """

    prompt: PromptConfig
    decode_text: Callable[[int], str]
    limits: Limits = field(default_factory=Limits)

    token_ids: list[int] = field(default_factory=list)
    path_tokens: list[str] = field(default_factory=list)
    points: list[tuple[float, float]] = field(default_factory=list)
    sizes: list[tuple[float, float]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    parse_error: str | None = None
    finished: bool = False

    _centre: list[float] = field(default_factory=list)
    _frame: _Frame | None = None
    _letter: str = ""
    _used: bool = True
    """Whether the current letter has had its arguments at least once."""
    _numbers: list[int] = field(default_factory=list)
    _minus: bool = False

    @property
    def phase(self) -> int:
        """What comes next: 0 a coordinate or the end, 1 a coordinate, 2 a size, 3 path text."""
        return min(len(self.token_ids), 3)

    def feed(self, token_id: int, value: tuple[float, ...] = ()) -> list[BboxEvent | PathDelta]:
        """Take one token (with its value, if it is a coordinate or a size); what became whole."""
        if self.finished:
            return []
        phase = self.phase
        self.token_ids.append(token_id)
        special = self.prompt
        if token_id == special.eos_id:
            self.finished = True
            return []
        if phase < 2 and token_id == special.coord_id and len(value) == 1:
            self._centre.append(value[0])
            if phase == 1:
                self.points.append((self._centre[0], self._centre[1]))
            return []
        if phase == 2 and token_id == special.size_id and len(value) == 2:
            self.sizes.append((value[0], value[1]))
            self._frame = _Frame.of(self.points[0], self.sizes[0], special.path_grid)
            return [BboxEvent(dict(self._frame.bbox))]
        if phase < 3:
            return self._broken(f"token {token_id} where the box was to come")
        text = self.decode_text(token_id)
        if not text:
            return self._broken(f"token {token_id} is no path text")
        self.path_tokens.append(text)
        return self._read(text)

    def _broken(self, why: str) -> list[BboxEvent | PathDelta]:
        self.parse_error = why
        self.finished = True
        return []

    def _read(self, text: str) -> list[BboxEvent | PathDelta]:
        if text == "-":
            if self._minus or not self._letter:
                return self._broken("a minus sign without a number")
            self._minus = True
            return []
        if text.isdigit():
            return self._number(int(text))
        if self._numbers or self._minus or not self._used:
            return self._broken(f"{self._letter} lacks arguments before {text}")
        if not self._letter and text.upper() != "M":
            return self._broken(f"a path starts with M, not {text}")
        self._letter, self._used = text, False
        return self._whole([]) if ARITY[text.upper()] == 0 else []

    def _number(self, number: int) -> list[BboxEvent | PathDelta]:
        letter = self._letter.upper()
        if not letter or ARITY[letter] == 0:
            return self._broken(f"the number {number} belongs to no command")
        number = -number if self._minus else number
        self._minus = False
        if letter == "A" and len(self._numbers) in (3, 4) and number not in (0, 1):
            return self._broken(f"{number} is no arc flag")
        self._numbers.append(number)
        if len(self._numbers) < ARITY[letter]:
            return []
        numbers, self._numbers = self._numbers, []
        return self._whole(numbers)

    def _whole(self, arguments: list[int]) -> list[BboxEvent | PathDelta]:
        if len(self.chunks) >= self.limits.max_path_commands:
            return self._broken(f"more than {self.limits.max_path_commands} commands")
        letter = self._letter
        self._used = True
        # Pairs that follow a move draw lines; the chunk says so, to be whole on its own.
        if letter in "Mm":
            self._letter = "L" if letter == "M" else "l"
        if self._frame is None:  # the box always comes first: see ``feed``
            return self._broken("a path without a box")
        chunk = self._frame.command(letter, arguments)
        self.chunks.append(chunk)
        return [PathDelta(chunk, len(self.token_ids))]

    def close(self, truncated: bool) -> None:
        """No token comes any more; ``truncated`` when a limit ended the answer."""
        if truncated and self.parse_error is None:
            self.parse_error = "the path was cut off by the token limit"
        elif self.parse_error is None and (self._numbers or self._minus or not self._used):
            self.parse_error = f"the path ends inside {self._letter or 'a number'}"
        elif self.parse_error is None and 0 < len(self.token_ids) < 4 and self._centre:
            self.parse_error = "the answer ends inside the box"
        self.finished = True

    @property
    def path(self) -> str:
        """What could be read, as path data in 0..1 relative to ``bbox``."""
        return "".join(self.chunks)

    @property
    def bbox(self) -> Bbox | None:
        """The model's box, clipped to the image; None when it gave none."""
        return dict(self._frame.bbox) if self._frame else None

    @property
    def text(self) -> str:
        """The path as the model spelled it, tokens separated by spaces, on its own grid."""
        return " ".join(self.path_tokens).replace("- ", "-")
