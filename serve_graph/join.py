"""``python -m serve_graph.join '{"gcs_address": ...}' FILE``: one more Ray node on the loopback
address; FILE is there once it has joined.

``ray start --address`` refuses to join a cluster that stays on 127.0.0.1, or takes the machine's
own address for it. This is what it does apart from that, as ``ray.cluster_utils`` does it too.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from ray._private.node import Node
from ray._private.parameter import RayParams


def main() -> None:
    """Start the node, wait for SIGTERM, stop it."""
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    node = Node(RayParams(**json.loads(sys.argv[1])), head=False)
    Path(sys.argv[2]).touch()
    signal.sigwait(stop)
    node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)


if __name__ == "__main__":
    main()
