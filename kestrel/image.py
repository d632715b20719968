"""Encoded bytes or an array to an RGB array, within limits.

While a picture is decoded, it takes at its peak, result included, at most so many bytes per pixel:
JPEG 8, JPEG of several scans 13, PNG 8 (up to 28 where it is a few pixels wide or high), WebP 17.
``benchmarks/decode_memory.py`` measures that.
Pictures over ``LARGE_PIXELS`` are decoded one at a time in a process.

JPEG can be decoded to a half, a quarter or an eighth of its sides in less time and memory: each
pixel then is about the mean of those that it stands for (libjpeg's scaled DCT).
"""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kestrel.api import InvalidRequest, TooLarge
from kestrel.config import Limits
from kestrel.exif import exif_orientation, first_directory
from kestrel.image_parts import (
    JPEG,
    PNG,
    check_count,
    check_parts,
    jpeg_exif,
    late_exif,
    without_disposal,
    without_exif,
)

UInt8Array = npt.NDArray[np.uint8]
PixelBox = tuple[int, int, int, int]
FORMATS = ("JPEG", "PNG", "WEBP")
LARGE_PIXELS = 16_000_000
"""Larger pictures take turns: threads that decode several at once would multiply the peak."""
_TURN = threading.Lock()
_BAND_PIXELS = 2**18
"""Pixels that are converted at once, about: what a conversion needs beside its result."""
REDUCTIONS = (8, 4, 2, 1)
"""By what the sides of a JPEG may be divided while it is decoded."""
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_SWAPS_SIDES = (5, 6, 7, 8)
_FROM_THE_RIGHT, _FROM_BELOW = (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations whose columns, whose rows are turned round once sides are swapped."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation."""
_END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says; width and height in pixels, orientation applied."""

    width: int
    height: int
    format: str
    reduction: int = 1
    """The largest of ``REDUCTIONS`` that :func:`decode` takes for it."""


def _open(data: bytes, limits: Limits, name: str) -> tuple[Image.Image, int]:
    """The picture before its pixels are decoded, and its orientation, 1 to 8."""
    check_parts(data, name)
    file, has_exif = without_exif(data, name)
    without_disposal(data, file)
    try:
        image = _reader(data)(file)
    except Image.DecompressionBombError as error:  # of a WebP, whose reader makes the whole canvas
        raise TooLarge(
            f"{name} has too many pixels; the limit is {limits.max_image_pixels} in all", name
        ) from error
    except (SyntaxError, IndexError, TypeError, struct.error) as error:
        raise InvalidRequest(f"{name} is not a JPEG, PNG or WebP image", name) from error
    except Exception as error:  # decoders raise many types for broken headers
        raise InvalidRequest(f"{name} cannot be read ({type(error).__name__})", name) from error
    _check_pixels(image.width, image.height, limits, name)
    return image, _orientation(image, data, has_exif, name)


def _reader(data: bytes) -> type[ImageFile.ImageFile]:
    """Of the file's format. ``Image.open`` would look at the size first, with a limit and warnings
    that are the process's; and go through the index of a JPEG of several pictures, of which the
    first is wanted."""
    if data.startswith(JPEG):
        return JpegImageFile
    if data.startswith(PNG):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    raise SyntaxError("another format")


def _check_pixels(width: int, height: int, limits: Limits, name: str) -> None:
    if width < 1 or height < 1:
        raise InvalidRequest(f"{name} has no pixels", name)
    if width * height > limits.max_image_pixels:
        raise TooLarge(
            f"{name} is {width} x {height} pixels; the limit is {limits.max_image_pixels} in all",
            name,
        )


def probe(data: bytes, limits: Limits | None = None, name: str = "image") -> ImageHeader:
    """Read the header only.

    Raises ``InvalidRequest`` (not an image of a known format) or ``TooLarge`` (pixel limit).
    """
    image, orientation = _open(data, limits or Limits(), name)
    with image:
        width, height = image.size
        if orientation in _SWAPS_SIDES:
            width, height = height, width
        kind = str(image.format)
        reduction = _largest_reduction(width, height, orientation) if kind == "JPEG" else 1
        return ImageHeader(width, height, kind, reduction)


def _orientation(picture: Image.Image, data: bytes, has_exif: bool, name: str) -> int:
    """EXIF's or else XMP's, 1 to 8; 1 without one, or where the block is broken, which is no reason
    to refuse the picture. For one whose pixels are not decoded: that may find more. ``has_exif``:
    what ``without_exif`` says.

    It is what Pillow's ``getexif`` says, which would read all of the block.
    """
    try:
        directory = first_directory(_exif(picture, data, has_exif))
    except ValueError:
        return 1
    found = None
    if directory is not None:
        check_count(directory.entries, name)
        found = exif_orientation(directory)
    if found is None:
        found = _xmp_orientation(picture)
    return found if found is not None and 1 <= found <= 8 else 1


def _exif(picture: Image.Image, data: bytes, has_exif: bool) -> bytes:
    """The picture's EXIF block, empty without one; ``ValueError`` where it is no bytes."""
    if data.startswith(JPEG):
        return (jpeg_exif(data) or b"") if has_exif else b""
    block = late_exif(data)
    if block is None:
        block = picture.info.get("exif")
    if block is None:
        # As ImageMagick writes it: name and length, then lines of hexadecimal digits.
        lines = picture.info.get("Raw profile type exif", "").split("\n")
        block = bytes.fromhex("".join(lines[3:]))
    if not isinstance(block, bytes):
        raise ValueError("a text that is called EXIF")
    return block


def _xmp_orientation(picture: Image.Image) -> int | None:
    """What Pillow takes for it: the digit after the first of that name."""
    xmp = picture.info.get("XML:com.adobe.xmp") or picture.info.get("xmp") or b""
    found = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(found[1]) if found else None


def _largest_reduction(width: int, height: int, orientation: int) -> int:
    """Width and height in pixels, orientation applied."""

    def fits(reduction: int) -> bool:
        # Where it is not a whole number of pixels the last one stands for fewer. Turned round, it
        # would be the first, and all others would lie elsewhere.
        return (
            min(width, height) >= reduction
            and not (orientation in _FROM_THE_RIGHT and width % reduction)
            and not (orientation in _FROM_BELOW and height % reduction)
        )

    return next(filter(fits, REDUCTIONS))


def check_array(image: Any, limits: Limits | None = None, name: str = "image") -> None:
    """``InvalidRequest`` unless ``image`` is uint8 [H, W, 3]; ``TooLarge`` past the pixel limit."""
    if not isinstance(image, np.ndarray):
        raise InvalidRequest(
            f"{name} must be encoded bytes or an HxWx3 uint8 array, not {type(image).__name__}",
            name,
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InvalidRequest(
            f"{name} must be an HxWx3 uint8 array, not {list(image.shape)} {image.dtype}", name
        )
    _check_pixels(image.shape[1], image.shape[0], limits or Limits(), name)


def decode(
    image: bytes | UInt8Array,
    limits: Limits | None = None,
    name: str = "image",
    reduction: int = 1,
) -> UInt8Array:
    """RGB uint8 [H, W, 3], contiguous, EXIF orientation applied; arrays are checked and passed on.

    Grey, palette, CMYK, alpha (dropped, as ``PIL.Image.convert`` does) and 16-bit (scaled to 8)
    are accepted; of an animation the first frame. A truncated or broken image is refused. Waits
    while another thread decodes a large picture, if this one is large too.

    ``reduction``, a power of two up to ``ImageHeader.reduction``: a JPEG comes with
    ``ceil(H / reduction)`` rows and ``ceil(W / reduction)`` columns, whose pixel ``[i, j]`` stands
    for those from ``[i * reduction, j * reduction]`` on. The limits are for the sides of the file.
    """
    limits = limits or Limits()
    if not isinstance(image, bytes):
        check_array(image, limits, name)
        return np.ascontiguousarray(image)
    picture, orientation = _open(image, limits, name)
    with picture:
        large = picture.width * picture.height > LARGE_PIXELS
        with _TURN if large else contextlib.nullcontext():
            try:
                fast = _fast_jpeg(image, picture, orientation, reduction)
                if fast is not None:
                    return fast
                if reduction > 1:
                    width, height = picture.size
                    picture.draft(None, (width // reduction, height // reduction))
                picture.load()
            except MemoryError:
                raise
            except Exception as error:  # decoders raise many types for broken data
                raise InvalidRequest(
                    f"{name} cannot be decoded: it is truncated or broken", name
                ) from error
            return _rgb(picture, orientation)


def plain_jpeg(
    image: bytes, limits: Limits | None = None, name: str = "image"
) -> tuple[tuple[int, int], int] | None:
    """Width and height as stored, and EXIF's orientation, of a file that ends as it began: as a
    baseline JPEG in colour; None for another. Refuses what :func:`probe` refuses."""
    picture, orientation = _open(image, limits or Limits(), name)
    with picture:
        if not _is_whole_jpeg(image, picture) or "progressive" in picture.info:
            return None
        return picture.size, orientation


def stored_box(box: PixelBox, size: tuple[int, int], orientation: int) -> PixelBox:
    """Where a file of this width and height has the box of the picture as it is seen."""
    x0, y0, x1, y1 = box
    width, height = size[::-1] if orientation in _SWAPS_SIDES else size
    if orientation in _FROM_THE_RIGHT:
        x0, x1 = width - x1, width - x0
    if orientation in _FROM_BELOW:
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation in _SWAPS_SIDES else (x0, y0, x1, y1)


def _rgb(picture: Image.Image, orientation: int) -> UInt8Array:
    """Pixels of a loaded picture as they are meant to be seen, converted in bands of rows: Pillow
    holds up to 4 bytes per pixel, and each step from there to an array would hold as many again."""
    width, height = picture.size
    swapped = orientation in _SWAPS_SIDES
    pixels = np.empty((width, height, 3) if swapped else (height, width, 3), np.uint8)
    stored = _stored(pixels, orientation)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        if orientation in _TURNS:
            band = band.transpose(_TURNS[orientation])
        place = turned(stored[top : top + rows], orientation)
        if band.mode.startswith("I"):
            # 16-bit grey: Pillow's own conversion clips at 255, the high byte is meant.
            place[:] = np.clip(np.asarray(band) >> 8, 0, 255)[:, :, None]
        else:
            place[:] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _is_whole_jpeg(content: bytes, opened: Image.Image) -> bool:
    """Whether it is one in colour, and ends as one does."""
    return opened.format == "JPEG" and opened.mode == "RGB" and content[-2:] == _END_OF_JPEG


def _fast_jpeg(
    content: bytes, opened: Image.Image, orientation: int, reduction: int = 1
) -> UInt8Array | None:
    """What Pillow would give, in less than half the time; None for what it had better look at.

    Both have libjpeg-turbo decode; OpenCV leaves out several copies of the picture. It does not
    say when data is missing, so only files that end as a JPEG does are given to it.
    """
    if not _is_whole_jpeg(content, opened):
        return None
    try:
        import cv2
    except ImportError:
        return None

    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    width, height = -(-opened.width // reduction), -(-opened.height // reduction)
    if decoded is None or decoded.shape != (height, width, 3):
        return None
    pixels = np.asarray(decoded, np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):  # it copies what it converts in place
        band = pixels[top : top + rows]
        cv2.cvtColor(band, cv2.COLOR_BGR2RGB, dst=band)
    return np.ascontiguousarray(turned(pixels, orientation))


def turned(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """The picture as it is meant to be seen, as a view; EXIF's orientations are 1 to 8."""
    if orientation in _SWAPS_SIDES:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in _FROM_BELOW:
        pixels = pixels[::-1]
    if orientation in _FROM_THE_RIGHT:
        pixels = pixels[:, ::-1]
    return pixels


def _stored(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """The inverse of ``turned``, as a view: rows and columns as the file has them."""
    if orientation in _FROM_THE_RIGHT:
        pixels = pixels[:, ::-1]
    if orientation in _FROM_BELOW:
        pixels = pixels[::-1]
    return pixels.transpose(1, 0, 2) if orientation in _SWAPS_SIDES else pixels
