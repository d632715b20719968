"""Where a checkpoint's files are: a folder, one weights file, or a Hugging Face hub repository."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from kestrel.config import ConfigError, ModelSource
from kestrel.folders import unreadable
from kestrel.hub import NotKnown, NotThere, Snapshot
from kestrel.moondream.config import MOONDREAM_2, MOONDREAM_3, MoondreamConfig, sections
from kestrel.moondream.names import parameter_name
from kestrel.moondream.weights import Ties, read_index

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PUBLIC_TOKENIZER = "moondream/starmie-v1"
TOLD_APART = {"decoder_arch", "use_ln"}
"""Keys of a ``RegionConfig`` by which the published models differ."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|pt)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    weights: tuple[Path, ...]
    """Every weights file, shards in order."""
    tokenizer: Path
    config: Path | None
    """``config.json``; None: one of the published architectures, told by its tensors."""
    ties: Ties = ()
    """What the index of the shards says of tied tensors, as ``read_index`` takes it."""

    @property
    def folder(self) -> Path:
        """Where the weights are, and samples if there are any."""
        return self.weights[0].parent

    def architecture(self) -> MoondreamConfig:
        """Sizes of the model: those of ``config.json`` or, where it gives none, the published ones.

        Raises ``ConfigError`` naming the file.
        """
        if self.config is not None:
            given = sections(self.config)
            if given is not None:
                region = given.get("region") or {}
                if isinstance(region, dict) and not region.keys() >= TOLD_APART:
                    # Moondream 2 and 3 each leave out what they have, and have not the same.
                    given = {**given, "region": {**told_region(self.weights), **region}}
                if not given.get("text"):
                    # Their texts differ too; what else is left out they share.
                    given = {**given, "text": asdict(published_architecture(self.weights).text)}
                return MoondreamConfig.from_dict(given, self.config)
        return published_architecture(self.weights)

    def stored(self) -> tuple[set[torch.dtype | None], int]:
        """Types of its tensors, as ``Stored.dtype``, and how many numbers they hold."""
        index = read_index(self.weights, self.ties)
        return {tensor.dtype for tensor in index}, sum(math.prod(tensor.shape) for tensor in index)


def local_checkpoint(path: Path, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint at ``path``: a folder, or a weights file with its other files beside it.

    Raises ``ConfigError`` that names what is missing.
    """
    if (problem := unreadable(path)) is not None:
        raise ConfigError(f"model.path: {problem}")
    folder = path if path.is_dir() else path.parent
    weights, ties = _weights(path)
    tokenizer = tokenizer or folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ConfigError(
            f"model.path: {folder} has no tokenizer.json; put the model's beside the weights "
            f"({PUBLIC_TOKENIZER} on the Hugging Face hub is that of Moondream 3) or name it in "
            "model.tokenizer"
        )
    config = folder / "config.json"
    return Checkpoint(tuple(weights), tokenizer, config if config.is_file() else None, ties)


def weight_files(path: Path) -> list[Path]:
    """The weights files of a checkpoint folder or of an index of shards, or the file itself.

    Raises ``ConfigError`` when there is none, when shards are missing, or when a folder holds
    several checkpoints.
    """
    return _weights(path)[0]


def _weights(path: Path) -> tuple[list[Path], Ties]:
    if path.is_file() and not path.name.endswith(".index.json"):
        return [path], ()
    index = path if path.is_file() else path / INDEX
    found = [] if path.is_file() else sorted((*path.glob("*.safetensors"), *path.glob("*.pt")))
    if len({file.suffix for file in found}) > 1:
        raise _several(path, found)
    if index.is_file():
        names, ties = _indexed(index)
        shards = [index.parent / shard for shard in names]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if not missing:
            return shards, ties
        if path / WHOLE not in found:  # where it is, the index is a left-over
            raise ConfigError(
                f"model.path: {index.parent} lacks {', '.join(missing)} of {index.name}"
            )
        return [path / WHOLE], ()
    if not found:
        raise ConfigError(f"model.path: no .safetensors or .pt file in {path}")
    return _one_checkpoint(path, found), ()


def _several(folder: Path, found: list[Path]) -> ConfigError:
    return ConfigError(
        f"model.path: {folder} holds several checkpoints "
        f"({', '.join(file.name for file in found)}); name one file in model.path"
    )


def _indexed(index: Path) -> tuple[list[str], Ties]:
    """Names of the shards, and what the index says of tensors that are in none of them."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not a readable index of shards ({error})") from error
    if not names:
        raise ConfigError(f"{index}: not a readable index of shards (it names none)")
    for name in names:
        # An index comes from elsewhere: it may not point out of its own folder.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{index}: {name!r} is no file of this folder")
    said = content.get("metadata")
    return names, tuple(said.items()) if isinstance(said, dict) else ()


