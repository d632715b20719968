"""API keys: what a configuration holds of them, and how many requests each may bring.

A configuration object never holds a key in the clear: a key that was written plainly is hashed when
it is read, so that no representation, log line or pickled copy can show it.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "sha256:"
HASHED = re.compile(re.escape(PREFIX) + r"[0-9a-f]{64}")
VISIBLE = re.compile(r"[!-~]+")
VISIBLE_RULE = "visible ASCII characters without spaces, as an HTTP header carries them"
SHORT_KEY_CHARS = 20
"""A key with fewer characters can be guessed from its hash."""

SLOWEST_RATE, LARGEST_RATE = 1e-6, 1e9
"""Bounds of ``rate_per_s``, requests per second, between which no wait or burst is infinite."""


def hash_key(key: str) -> str:
    """``sha256:`` and the SHA-256 of the key's UTF-8, 64 hexadecimal digits.

    The hash has no salt and is quick: it keeps a long random key secret, not a word.
    """
    return PREFIX + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def given_key(key: str, name: str) -> str:
    """A key as somebody gives it, without the line end of its file; ValueError, which does not show
    it, where no HTTP header could carry it."""
    key = key.strip()
    if not VISIBLE.fullmatch(key):
        raise ValueError(f"{name} must be {VISIBLE_RULE}")
    return key


def hash_key_command() -> str | None:
    """``python -m kestrel hash-key``: print the hash of the key on standard input (a terminal is
    asked for it without echo). Gives what is wrong with the key, never the key."""
    key = getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.read()
    try:
        key = given_key(key, "the key")
    except ValueError as error:
        return str(error)
    if len(key) < SHORT_KEY_CHARS:
        print(
            f"warning: a key of fewer than {SHORT_KEY_CHARS} characters can be guessed from its "
            "hash; `openssl rand -hex 32` makes one that cannot",
            file=sys.stderr,
        )
    print(hash_key(key))
    return None


@dataclass(frozen=True)
class ApiKey:
    """One key that opens the HTTP door, with its share of the service."""

    hashed: str = field(repr=False)
    """``sha256:`` and 64 hexadecimal digits."""
    name: str = ""
    """What the key is called in logs."""
    rate_per_s: float | None = None
    """Requests per second in the long run; None: no bound."""
    burst: int = 1
    """Requests that may come at once after a pause."""
    plain: bool = False
    """Whether the configuration had it in the clear."""


def parse_keys(entries: Any) -> tuple[ApiKey, ...]:
    """The keys of a configuration, from a list or a tuple of entries.

    An entry is a string (``sha256:...`` or the key itself), a mapping with ``key`` and, when
    wanted, ``name``, ``rate_per_s`` and ``burst``, or an ``ApiKey``. ValueError names the entry by
    its position and never shows it.
    """
    if not isinstance(entries, (list, tuple)):
        raise ValueError("api_keys must be a list")
    keys = tuple(_parse(entry, f"api_keys[{i}]") for i, entry in enumerate(entries))
    seen: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key.hashed in seen:
            raise ValueError(f"api_keys[{i}] is the same key as api_keys[{seen[key.hashed]}]")
        seen[key.hashed] = i
    return keys


def _parse(entry: Any, where: str) -> ApiKey:
    if isinstance(entry, ApiKey):
        return entry
    if isinstance(entry, str):
        entry = {"key": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a string or a mapping with key")
    known = ("key", "name", "rate_per_s", "burst")
    if any(part not in known for part in entry):
        raise ValueError(f"{where} has an unknown part; known are {', '.join(known)}")
    key, name = entry.get("key"), entry.get("name")
    if not isinstance(key, str) or not VISIBLE.fullmatch(key):
        raise ValueError(f"{where}.key must be {VISIBLE_RULE}")
    if key.startswith(PREFIX) and not HASHED.fullmatch(key):
        raise ValueError(f"{where}.key must be sha256: and 64 lower-case hexadecimal digits")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{where}.name must be a string or null")
    rate, burst = entry.get("rate_per_s"), entry.get("burst")
    if rate is not None and not (_is_number(rate) and SLOWEST_RATE <= rate <= LARGEST_RATE):
        raise ValueError(
            f"{where}.rate_per_s must be a number of requests per second, "
            f"{SLOWEST_RATE:g} to {LARGEST_RATE:g}, or null"
        )
    if burst is not None and (
        isinstance(burst, bool) or not isinstance(burst, int) or not 1 <= burst <= LARGEST_RATE
    ):
        raise ValueError(f"{where}.burst must be an integer, 1 to {LARGEST_RATE:g}")
    if burst is not None and rate is None:
        raise ValueError(f"{where}.burst needs rate_per_s")
    plain = not key.startswith(PREFIX)
    return ApiKey(
        hashed=hash_key(key) if plain else key,
        name=name or where,
        rate_per_s=None if rate is None else float(rate),
        burst=burst or max(1, math.ceil(rate or 1)),
        plain=plain,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def find_key(offered: str, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The configured key that ``offered`` is. Every key is compared, in constant time, so that how
    long it takes tells nothing about which one came close."""
    hashed = hash_key(offered).encode()
    found = [key for key in keys if hmac.compare_digest(hashed, key.hashed.encode())]
    return found[0] if found else None


def plain_key_warning(keys: Iterable[ApiKey]) -> str | None:
    """What to tell an operator whose configuration has keys in the clear; None when it has none."""
    names = [key.name for key in keys if key.plain]
    if not names:
        return None
    return (
        f"{', '.join(names)}: in the clear in the configuration; write the hash in its place, "
        "which `python -m kestrel hash-key < file-with-the-key` prints"
    )


class RateLimits:
    """A token bucket for every key that has a rate, kept by one process.

    ``share`` gives the part, over 0 to 1, of each rate and burst that this process may admit: 1
    where it is the only one.
    """

    def __init__(
        self,
        share: Callable[[], float] = lambda: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share, self._clock = share, clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """By key: requests that may come now, and when that was true, seconds."""

    def wait_s(self, key: ApiKey | None) -> float:
        """0 and one request counted, or the seconds after which the next one will be admitted."""
        if key is None or key.rate_per_s is None:
            return 0.0
        rate, now = key.rate_per_s * self._share(), self._clock()
        most = max(1.0, key.burst * self._share())
        left, since = self._buckets.get(key.hashed, (most, now))
        left = min(most, left + (now - since) * rate)
        admitted = left >= 1
        self._buckets[key.hashed] = (left - admitted, now)
        return 0.0 if admitted else (1 - left) / rate
