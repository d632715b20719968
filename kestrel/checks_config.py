"""The doctor's check of a Serve config: what ``python -m serve_graph up`` refuses of it."""

from __future__ import annotations

from collections.abc import Iterator

from kestrel.diagnosis import Finding, Machine, Wanted, bad, line_of, ok


def check_config(machine: Machine, wanted: Wanted) -> Iterator[Finding]:
    if wanted.serve_config is None:
        return
    try:
        # By name: Ray and pydantic, which it needs, may be missing where kestrel is.
        refused = machine.load("serve_graph.refusals").refusal(wanted.serve_config)
    except ImportError as error:
        text = f"its pools and keys are not checked ({line_of(error)})"
        remedy = "pip install -c constraints.txt '.[serve]'"
        yield bad("config", text, remedy, needed=False)
        return
    if refused is None:
        yield ok("config", "the graph takes its args, pools and keys")
    else:
        yield bad("config", refused, "change it there: serve_graph up refuses it too")
