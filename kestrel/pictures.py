"""Images on their way into the model: decoded and cropped by worker threads, each one once, and
what the model makes of them kept for further questions."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

from kestrel.config import RuntimeConfig
from kestrel.cores import give_way, usable_cores
from kestrel.image import decode as decode_image
from kestrel.image import probe
from kestrel.moondream.config import VisionConfig
from kestrel.moondream.crops import crop_reduction, overlap_crops

CROP_THREADS = 4
"""Images that are prepared at once, at most, one for each core. No core is left to the engine's
thread: rows that share a step need it less than their pictures do."""
KEEP_PIXELS = 8_000_000
"""Larger pictures are not held for the refiner, which then decodes them again."""
KEEP_SIDE = 2047
"""Nor those with a longer side of the kind that it may decode smaller than they are: its answer
would depend on whether they are held."""
HELD_BYTES = 256 * 2**20
"""Decoded pictures held for the refiner, bytes in all: eleven of the largest, ninety of a
megapixel. Those past it are decoded again too."""


class Picture:
    """One image, shared by all requests about it while any of them lives."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        """Digest of its content."""
        self.prepared = False
        """Whether the worker threads are done with it."""
        self.crops: np.ndarray | None = None
        """uint8 [N, S, S, 3] until the model has encoded them."""
        self.tiling = (1, 1)
        self.pixels: np.ndarray | None = None
        """uint8 [H, W, 3], held for the refiner; None: to be decoded again."""
        self.features: list[Tensor] = []
        """What the vision tower gave for the first crops."""
        self.prefix: Tensor | None = None
        """Keys and values of BOS and the image."""
        self.error: BaseException | None = None


class Asking(Protocol):
    """A request as far as its image goes."""

    @property
    def image(self) -> bytes | np.ndarray | None: ...

    picture: Picture | None
    cancelled: bool
    error: BaseException | None


Encode = Callable[[np.ndarray, tuple[int, int]], Tensor]
"""Crops uint8 [N, S, S, 3] of an image and their tiling to keys and values of BOS and image."""


class Pictures:
    """Prepares pictures and remembers prefixes, the least recently used forgotten first.

    ``wake`` guards all of it, and is notified whenever a picture is prepared.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: RuntimeConfig,
        wake: threading.Condition,
        encode: Encode | None = None,
    ) -> None:
        """``encode``: run by the worker threads, several at once; without it pictures are left as
        crops for the engine's thread."""
        self._encode = encode
        self._vision = vision
        self._limits = config.limits
        self._keep_pixels = config.refiner is not None
        self._budget = config.image_cache_bytes
        self._wake = wake
        self._live: WeakValueDictionary[bytes, Picture] = WeakValueDictionary()
        self._held: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
        """Pixels that are held for the refiner, by identity, for as long as anybody has them."""
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.kept_bytes = 0
        self._cores = usable_cores()
        self._filling = 0
        """Pictures that worker threads prepare at the moment."""
        threads = min(CROP_THREADS, self._cores)
        self._line: deque[Asking] = deque()
        """Requests that no worker thread has taken up yet: not in the executor's queue, which
        would hold those that are gone, and their images."""
        self._workers = ThreadPoolExecutor(threads, "crop", initializer=give_way)

    @property
    def free_cores(self) -> int:
        """Cores besides those that prepare pictures, for the engine's thread and others."""
        return max(0, self._cores - self._filling)

    def prepare(self, asking: Asking) -> None:
        """Begin to find or make the picture of a request, in a worker thread. Within ``wake``."""
        self._line.append(asking)
        self._workers.submit(self._prepare_next)

    def drop(self, asking: Asking) -> None:
        """Forget a request that is gone; a picture that is begun is made. Within ``wake``."""
        with contextlib.suppress(ValueError):  # a thread has it, or had
            self._line.remove(asking)

    def keep(self, picture: Picture) -> None:
        """Remember an encoded picture's prefix, within the budget."""
        prefix = picture.prefix
        assert prefix is not None
        with self._wake:
            if prefix.nbytes > self._budget or picture.key in self._kept:
                return
            self._kept[picture.key] = prefix
            self.kept_bytes += prefix.nbytes
            while self.kept_bytes > self._budget:
                self.kept_bytes -= self._kept.popitem(last=False)[1].nbytes

    def forget(self) -> None:
        """Drop every prefix that is remembered."""
        with self._wake:
            self._kept.clear()
            self.kept_bytes = 0

    def close(self) -> None:
        """Take no more work; what is under way ends by itself. Idempotent."""
        with self._wake:
            self._line.clear()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _prepare_next(self) -> None:
        with self._wake:
            asking = self._line.popleft() if self._line else None
        if asking is not None:
            self._prepare(asking)

    def _prepare(self, asking: Asking) -> None:
        try:
            image = asking.image
            assert image is not None
            if asking.cancelled:
                return
            if isinstance(image, np.ndarray):
                # The caller's own, who may write into it as soon as his request is over: others
                # about the same picture go on with what is made of it.
                image = image.copy()
            key = digest(image)
            with self._wake:
                picture = self._live.get(key)
                asking.picture = picture or self._found(key)
                self._wake.notify()
                done = picture is not None or asking.picture.prepared
                self._filling += not done
            if not done:
                self._fill(asking.picture, image)
        except BaseException as error:  # a worker thread has nobody else to tell
            with self._wake:
                asking.error = error
                self._wake.notify()

    def _found(self, key: bytes) -> Picture:
        """A picture that nobody asks about yet, with its prefix if that is remembered."""
        picture = self._live[key] = Picture(key)
        if key in self._kept:
            self._kept.move_to_end(key)
            picture.prefix = self._kept[key]
            picture.prepared = True
        return picture

    def _fill(self, picture: Picture, image: bytes | np.ndarray) -> None:
        try:
            reduction, extent, most = 1, None, 1
            if isinstance(image, bytes):
                header = probe(image, self._limits)
                width, height, most = header.width, header.height, header.reduction
                # A large JPEG, decoded and shrunk, takes several times as long whole.
                reduction = crop_reduction(width, height, most, self._vision)
                extent = height / reduction, width / reduction
            pixels = decode_image(image, self._limits, reduction=reduction)
            picture.crops, picture.tiling = overlap_crops(pixels, self._vision, extent)
            if picture.tiling == (1, 1):
                picture.crops = picture.crops[:1]
            if reduction == 1 and (most == 1 or max(pixels.shape) <= KEEP_SIDE):
                self._hold(picture, pixels)
            if self._encode is not None:
                picture.prefix = self._encode(picture.crops, picture.tiling)
                picture.crops = None
                self.keep(picture)
        except BaseException as error:  # every request about it is told
            picture.error = error
        with self._wake:
            if picture.error is not None:
                # It may be no fault of the picture; its error, and so itself, may be kept for long.
                self._live.pop(picture.key, None)
            self._filling -= 1
            picture.prepared = True
            self._wake.notify()

    def _hold(self, picture: Picture, pixels: np.ndarray) -> None:
        """Leave whole pixels to the refiner, within the budget."""
        if not self._keep_pixels or pixels.shape[0] * pixels.shape[1] > KEEP_PIXELS:
            return
        with self._wake:
            held = sum(other.nbytes for other in self._held.values())
            if held + pixels.nbytes > HELD_BYTES:
                return
            self._held[id(pixels)] = pixels
            picture.pixels = pixels


def digest(image: bytes | np.ndarray) -> bytes:
    """Names an image by its content."""
    shape = b"" if isinstance(image, bytes) else str(image.shape).encode()
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
    return hashlib.blake2b(content, digest_size=16, salt=shape[:16]).digest()
