"""Pictures out of Qt's resource files, which photographs to train on come in."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from rcc import stored_files


def resource(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A file of version 3 with one folder ``a`` of ``{name: (flags, content)}``."""
    names, contents = b"", b""

    def named(name: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return at

    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)  # the root: one child, the entry after it
    tree += struct.pack(">IHIIQ", named("a"), 2, len(files), 2, 0)
    for name, (flags, content) in files.items():
        tree += struct.pack(">IHHHIQ", named(name), flags, 0, 0, len(contents), 0)
        contents += struct.pack(">I", len(content)) + content
    start = 24
    at = start, start + len(tree), start + len(tree) + len(contents)
    return struct.pack(">4s5I", b"qres", 3, *at, 0) + tree + contents + names


def test_what_is_stored_as_it_is_comes_out(tmp_path):
    file = tmp_path / "x.rcc"
    file.write_bytes(resource({"b.webp": (0, b"picture"), "c.qml": (1, b"packed"), "ä": (0, b"")}))
    assert dict(stored_files(file)) == {"/a/b.webp": b"picture", "/a/ä": b""}


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "x.rcc"
    file.write_bytes(b"RIFF" + bytes(40))
    with pytest.raises(ValueError, match=r"no Qt resource file"):
        stored_files(file)


def test_lessons_that_could_not_be_fetched_are_asked_for_again(monkeypatch, tmp_path):
    if Path("/usr/share/gcompris-qt").exists():
        pytest.skip("the package is installed here")
    import assets
    import boundary_photos

    for module in (assets, boundary_photos):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get there
    assert boundary_photos.small_photographs() == {}
    folder = tmp_path / "debian/gcompris-qt-data/usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    _, picture = cv2.imencode(".webp", np.zeros((200, 200, 3), np.uint8))
    (folder / "categorization.rcc").write_bytes(resource({"cat.webp": (0, picture.tobytes())}))
    assert list(boundary_photos.small_photographs()) == ["categorization/cat"]
