"""The whole graph on one screen: ``build(args)`` turns the args of a Serve config into it.

    client -> Ingress -> Model      (GPU or CPU: the path and the box)
                      -> Refiner    (CPU: refine, rasterise, trace; no torch)

Each stage has its own replicas, autoscaling bounds and queue. The encoded image goes to each half
once, as bytes; the halves never talk to each other.
"""

# No ``from __future__ import annotations`` here: Serve reads the type of ``args`` at run time.
from dataclasses import replace

from ray import serve
from ray.serve import Application

from serve_graph.args import GraphArgs
from serve_graph.hedge import Hedge
from serve_graph.ingress import IngressDeployment
from serve_graph.model import ModelDeployment
from serve_graph.refiner import RefinerDeployment


def build(args: GraphArgs) -> Application:
    """The segmentation application; its ingress is also the handle that clients call.

    Serve validates ``args`` before the call: an unknown key or a value out of range raises
    ``pydantic.ValidationError`` and nothing is deployed.
    """
    # A policy that looks ahead for the refiners sees the model pool, of fixed size or not.
    model_options = args.model_pool.options(watched=args.refiner_pool.scales)
    # A ``user_config`` of the Serve config takes the place of the empty one and leaves it again;
    # without any, Serve would not say that there is none any more.
    model = serve.deployment(name="Model", user_config={}, **model_options)(ModelDeployment)
    refiner = serve.deployment(name="Refiner", user_config={}, **args.refiner_pool.options())(
        RefinerDeployment
    )
    ingress_options = args.ingress_pool.options()
    ingress_options["graceful_shutdown_timeout_s"] = args.ingress_drain_s
    ingress = serve.deployment(name="Ingress", user_config={}, **ingress_options)(
        serve.ingress()(IngressDeployment)
    )
    return ingress.bind(
        # What requests may choose from; the ingress itself refines nothing.
        replace(args.runtime, refiner=args.refiner),
        args.refine_timeout_s,
        # Second calls at once: as many as one refiner that hangs can hold.
        Hedge(args.refine_silence_s, args.refiner_pool.max_ongoing_requests),
        model.bind(args.runtime),
        refiner.bind(
            args.refiner.served_with(args.runtime),
            args.runtime.limits,
            args.refiner_pool.threads,
            args.refiner_pool.stuck_s,
            args.refiner_pool.at_once,
        ),
    )
