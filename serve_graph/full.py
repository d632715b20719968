"""A full service's refusals by HAProxy, in the place of its ingress replicas.

Under three times the load that a service can carry two of three requests are refused, each of which
would take milliseconds of Python from those that are not. Serve has no setting for it: its own
bound, ``max_queued_requests``, refuses in the replica too.

A replica that refuses because it holds ``max_held_requests`` says so in a header (``FULL_HEADER``).
For ``TOLD_MS`` from then on HAProxy refuses by itself for as long as it has no fewer requests under
way than at that moment, and tells the replica of the next one, for the metrics, how many it turned
away (``TURNED_AWAY``). So a replica's word is what closes the door, and a place that becomes free
opens it again. HAProxy looks at no API key; it leaves to the graph what that would refuse for its
id, and bodies that it cannot soon have read.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from kestrel.errors import FULL_HEADER, Full
from kestrel.request_ids import ID_PATTERN

TURNED_AWAY = "X-Turned-Away"
"""Header of a request from HAProxy to a replica: how many it refused since the last such one."""
TOLD_MS = 100
"""For how long HAProxy takes a replica's word that the service is full, milliseconds."""
LONGEST_BODY = 16 * 1024 * 1024
"""HAProxy reads bodies of up to so many bytes before it refuses; others are for the replicas, which
bound how long they read."""
MOST_READ = 512
"""Bodies that HAProxy, which has 4,096 connections, reads at once: it cannot give up who sends
nothing. More are for the replicas too."""
_LUA = Path(__file__).with_name("full.lua")
APPLICATION = re.compile(r"^\s*use_backend\s+(\S+)", re.MULTILINE)
"""Where HAProxy's configuration names an application's backend."""
# ``be_conn`` counts the request itself, as it did the refused one when that was noted. HAProxy's
# numbers of headers are of 32 bits.
_RULES = """\
    stick-table type integer size 1 store conn_cur
    acl segment_told date(0,ms),sub(proc.segment_full_{number}) lt 0
    acl segment_taken be_conn,sub(proc.segment_held_{number}) ge 0
    acl segment_named req.fhdr(x-request-id) -m found
    acl segment_well_named req.fhdr(x-request-id) -m reg '^{id_pattern}$'
    acl segment_ill_named req.fhdr_cnt(x-request-id) gt 1
    acl segment_sized req.hdr_val(content-length) le {longest_body}
    acl segment_long req.hdr(content-length) -m len gt 9
    acl segment_waits req.hdr(expect) -m found
    acl segment_refused var(txn.segment_refused) -m found
    http-request set-var(txn.segment_refused) bool(true) if {{ method POST }} \
{{ path_end /v1/segment }} segment_told segment_taken
    http-request unset-var(txn.segment_refused) if segment_named !segment_well_named
    http-request unset-var(txn.segment_refused) if segment_ill_named || segment_waits
    http-request unset-var(txn.segment_refused) if !segment_sized || segment_long
    http-request track-sc0 int(0) if segment_refused
    http-request unset-var(txn.segment_refused) if {{ sc0_conn_cur gt {most_read} }}
    http-request set-header x-request-id %[uuid()] if segment_refused !segment_named
    http-request use-service lua.segment_full if segment_refused
    http-request set-header {turned_away} %[lua.segment_turned_away({backend})] \
if {{ var(proc.segment_full_{number}) -m found }}
    http-response set-var(proc.segment_full_{number}) date({told_ms},ms) \
if {{ res.hdr({full}) -m found }}
    http-response set-var(proc.segment_held_{number}) be_conn if {{ res.hdr({full}) -m found }}
    http-response del-header {full}
"""


def refusing(configuration: str) -> str:
    """A configuration in which each application's backend refuses while it is full."""
    backends = dict.fromkeys(APPLICATION.findall(configuration))
    for number, backend in enumerate(backends):
        rules = _RULES.format(
            number=number,
            backend=backend,
            id_pattern=ID_PATTERN,
            longest_body=LONGEST_BODY,
            most_read=MOST_READ,
            told_ms=TOLD_MS,
            turned_away=TURNED_AWAY,
            full=FULL_HEADER,
        )
        head = re.search(rf"^backend {re.escape(backend)}\s*\n", configuration, re.MULTILINE)
        if head is not None:
            configuration = configuration[: head.end()] + rules + configuration[head.end() :]
    refusal = json.dumps(Full("the server is full").body())
    return f"global\n    lua-load {_quoted(str(_LUA))} {_quoted(refusal)}\n" + configuration


def _quoted(word: str) -> str:
    """As one word of HAProxy's configuration."""
    return "'" + word.replace("'", "'\\''") + "'"


def has_lua(binary: str) -> bool:
    """Whether this HAProxy can refuse by itself."""
    told = subprocess.run([binary, "-vv"], capture_output=True, text=True, check=False)
    return "+LUA" in told.stdout
