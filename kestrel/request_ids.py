"""Ids that requests bring with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kestrel.errors import InvalidRequest

ID_PATTERN = "[A-Za-z0-9._:-]{1,128}"
ID_RULE = "at most 128 letters, digits, `.`, `_`, `:` and `-`"


def given_request_id(values: Sequence[str]) -> str | None:
    """The request's own id, from what its headers give as ``X-Request-Id``; None where they do not.

    Not replaced where it is not fit for a log: Ray Serve takes any, and the request would have two.
    """
    if values and (len(values) > 1 or not re.fullmatch(ID_PATTERN, values[0])):
        raise InvalidRequest(f"X-Request-Id must be one of {ID_RULE}", "X-Request-Id")
    return values[0] if values else None
