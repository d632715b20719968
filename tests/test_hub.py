"""Hub repositories: what is pinned, what is fetched, what a machine without access says.

A hub of this machine answers, as ``huggingface_hub`` asks it; every run has a process of its own,
because the library reads its environment once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tiny_models import hugging_face_tensors, random_model, write_checkpoint

COMMIT, OTHER = "a" * 40, "b" * 40
LOCATE = """
import json, os, signal, sys, time, traceback
from kestrel.config import ConfigError, ModelSource
from kestrel.moondream.checkpoint import locate

def answer(source):
    try:
        found = locate(ModelSource(**source))
    except ConfigError as error:
        return str(error)
    return [[str(f) for f in found.weights], str(found.tokenizer), str(found.config)]

assert "huggingface_hub" not in sys.modules
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 20)  # between its tries: 23 s of a busy hub
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
for line in sys.stdin:
    sources, variables, pipe = json.loads(line)
    if os.fork():
        continue
    os.environ.update(variables)
    try:
        told = json.dumps([answer(source) for source in sources])
    except BaseException:
        told = traceback.format_exc()
    with open(pipe, "w") as asked:
        asked.write(told)
    os._exit(0)
"""
"""Answers each line of its input in a fork, which is the first to load ``huggingface_hub``; what
everything else takes to load is waited for once."""


class Hub:
    """Repositories by name: files by path. ``main`` of each is at ``COMMIT``."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = files
        self.asked: set[str] = set()
        self.fetched: list[str] = []
        self.app = Starlette(
            routes=[
                Route("/api/models/{owner}/{name}/revision/{revision}", self._revision),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self._file),
            ]
        )

    def _refusal(self, repo: str, revision: str) -> Response | None:
        def refused(status: int, code: str) -> Response:
            return Response(status_code=status, headers={"X-Error-Code": code})

        if repo == "team/gated":
            return refused(403, "GatedRepo")
        if repo == "team/busy":
            return refused(503, "ServiceUnavailable")
        if repo not in self.files:
            return refused(404, "RepoNotFound")
        return None if revision in (COMMIT, "main") else refused(404, "RevisionNotFound")

    def _revision(self, request: Request) -> Response:
        path = request.path_params
        repo = f"{path['owner']}/{path['name']}"
        refused = self._refusal(repo, path["revision"])
        return refused or JSONResponse({"id": repo, "sha": COMMIT})

    def _file(self, request: Request) -> Response:
        path = request.path_params
        repo = f"{path['owner']}/{path['name']}"
        self.asked.add(f"{repo}:{path['path']}")
        refused = self._refusal(repo, path["revision"])
        if refused is not None:
            return refused
        content = self.files[repo].get(path["path"])
        if content is None:
            # With the commit, by which the library notes in its cache that there is no such file.
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return Response(status_code=404, headers=headers)
        if request.method == "GET":
            self.fetched.append(f"{repo}:{path['path']}")
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        return Response(content, headers=headers)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    folder = write_checkpoint(tmp_path_factory.mktemp("hub"), hugging_face_tensors(random_model()))
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = whole["model.safetensors"]
    shards = ["part/m-00001-of-00002.safetensors", "part/m-00002-of-00002.safetensors"]
    index = json.dumps(
        {"weight_map": {str(n): Path(shard).name for n, shard in enumerate(shards)}}
    ).encode()
    return {
        "team/whole": whole,
        "team/pt": {"seg-model.pt": weights},
        "team/sharded": {
            "part/m.index.json": index,
            "tokenizer.json": whole["tokenizer.json"],
            **dict.fromkeys(shards, weights),
        },
        "team/words": {"tokenizer.json": whole["tokenizer.json"]},
        "team/nested": {f"seg/{name}": content for name, content in whole.items()}
        | {"tokenizer.json": b"{}", "config.json": b"{}"},
    }


@pytest.fixture(scope="module")
def hub(files):
    made = Hub(files)
    with served(made.app) as url:
        made.url = url  # type: ignore[attr-defined]
        yield made


