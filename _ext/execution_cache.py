"""Empty the execution cache when anything a chapter runs on has changed.

jupyter-cache looks at a chapter's own cells alone: after a change in lib/, in a pin, in the data
or in the results it would serve yesterday's figures. ``refresh`` compares a fingerprint of all of
these with the one stored at the last build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"


def _inputs() -> Iterator[tuple[str, bytes]]:
    sources = [ROOT / "requirements.txt", *ROOT.glob("lib/**/*.*"), *ROOT.glob("results/*.json")]
    for path in sorted(sources):
        if "__pycache__" not in path.parts:
            yield path.relative_to(ROOT).as_posix(), path.read_bytes()
    data = os.environ.get("LIB_DATA")
    # Sets are verified by lib.data when they are read: here their names and sizes are enough
    for path in sorted(Path(data).rglob("*")) if data else []:
        if path.is_file():
            yield path.relative_to(data).as_posix(), str(path.stat().st_size).encode()


def fingerprint() -> str:
    """A hash of everything outside a chapter that its outputs depend on."""
    digest = hashlib.sha256()
    for name, content in _inputs():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def refresh() -> bool:
    """Drop cached outputs and parsed pages if the fingerprint has changed; say whether it had."""
    stamp, now = BUILD / "fingerprint", fingerprint()
    if stamp.exists() and stamp.read_text() == now:
        return False
    for folder in (".jupyter_cache", ".doctrees"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    BUILD.mkdir(exist_ok=True)
    stamp.write_text(now)
    return True


def setup(app: Sphinx) -> dict[str, bool]:
    # Before Sphinx opens its stored environment
    app.connect("config-inited", lambda *_: refresh())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
