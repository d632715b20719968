"""How soon an overloaded graph refuses, as a client sees it that does nothing else.

``benchmarks.overload`` runs this as a process of its own: whoever sends three times what a graph
can carry has a queue itself, and what waits there is not the graph's doing.

    python -m benchmarks.probe http://127.0.0.1:8000/v1/segment --seconds 60 < request.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

CONNECTIONS = 4
"""Each stays open and has one request at a time; one that is let in is not there to be refused."""
PAUSE_S = 0.1


def ask_again_and_again(
    url: str, body: bytes, deadline_s: float, until: float, found: list[dict[str, float]]
) -> None:
    """Requests on one connection until ``time.monotonic`` is ``until``: to ``found`` status,
    whether there was a ``Retry-After``, and seconds from sending to the last byte."""
    where = urlsplit(url)
    assert where.hostname is not None
    line = http.client.HTTPConnection(where.hostname, where.port, timeout=2 * deadline_s)
    headers = {
        "Content-Type": "application/json",
        "X-Request-Timeout-Ms": str(round(deadline_s * 1e3)),
    }
    line.connect()
    while time.monotonic() < until:
        sent = time.monotonic()
        try:
            line.request("POST", where.path, body, headers)
            answer = line.getresponse()
            answer.read()
            status, told = answer.status, answer.headers.get("Retry-After") is not None
        except (OSError, http.client.HTTPException):
            line.close()
            status, told = 0, False
        took = time.monotonic() - sent
        found.append({"status": status, "retry_after": told, "seconds": took})
        time.sleep(PAUSE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--deadline-s", type=float, default=10.0)
    options = parser.parse_args()
    body, found = sys.stdin.buffer.read(), list[dict[str, float]]()
    until = time.monotonic() + options.seconds
    threads = [
        threading.Thread(
            target=ask_again_and_again, args=(options.url, body, options.deadline_s, until, found)
        )
        for _ in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