Locate = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def located(tmp_path_factory) -> Iterator[Locate]:
    """What ``locate`` gives or says for each source, in a process with a cache of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    with subprocess.Popen(
        [sys.executable, "-c", LOCATE], env=clean, stdin=subprocess.PIPE, text=True
    ) as process:

        def locate(
            sources: list[dict[str, Any]], home: Path, url: str, **environment: str
        ) -> list[Any]:
            pipe = tmp_path_factory.mktemp("pipes") / "answers"
            os.mkfifo(pipe)
            variables = {"HF_HOME": str(home), "HF_ENDPOINT": url} | environment
            assert process.stdin is not None
            process.stdin.write(json.dumps([sources, variables, str(pipe)]) + "\n")
            process.stdin.flush()
            told = pipe.read_text()
            assert told.startswith("["), told
            found: list[Any] = json.loads(told)
            return found

        yield locate


WHOLE = {"repo": "team/whole", "revision": COMMIT}


def test_a_pinned_repository_is_fetched_wrongly_or_again(hub, located, tmp_path):
    sources = [
        WHOLE,
        {"repo": "team/sharded", "revision": COMMIT, "filename": "part/m.index.json"},
        {
            "repo": "team/pt",
            "revision": COMMIT,
            "filename": "seg-model.pt",
            "tokenizer": f"team/words@{COMMIT}",
        },
        {"repo": "team/nested", "revision": COMMIT, "filename": "seg/model.safetensors"},
    ]
    whole, sharded, pt, nested = located(sources, tmp_path, hub.url)
    assert Path(whole[0][0]).read_bytes() == hub.files["team/whole"]["model.safetensors"]
    assert Path(whole[2]).read_bytes() == hub.files["team/whole"]["config.json"]
    assert [Path(file).name[:7] for file in sharded[0]] == ["m-00001", "m-00002"]
    assert sharded[2] == pt[2] == "None"
    assert Path(pt[1]).read_bytes() == hub.files["team/words"]["tokenizer.json"]
    assert "team/pt:seg-model.pt" in hub.fetched
    # What is beside the weights belongs to them, rather than what is at the root.
    assert all(Path(file).parent.name == "seg" for file in (*nested[0], *nested[1:]))
    # Again, and without the hub: all from the cache.
    hub.fetched.clear()
    assert located(sources, tmp_path, hub.url) == [whole, sharded, pt, nested]
    assert hub.fetched == []
    offline = located(sources, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline == [whole, sharded, pt, nested]


def test_what_may_change_is_served(hub, located, tmp_path):
    revisions = (None, "main", COMMIT[:12], COMMIT.upper())
    sources = [{"repo": "team/whole", "revision": revision} for revision in revisions]
    for revision, said in zip(revisions, located(sources, tmp_path, hub.url), strict=True):
        given = "no revision of" if revision is None else f"{revision!r} is no full commit of"
        assert said.startswith(f"model.revision: {given} team/whole")
        assert "pin the 40-digit commit" in said
        assert (f"now it is {COMMIT}" in said) == (revision in (None, "main"))


def test_what_cannot_be_had_is_a_traceback_or_does_not_say_what_to_do(hub, located, tmp_path):
    pinned = {"revision": COMMIT}
    said = located(
        [
            {"repo": "team/none", **pinned},
            {"repo": "team/gated", **pinned},
            {"repo": "team/whole", "revision": OTHER},
            {"repo": "team/pt", **pinned},
            {"repo": "team/pt", "filename": "seg-model.pt", **pinned},
            {"repo": "team/whole", "filename": "no.safetensors", **pinned},
            {"repo": "no owner/at all/x", **pinned},
            WHOLE | {"tokenizer": "team/words@main"},
            WHOLE | {"tokenizer": f"team/none@{COMMIT}"},
            WHOLE | {"tokenizer": f"team/pt@{COMMIT}"},
            WHOLE | {"tokenizer": "/models/v@2/tokenizer.json"},
        ],
        tmp_path,
        hub.url,
    )
    expected = [
        "there is no team/none on the hub, or it is private: log in",
        "team/gated asks for consent",
        f"team/whole has no commit {OTHER}",
        "team/pt@" + COMMIT + " has no model.safetensors",
        "gives no tokenizer.json; name one in model.tokenizer",
        "has no no.safetensors",
        "cannot be fetched",
        "model.tokenizer: 'main' is no full commit of team/words",
        "model.tokenizer: there is no team/none on the hub",
        f"model.tokenizer: team/pt@{COMMIT} has no tokenizer.json",
        "model.tokenizer: /models/v@2/tokenizer.json is neither a file nor repo@commit",
    ]
    for line, part in zip(said, expected, strict=True):
        assert isinstance(line, str) and line.startswith("model.") and part in line


def cached(home: Path, repo: str, files: dict[str, bytes]) -> None:
    """Put files into a cache as a copy of them alone would be."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def said(hub, files, located, tmp_path_factory) -> dict[tuple[str, str], Any]:
    """What machines without access say, by what their cache lacks (``all``, a file) and by
    ``HF_HUB_OFFLINE``, and where the hub is ``busy``; side by side, since the library tries for
    half a minute."""

    def say(lacking: str, offline: str) -> Any:
        home = tmp_path_factory.mktemp("home")
        if lacking == "busy":
            return located([WHOLE | {"repo": "team/busy"}, WHOLE], home, hub.url)
        if lacking != "all":
            have = {k: v for k, v in files["team/whole"].items() if k != lacking}
            cached(home, "team/whole", have)
        (answer,) = located([WHOLE], home, NOWHERE, HF_HUB_OFFLINE=offline)
        return answer

    cases = [*itertools.product(("all", "config.json", "tokenizer.json"), "01"), ("busy", "0")]
    with ThreadPoolExecutor() as pool:
        return dict(zip(cases, pool.map(lambda case: say(*case), cases), strict=True))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_machine_without_access_does_not_say_what_to_copy(said, offline):
    answer = said["all", offline]
    assert "is not in the local cache" in answer
    assert ("Connection refused" in answer) == (offline == "0")
    assert f"hf download team/whole model.safetensors --revision {COMMIT}" in answer
    assert "tokenizer.json" in answer and "config.json" in answer


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json"])
def test_a_file_that_was_not_copied_is_taken_for_one_that_there_is_not(said, offline, lacking):
    answer = said[lacking, offline]
    assert isinstance(answer, str), "it is served as something else"
    assert f"{lacking} of team/whole@{COMMIT} is not in the local cache" in answer
    assert f"hf download team/whole {lacking} --revision {COMMIT}" in answer


