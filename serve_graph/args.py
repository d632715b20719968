"""The ``args`` block of a Serve config: typed, with unknown keys refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from kestrel.api_keys import ApiKey, parse_keys, plain_key_warning
from kestrel.busy import at_full_speed
from kestrel.config import (
    LONGEST_TIMEOUT_S,
    ConfigError,
    Limits,
    RefinerConfig,
    RuntimeConfig,
    from_mapping,
)
from kestrel.serve_config import applications_of

FULL_RETRY_S = 0.05
"""How long a handle at most waits until it asks full replicas again, seconds. Serve's own 0.5 would
leave them idle for most of it, where answers take less."""


LARGEST_COUNT = 2**31 - 1
"""Serve keeps counts of replicas and requests in 32 bits."""
RAY_S_OWN = ("CPU", "GPU", "memory", "object_store_memory", "bundle")
"""Names that Ray takes for no custom resource."""


def _in_grains(value: float) -> float:
    if value and value * 10_000 < 1:
        raise ValueError(f"must be 0 or at least 0.0001, not {value:g}: Ray counts no finer")
    return value


Amount = Annotated[float, Field(ge=0), AfterValidator(_in_grains)]
"""Of a resource that one replica reserves."""
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


class Settings(BaseModel):
    """What an operator sets: no unknown key, and every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Pool(Settings):
    """How many replicas of one deployment, what each holds, and how long its queue may get."""

    num_cpus: Amount = 1.0
    """Logical CPUs that one replica reserves (0: none, it is only placed by memory)."""
    num_gpus: Amount = 0.0
    """GPUs that one replica reserves; a fraction under 1 shares a GPU between replicas."""
    min_replicas: int = Field(default=1, ge=0, le=LARGEST_COUNT)
    """Replicas kept when idle. At least 1, but for refiners: a model takes longer to load than any
    request waits."""
    max_replicas: Count = 1
    """Replicas at most. Equal to ``min_replicas``: a fixed pool, no autoscaling."""
    target_ongoing_requests: float = Field(default=2.0, gt=0)
    """Autoscaling aims at this many running and queued requests per replica."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """Load must stay high this long before a replica is added, seconds."""
    downscale_delay_s: float = Field(default=300.0, ge=0)
    """Load must stay low this long before a replica is removed, seconds."""
    metrics_interval_s: float = Field(default=2.0, gt=0)
    """How often load is reported to the autoscaler, seconds."""
    look_back_period_s: float = Field(default=10.0, gt=0)
    """The autoscaler sees the mean load of this long, seconds."""
    max_ongoing_requests: Count = 16
    """Requests that one replica runs at once."""
    max_queued_requests: Count = 64
    """Requests that may wait, per caller, for a free replica; more are refused (503)."""
    graceful_shutdown_timeout_s: float = Field(default=20.0, gt=0)
    """A replica that is taken down may finish its requests for this long, seconds."""
    health_check_period_s: float = Field(default=3.0, gt=0)
    """Seconds between two health checks of a replica."""
    health_check_timeout_s: float = Field(default=8.0, gt=0)
    """A health check without an answer for this long has failed, seconds; after the third in a row
    the replica is replaced. One that hangs keeps its requests for ``graceful_shutdown_timeout_s``
    more; then they are tried elsewhere. So three periods and timeouts and that together should be
    some seconds shorter than ``runtime.request_timeout_s``."""
    resources: dict[str, Amount] = Field(default_factory=dict)
    """Custom Ray resources of one replica, to pin a pool to marked nodes."""
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    """Replicas of one node at most; 1 spreads a pool over the nodes."""

    @field_validator("num_gpus")
    @classmethod
    def _whole_gpus(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError(f"must be a whole number where it is over 1, not {value:g}")
        return value

    @field_validator("resources")
    @classmethod
    def _custom(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name in RAY_S_OWN:
                raise ValueError(
                    f"{name} is not a custom resource; CPUs and GPUs are num_cpus and num_gpus"
                )
            if not name.isascii():
                raise ValueError(f"{name!r} must be ASCII")
        return value

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Pool:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self

    @model_validator(mode="after")
    def _aim_can_be_held(self) -> Pool:
        if self.scales and self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests ({self.target_ongoing_requests:g}) must not exceed "
                f"max_ongoing_requests ({self.max_ongoing_requests}): no replica would ever run "
                "what scaling aims at"
            )
        return self

    @property
    def scales(self) -> bool:
        """Whether the number of replicas changes with the load."""
        return self.max_replicas > self.min_replicas

    def options(self, *, watched: bool = False) -> dict[str, Any]:
        """The keyword arguments of ``serve.deployment`` that give this pool.

        ``watched``: report load to the autoscaler even from a pool of fixed size, for the policies
        of others.
        """
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "request_router_config": {"max_backoff_s": FULL_RETRY_S},
            "backpressure_config": {"status_code": 503, "retry_after_s": 1.0},
            "ray_actor_options": {
                "num_cpus": self.num_cpus,
                "num_gpus": self.num_gpus,
                "resources": dict(self.resources),
            },
        }
        if self.max_replicas_per_node is not None:
            options["max_replicas_per_node"] = self.max_replicas_per_node
        if self.scales or watched:
            options["autoscaling_config"] = {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
                "upscale_delay_s": self.upscale_delay_s,
                "downscale_delay_s": self.downscale_delay_s,
                "metrics_interval_s": self.metrics_interval_s,
                "look_back_period_s": self.look_back_period_s,
            }
        else:
            options["num_replicas"] = self.min_replicas
        return options


class IngressPool(Pool):
    """The ingress pool; its replicas take in more than they hold, and refuse the rest."""

    num_cpus: Amount = 0.5
    max_ongoing_requests: Count = 1024
    """Requests that one replica runs at once, over ``runtime.max_held_requests``."""
    max_queued_requests: Count = 512


class LookAhead(Settings):
    """Aims of the look-ahead policy, for the refiner pool of an application that names it."""

    start_s: float = Field(default=10.0, gt=0)
    """How long a refiner takes from the decision to its first request, seconds: how far ahead the
    policy looks."""
    drain_s: float = Field(default=5.0, gt=0)
    """A queue should be gone this long after the replicas for it have started, seconds."""
    busy_target: float = Field(default=0.7, gt=0, le=1)
    """Part of what refiners can do that a steady load should take."""
    busy_s: float = Field(default=0.2, gt=0)
    """Seconds of one replica per refinement, until a refiner has measured it."""


class RefinerPool(Pool):
    """The refiner pool; it may shrink to nothing."""

    max_ongoing_requests: Count = 16
    """Requests that one replica holds: those it runs and some that wait, so that its threads never
    wait for the next."""
    threads: int = Field(default=2, ge=1)
    """Requests that one replica runs at once."""
    stuck_s: float = Field(default=30.0, gt=0)
    """A refinement that runs for longer fails the health check of its replica, seconds; after the
    third in a row the replica is replaced. Over ``refine_timeout_s``, after which nobody waits."""
    lookahead: LookAhead = LookAhead()
    """Used where the application's ``autoscaling_policy`` is ``serve_graph.autoscaling:Policy``."""

    @model_validator(mode="after")
    def _threads_have_work(self) -> RefinerPool:
        if self.threads > self.max_ongoing_requests:
            raise ValueError(
                f"threads ({self.threads}) must not exceed max_ongoing_requests "
                f"({self.max_ongoing_requests}): the rest would never run"
            )
        return self

    @property
    def at_once(self) -> float:
        """Refinements that one replica runs without slowing each other down."""
        return at_full_speed(self.num_cpus, self.threads)

    def options(self, *, watched: bool = False) -> dict[str, Any]:
        options = super().options(watched=watched)
        if "autoscaling_config" in options:
            # Read by serve_graph.autoscaling; the function itself is Serve's default.
            policy = {"policy_kwargs": self.lookahead.model_dump()}
            options["autoscaling_config"]["policy"] = policy
        return options