def _one_checkpoint(folder: Path, found: list[Path]) -> list[Path]:
    if len(found) == 1:
        return found
    shards = [_SHARD.fullmatch(file.name) for file in found]
    groups = {(match[1], match[3]) for match in shards if match}
    if None in shards or len(groups) > 1:
        raise _several(folder, found)
    (_, count) = groups.pop()
    if len(found) != int(count):
        raise ConfigError(f"model.path: {folder} has {len(found)} of {int(count)} shards")
    return found


def told_region(weights: Iterable[Path]) -> dict[str, Any]:
    """The values of ``TOLD_APART`` by a checkpoint's tensors; none where they have no decoder."""
    names = {parameter_name(stored.name) for stored in read_index(weights)}
    norm = "region.ln.weight" in names
    for arch, tensor in (("mlp", "fc1.weight"), ("linear", "weight")):
        if f"region.coord_decoder.{tensor}" in names:
            return {"decoder_arch": arch, "use_ln": norm}
    return {}


def published_architecture(weights: Iterable[Path]) -> MoondreamConfig:
    """Moondream 2 or 3 at their published sizes, told apart by a checkpoint's tensors.

    Raises ``ConfigError`` for tensors of neither.
    """
    told = told_region(weights)
    for published in (MOONDREAM_2, MOONDREAM_3):
        if told == {key: getattr(published.region, key) for key in TOLD_APART}:
            return published
    raise ConfigError(
        "model.path: the tensors are of no known Moondream; put the model's config.json beside them"
    )


# The hub.


def locate(source: ModelSource) -> Checkpoint:
    """The checkpoint that a configuration names, downloaded to the hub's cache if need be.

    Raises ``ConfigError`` that says what is missing and what to do.
    """
    tokenizer = _named_tokenizer(source.tokenizer)
    if source.repo is None:
        assert source.path is not None
        return local_checkpoint(Path(source.path), tokenizer)
    snapshot = Snapshot(source.repo, source.revision)
    weights, ties = _hub_weights(snapshot, source.filename)
    folder = PurePosixPath(source.filename or WHOLE).parent
    tokenizer = tokenizer or _beside(snapshot, folder, "tokenizer.json")
    if tokenizer is None:
        raise ConfigError(
            f"model.repo: {snapshot} gives no tokenizer.json; name one in model.tokenizer, as a "
            f"path or as repo@commit ({PUBLIC_TOKENIZER} is that of Moondream 3)"
        )
    return Checkpoint(tuple(weights), tokenizer, _beside(snapshot, folder, "config.json"), ties)


def _hub_weights(snapshot: Snapshot, filename: str | None) -> tuple[list[Path], Ties]:
    if filename is not None and not filename.endswith(".index.json"):
        return [snapshot.download(filename)], ()
    if filename is None and (whole := snapshot.cached(WHOLE)) is not None:
        return [whole], ()  # nobody needs an index of shards, nor a hub that could be asked for one
    try:
        index = _optional(snapshot, filename or INDEX)
    except NotKnown:
        index = None
    if index is None:
        return [snapshot.download(filename or WHOLE)], ()
    folder = PurePosixPath(filename or INDEX).parent
    names, ties = _indexed(index)
    return [snapshot.download(str(folder / shard)) for shard in names], ties


def _beside(snapshot: Snapshot, folder: PurePosixPath, name: str) -> Path | None:
    """The file in the folder of the weights or else at the root: a repository may hold several
    models in folders, and what is at its root may be another's. Raises ``NotKnown``."""
    for place in dict.fromkeys((folder, PurePosixPath())):
        found = _optional(snapshot, str(place / name))
        if found is not None:
            return found
    return None


def _optional(snapshot: Snapshot, filename: str) -> Path | None:
    """The file; None where the repository has none. Raises ``NotKnown`` where it may have one: a
    checkpoint without its own ``config.json`` would be taken for one of the published sizes."""
    try:
        return snapshot.download(filename)
    except NotThere:
        return None


def _named_tokenizer(named: str | None) -> Path | None:
    """The file that ``model.tokenizer`` names: a path of it or of its folder, or repo@commit."""
    if named is None:
        return None
    path = Path(named)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file():
        return path
    snapshot = Snapshot.named(named, "model.tokenizer")
    if snapshot is None:
        raise ConfigError(f"model.tokenizer: {named} is neither a file nor repo@commit")
    return snapshot.download("tokenizer.json")