def test_a_hub_that_does_not_answer_is_tried_for_every_file(said, hub):
    busy, other = said["busy", "0"]
    assert "model.safetensors of team/busy" in busy and "503" in busy
    assert "model.safetensors of team/whole" in other and "503" in other
    # The reason tells of another repository's address.
    assert "asked for team/busy" in other and "asked for" not in busy
    assert {name for name in hub.asked if name.startswith("team/busy")} == {
        "team/busy:model.safetensors.index.json"
    }


def test_weights_that_were_copied_alone_are_not_found_for_want_of_an_index(
    files, located, tmp_path
):
    cached(tmp_path, "team/whole", files["team/whole"])
    (found,) = located([WHOLE], tmp_path, NOWHERE, HF_HUB_OFFLINE="1")
    assert [Path(file).name for file in found[0]] == ["model.safetensors"]
    assert Path(found[2]).name == "config.json"


# Networks that let nothing through, or not all of it


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address, without its scheme, of a server that has ``answer`` see to each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener is closed, or the client went away
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def refuse(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


def cut(connection: socket.socket) -> None:
    """Tells of a megabyte, sends its beginning and resets the connection."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(65536) or b"\r\n\r\n"
    connection.sendall(
        f'HTTP/1.1 200 OK\r\nX-Repo-Commit: {COMMIT}\r\nETag: "{OTHER}"\r\n'
        "Content-Length: 1000000\r\nConnection: close\r\n\r\n".encode()
    )
    if request.startswith(b"GET"):
        connection.sendall(b"x" * 1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("fault", ["proxy", "cut"])
def test_a_network_that_lets_nothing_through_is_a_traceback(fault, located, tmp_path):
    source = WHOLE | {"filename": "model.safetensors"}
    if fault == "proxy":
        with answering(refuse) as address:
            proxy = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), f"http://{address}")
            (answer,) = located([source], tmp_path, "https://hub.invalid", **proxy)
        assert "403" in answer
    else:
        with answering(cut) as address:
            (answer,) = located([source], tmp_path, f"http://{address}")
    assert f"model.safetensors of team/whole@{COMMIT} is not in the local cache" in answer
    assert f"hf download team/whole model.safetensors --revision {COMMIT}" in answer
