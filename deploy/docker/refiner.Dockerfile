# The head and a node of the refiner pool: the CPU half and the ingress, no torch.
#   docker build -f deploy/docker/refiner.Dockerfile -t segment-refiner:0.1.0 .
# libpotrace and potracer are GPL: mind it when you pass this image on.

FROM python:3.11.14-slim-bookworm AS build
WORKDIR /build
COPY constraints.txt deploy/docker/refiner-requirements.txt ./
# Into a folder of its own, so that only what is installed reaches the final stage.
RUN pip install --no-cache-dir --prefix=/install -c constraints.txt -r refiner-requirements.txt
COPY pyproject.toml README.md ./
COPY kestrel ./kestrel
COPY serve_graph ./serve_graph
RUN pip install --no-cache-dir --prefix=/install --no-deps .

FROM python:3.11.14-slim-bookworm
# libpotrace traces; the others are what Skia links to.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libpotrace0 libgl1 libegl1 libexpat1 \
    && rm -rf /var/lib/apt/lists/*
# /usr/local and no virtual environment: a login shell that starts Ray keeps this PATH.
COPY --from=build /install /usr/local
# Read when Ray starts, on every node alike: serve_graph/environment.py says what each is for.
ENV RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH=2147483647 \
    RAY_SERVE_ENABLE_DIRECT_INGRESS=1 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=5 \
    RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S=120 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/usr/local/bin/segment-haproxy \
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 \
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.25 \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2 \
    RAY_raylet_start_wait_time_s=120 \
    RAY_worker_niceness=0 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=134217728 \
    GRPC_ENABLE_FORK_SUPPORT=0 \
    RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S=120 \
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=70 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --create-home ray
USER 1000:1000
WORKDIR /home/ray
