"""``python -m serve_graph.join '{"gcs_address": ...}' FILE``: one more Ray node on the loopback
address; FILE is there once it has joined.

``ray start --address`` refuses to join a cluster that stays on 127.0.0.1, or takes the machine's
own address for it. This is what it does apart from that, as ``ray.cluster_utils`` does it too.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from ray._private.node import Node
from ray._private.parameter import RayParams

LOOK_S = 0.2
"""How often it looks whether it is to stop, seconds: the signal may reach a thread of Ray's."""


def main() -> None:
    """Start the node, wait for SIGTERM, stop it."""
    told: list[int] = []
    node = Node(RayParams(**json.loads(sys.argv[1])), head=False)
    # Not blocked, or Ray's daemons would inherit that and have to be killed. Until here Ray's own
    # handler ends them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    Path(sys.argv[2]).touch()
    while not told:
        time.sleep(LOOK_S)
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    main()