def _only_hashes(keys: Any) -> tuple[ApiKey, ...]:
    """The keys of a configuration. ValueError, which shows none, where one is in the clear: Serve
    shows and logs its config as it was written, and a key that was there is no secret any more."""
    parsed = parse_keys(keys)
    plain = plain_key_warning(parsed)
    if plain:
        raise ValueError(plain)
    return parsed


class IngressSettings(Settings):
    """The ``user_config`` of the deployment ``Ingress``: what changes without a new replica."""

    model_config = ConfigDict(hide_input_in_errors=True)

    refine_timeout_s: float | None = Field(default=None, gt=0)
    """In place of the one in ``args``."""
    api_keys: list[Any] | None = None
    """In place of ``args.runtime.api_keys``; hashes only."""
    draining: bool = False
    """Finish what is under way and refuse the rest (503): the graph is about to be stopped."""

    @field_validator("api_keys", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        return None if value is None else list(_only_hashes(value))


def refiner_settings(args: RefinerConfig, user_config: dict[str, Any]) -> RefinerConfig:
    """``args`` with the keys of the deployment ``Refiner``'s ``user_config`` in their place.

    What requests may choose from stays loaded: the ingress offers what ``args.refiner`` names, and
    does not hear of this. Raises ConfigError, which names the key, for one that does not fit.
    """
    if not isinstance(user_config, dict):
        raise ConfigError(f"user_config must be a mapping, not {user_config!r}")
    if "selectable" in user_config:
        raise ConfigError(
            "user_config.selectable: the ingress offers what args.refiner.selectable names; "
            "change it there"
        )
    given = {field.name: getattr(args, field.name) for field in fields(args)}
    config: RefinerConfig = from_mapping(RefinerConfig, {**given, **user_config}, "user_config")
    return replace(config, selectable=args.loaded)


def model_settings(user_config: dict[str, Any]) -> None:
    """ConfigError, which names the keys and their places, where the deployment ``Model``'s
    ``user_config`` holds any: a model that is loaded changes in nothing."""
    if user_config:
        keys = ", ".join(f"user_config.{key}" for key in user_config)
        raise ConfigError(
            f"{keys}: the deployment Model takes no user_config; change args.runtime or "
            "args.model_pool, which replaces its replicas"
        )


def known_backends(config: RefinerConfig) -> None:
    """ConfigError for a backend's name that nothing is registered as. Those that are named by where
    they are may be on the refiners' machines alone, and so may the refiner's libraries: a refiner
    says itself, as it starts, what it does not find."""
    try:
        from kestrel.seg_refiner.backends import find_backend
    except ImportError:
        return
    for name in config.loaded:
        if ":" not in name:
            find_backend(name)


def gpu_for(config: RefinerConfig, pool: Pool) -> None:
    """ValueError where a backend is to run on a GPU of which its replicas get none."""
    uses = any(name in ("seghead", "hq-sam") or ":" in name for name in config.loaded)
    if uses and config.device.startswith("cuda") and not pool.num_gpus:
        raise ValueError("refiner.device is cuda, so refiner_pool.num_gpus must be over 0")


POOLS = {"Ingress": "ingress_pool", "Model": "model_pool", "Refiner": "refiner_pool"}
"""The deployments, by the names that ``serve_graph.app`` gives, and the keys of their pools."""

ELSEWHERE = {
    "refiner": "args.refiner",
    "refiner_threads": "refiner_pool.threads",
    "refiner_stuck_s": "refiner_pool.stuck_s",
    "source": "runtime.model, with the keys of kestrel.config.ModelSource",
}
"""Fields of ``RuntimeConfig`` that a graph's ``runtime`` does not take, and where they are."""


class GraphArgs(Settings):
    """Everything that an operator sets for one segmentation application.

    ``runtime``, ``refiner`` and ``limits`` take the keys of the dataclasses of ``kestrel.config``;
    the three pools say where the deployments run.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        # Serve logs the error of a config that is refused, and an input may hold API keys.
        hide_input_in_errors=True,
    )

    runtime: RuntimeConfig = Field(default_factory=lambda: RuntimeConfig(refiner=None))
    """The model half. Its ``refiner`` is always None here: refinement is a pool of its own."""
    refiner: RefinerConfig = Field(default_factory=RefinerConfig)
    """The CPU half."""
    refine_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a request waits for its refinement before it goes on without one."""
    refine_silence_s: float | None = Field(default=3.0, gt=0)
    """A refinement without an answer for this long is asked of another replica too, and the first
    answer taken, seconds; null: never. Well over what a refinement takes."""
    ingress_pool: IngressPool = IngressPool()
    model_pool: Pool = Pool()
    refiner_pool: RefinerPool = RefinerPool()

    @property
    def ingress_drain_s(self) -> float:
        """How long an ingress replica that is taken down may finish its requests, seconds: an
        update, or a node that goes, must not cut requests that still have time."""
        asked = self.ingress_pool.graceful_shutdown_timeout_s
        return max(asked, self.runtime.request_timeout_s + 5)

    @field_validator("runtime", mode="before")
    @classmethod
    def _runtime(cls, value: Any) -> Any:
        if isinstance(value, RuntimeConfig):
            return replace(value, refiner=None)
        if not isinstance(value, dict):
            raise ValueError("runtime must be a mapping")
        fields = dict(value)
        for key, place in ELSEWHERE.items():
            if key in fields:
                raise ValueError(f"runtime.{key}: a graph has it as {place}")
        if "limits" in fields:
            fields["limits"] = from_mapping(Limits, fields["limits"], "runtime.limits")
        return from_mapping(RuntimeConfig, {**fields, "refiner": None}, "runtime")

    @field_validator("refiner", mode="before")
    @classmethod
    def _refiner(cls, value: Any) -> Any:
        if not isinstance(value, RefinerConfig):
            value = from_mapping(RefinerConfig, value, "refiner")
        known_backends(value)
        return value

    @field_validator("runtime")
    @classmethod
    def _keys(cls, value: RuntimeConfig) -> RuntimeConfig:
        _only_hashes(value.api_keys)
        return value

    @model_validator(mode="after")
    def _queues_fit(self) -> GraphArgs:
        room = self.runtime.max_batch_size + self.runtime.max_queue
        if self.model_pool.max_ongoing_requests > room:
            raise ValueError(
                f"model_pool.max_ongoing_requests ({self.model_pool.max_ongoing_requests}) must "
                f"not exceed runtime.max_batch_size + runtime.max_queue ({room}): the engine "
                "would refuse what Serve lets in"
            )
        let_in, held = self.ingress_pool.max_ongoing_requests, self.runtime.max_held_requests
        if let_in <= held:
            raise ValueError(
                f"ingress_pool.max_ongoing_requests ({let_in}) must be over "
                f"runtime.max_held_requests ({held}): the ingress does not see requests that wait "
                "for Ray to let them in, and their deadlines do not run"
            )
        for name in ("ingress_pool", "model_pool"):
            if getattr(self, name).min_replicas < 1:
                raise ValueError(f"{name}.min_replicas must be at least 1: only refiners can wait")
        if self.runtime.device.startswith("cuda") and not self.model_pool.num_gpus:
            raise ValueError("runtime.device is cuda, so model_pool.num_gpus must be over 0")
        gpu_for(self.refiner, self.refiner_pool)
        return self


def longest_request_s(config: dict[str, Any]) -> float:
    """The largest ``runtime.request_timeout_s`` that a Serve config sets, seconds; 0 where none is.

    Looked for in every application: one may be built around the graph.
    """
    found = [0.0]
    for application in applications_of(config):
        value: Any = application
        for key in ("args", "runtime", "request_timeout_s"):
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) in (int, float) and value <= LONGEST_TIMEOUT_S:
            found.append(value)
    return max(found)
