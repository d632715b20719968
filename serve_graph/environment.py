"""What Ray and Serve read from the environment when they start, the same on every node.

The one place for it: ``LocalCluster`` sets it, ``python -m serve_graph env`` prints it for nodes
that somebody else starts, and the tests hold the images and the KubeRay manifest to it.
"""

from __future__ import annotations

FAST_SERVE = {
    # Handles call replicas over gRPC on their own event loop: a third less latency per request and
    # nearly twice the requests per second of Serve's defaults on two cores. Ray reads these once,
    # when it starts, on every node.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Largest of these calls and of their answers, bytes: the most that gRPC knows, as pictures are
    # bounded by ``limits.max_body_bytes``. Over Serve's 4 MiB each call would count as a replica
    # that was lost.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
    # Without HAProxy, direct ingress only adds a listener per ingress replica and half a minute of
    # draining to every update.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}

HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
AFTER_DEADLINE_S = 15
"""How much longer than its deadline a request may be under way, seconds: its answer has 10 to be
read."""

HAPROXY_ON = "RAY_SERVE_ENABLE_HA_PROXY"

HAPROXY = {
    # HAProxy in place of Serve's Python proxy, straight to the ingress replicas: half the latency
    # that is left, twice the requests per second. HTTP stays on ``http_options.host``. With it goes
    # ``RAY_SERVE_HAPROXY_BINARY_PATH``: where a node has the program of ``serve_graph.haproxy``.
    HAPROXY_ON: "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    # How long an ingress replica that is to go stays open for HAProxies that have not heard of it,
    # seconds: they hear within one, and try another where it refuses. Ray's 30 prolong updates.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # How long requests may go on in a HAProxy that Serve has replaced, as it does whenever ingress
    # replicas come or go, seconds; then they are cut. Ray's own value, enough for a
    # ``request_timeout_s`` of up to 105: over that it takes ``AFTER_DEADLINE_S`` more than that.
    HARD_STOP: "120",
}

SERVE_PROXY = {
    # Serve's Python proxy, where HAProxy is turned off: also where an image or an earlier
    # ``serve_graph env`` has turned it on.
    HAPROXY_ON: "0",
    # By default it asks the ingress replicas of its own node alone while they have room, so that
    # one door would let through only their share of an API key's rate.
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
}

CALM = {
    # How long Serve's controller rests between two looks at its deployments, seconds: replicas
    # that died, and autoscaling, wait. With Ray's 0.1 it takes twice as much CPU where nothing
    # happens, a twentieth of a slow core, which replicas on the same machine lack.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
}

PATIENCE = {
    # How long the HTTP door may take to start before Serve kills it, seconds: Ray's 5 are short
    # where all cores are taken, and Serve then refuses the config.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # How often Serve looks whether a node's HTTP door lives, seconds; the third failure has it
    # started anew. Ray's 10 leave a node without a door for half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # How long a node may take to join before it gives up, seconds.
    "RAY_raylet_start_wait_time_s": "120",
    # By default Ray's workers, the replicas among them, yield to every other program.
    "RAY_worker_niceness": "0",
}

KEEP_MEMORY = {
    # Pictures and masks of every request take arrays of a megabyte, which the C library otherwise
    # gets from the kernel and gives back each time: 1,600 page faults and a quarter of the time of
    # a refinement. Larger ones than the first, bytes, still go back at once; up to the second of
    # free memory stays with each process. Other C libraries than glibc ignore these.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "134217728",
}

STEADY_CLIENT = {
    # The Ray Client server forks a process for each client that connects. gRPC's fork handlers
    # take locks that other threads hold at that moment: the child then aborts before it runs
    # ("Starting Ray client server failed"), one connection in seven on two busy cores. Nothing
    # goes on calling gRPC after a fork, so that it needs no handlers.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # How long that process may take to listen, seconds; Ray's 30 are short on a busy machine.
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",
}

LOOPBACK = {
    # Ray's own switch for clusters that must not leave the machine: every daemon then binds
    # 127.0.0.1 in place of the machine's address. Drivers need it too (see client.py).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

DRAIN_S = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

DRAIN = {
    # How long a node that is told to go (SIGTERM to ``ray start --block``) lets its replicas finish
    # at most, seconds: over the longest of them, the ingress (``GraphArgs.ingress_drain_s``, 65
    # with the shipped configs). Ray's 30 would cut its requests.
    DRAIN_S: "70",
}

BEFORE_RAY = {**FAST_SERVE, **CALM, **PATIENCE, **KEEP_MEMORY, **STEADY_CLIENT, **DRAIN}
"""What every cluster has. ``HAPROXY`` comes on top, or ``SERVE_PROXY`` where it is turned off, and
``LOOPBACK`` on one machine."""
