"""Files of Hugging Face hub repositories, by pinned revision.

The only module that knows ``huggingface_hub``. Its environment variables apply: ``HF_HOME`` and
``HF_HUB_CACHE`` (where files are kept), ``HF_TOKEN`` (gated repositories), ``HF_ENDPOINT`` (a
mirror), ``HF_HUB_OFFLINE=1`` (the cache alone).
"""

from __future__ import annotations

import functools
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path

from kestrel.config import ConfigError

COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMED = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)@([^/]+|refs/.+)")
OTHER_FILES = (
    "then the same for each other file of a checkpoint (weights, tokenizer.json, config.json), "
    "one at a time: that also notes which of them the repository does not have"
)
"""``hf download`` of several files at once notes nothing of those that are not there."""
ASKED_AGAIN_S = 60.0
"""How long a hub that did not answer is not asked for another file: the library tries for half a
minute before it gives up, for each."""
log = logging.getLogger(__name__)

_silent: tuple[float, str, str] | None = None
"""When the hub last gave no answer (monotonic seconds), about which repository, and why."""


class NotThere(ConfigError):
    """The repository has no such file at this revision: the hub says so, or the cache noted it."""


class NotKnown(ConfigError):
    """The cache has no such file and the hub cannot be asked: the repository may have it."""


@dataclass(frozen=True)
class Snapshot:
    """A hub repository at one commit.

    Raises ``ConfigError`` for a branch, a tag or no revision at all: what they name may be another
    model tomorrow, and another one on the next replica. The message says what they name now.
    """

    repo: str
    revision: str | None
    key: str | None = None
    """Configuration key that gives both as ``repo@commit``, for messages; None: ``model.repo`` and
    ``model.revision`` do."""

    def __post_init__(self) -> None:
        if self.revision is not None and COMMIT.fullmatch(self.revision):
            return
        commit = _commit_now(self.repo, self.revision or "main")
        given = (
            "no revision of" if self.revision is None else f"{self.revision!r} is no full commit of"
        )
        known = f"; now it is {commit}" if commit else " (the repository's page lists them)"
        raise ConfigError(
            f"{self._key('revision')}: {given} {self.repo}, and anything else may change under a "
            f"running service: pin the 40-digit commit{known}"
        )

    @classmethod
    def named(cls, text: str, key: str) -> Snapshot | None:
        """The one that ``text``, the value of ``key``, gives as ``repo@commit``; None where it is a
        path, be there an @ in it or not. Raises ``ConfigError`` as the class does."""
        match = _NAMED.fullmatch(text)
        return cls(match[1], match[2], key) if match else None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"

    def download(self, filename: str) -> Path:
        """The file in the local cache, fetched first (with a progress bar) if it is not there.

        Raises ``NotThere``, ``NotKnown``, and ``ConfigError`` that says what to do for everything
        else.
        """
        global _silent
        from huggingface_hub import errors, hf_hub_download

        silent = _silent is not None and time.monotonic() - _silent[0] < ASKED_AGAIN_S
        try:
            return Path(
                hf_hub_download(
                    self.repo, filename, revision=self.revision, local_files_only=silent
                )
            )
        except errors.GatedRepoError as error:
            raise ConfigError(
                f"{self._key('repo')}: {self.repo} asks for consent: accept its terms on the hub, "
                "then log in (hf auth login, or HF_TOKEN)"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ConfigError(
                f"{self._key('repo')}: there is no {self.repo} on the hub, or it is private: log "
                "in (hf auth login, or HF_TOKEN)"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ConfigError(
                f"{self._key('revision')}: {self.repo} has no commit {self.revision}"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            if not silent:
                _silent = time.monotonic(), self.repo, _line(error.__cause__ or error)
            raise self._unanswered(filename) from error
        except errors.EntryNotFoundError as error:
            raise self._not_there(filename) from error
        except (_client_error(), ValueError, RuntimeError, OSError) as error:
            # ValueError: a name or an address that makes no sense; RuntimeError: hf_xet, which
            # large files come by.
            if isinstance(error, _client_error()) and not isinstance(error, errors.HfHubHTTPError):
                # No answer at all: a proxy refuses, or the connection breaks.
                _silent = time.monotonic(), self.repo, _line(error)
                raise self._unanswered(filename) from error
            raise ConfigError(
                f"{self._key('repo')}: {filename} of {self} cannot be fetched ({_line(error)})"
            ) from error

    def cached(self, filename: str) -> Path | None:
        """The file if the local cache has it."""
        from huggingface_hub import errors, try_to_load_from_cache

        try:
            found = try_to_load_from_cache(self.repo, filename, revision=self.revision)
        except errors.HFValidationError:
            return None  # ``download`` says what is wrong with the name
        return Path(found) if isinstance(found, str) else None

    def _noted_absent(self, filename: str) -> bool:
        """Whether the hub said before, of this very commit, that it has no such file."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, filename, revision=self.revision)
        return found is _CACHED_NO_EXIST

    def _unanswered(self, filename: str) -> NotThere | NotKnown:
        """What is said of a file that the cache does not have while the hub is silent."""
        if self._noted_absent(filename):
            return self._not_there(filename)
        assert _silent is not None
        _, asked, reason = _silent
        if asked != self.repo:  # the reason may quote that one's address
            reason = f"when asked for {asked}: {reason}"
        return NotKnown(
            f"{self._key('repo')}: {filename} of {self} is not in the local cache, and the hub "
            f"cannot be asked ({reason}); on a machine with access run: "
            f"hf download {self.repo} {filename} --revision {self.revision}, {OTHER_FILES}, "
            "and copy its cache (HF_HOME)"
        )

    def _not_there(self, filename: str) -> NotThere:
        return NotThere(f"{self._key('filename')}: {self} has no {filename}")

    def _key(self, part: str) -> str:
        """The configuration key to blame for the ``repo``, the ``revision`` or the ``filename``."""
        return self.key or f"model.{part}"


@functools.cache
def _client_error() -> type[Exception]:
    """The base of the HTTP client's errors, which the library lets through. Its releases use
    requests, httpx or httpx2; their own HTTP error derives from that client's."""
    from huggingface_hub import errors

    return [c for c in errors.HfHubHTTPError.__mro__ if c.__module__ != "builtins"][-1]


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _commit_now(repo: str, revision: str) -> str | None:
    """The commit that a branch or tag names now, by the hub or else by the cache."""
    from huggingface_hub import HfApi, constants, scan_cache_dir

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().model_info(repo, revision=revision, timeout=10).sha
        except Exception as error:  # only for a better message
            log.debug("the hub does not say what %s of %s is: %s", revision, repo, error)
    try:
        cached = next(r for r in scan_cache_dir().repos if r.repo_id == repo)
        return cached.refs[revision].commit_hash
    except Exception:  # no cache, no such repository or no such reference in it
        return None
