"""``python -m lib.data [--into DIR] [NAME ...]``: fetch full sets ahead of time, and verify them.

Without names: every set that has files. What is there already is verified and left as it is.
Ends with status 1 if a set could not be had; the others are fetched all the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ._resolve import cache_folder, fetch_into, read_folder
from ._spec import DataError, MissingDataError, Spec, names, spec_of


def _bar(total: int) -> Any:
    """A progress bar over raw bytes; without tqdm something that only prints."""
    try:
        from tqdm import tqdm
    except ImportError:
        nothing = SimpleNamespace(write=print)
        nothing.update = nothing.set_description = lambda _: None
        nothing.close = lambda: None
        return nothing
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _bring(spec: Spec, folder: Path, bar: Any) -> str:
    """Make the set complete in ``folder`` and say how, or raise why not."""
    bar.set_description(spec.name)
    raw = read_folder(spec, folder)
    bar.update(sum(map(len, raw.values())))
    if len(raw) == len(spec.files):
        return "there already, sha256 verified"
    _, source = fetch_into(spec, folder, bar.update)
    if len(read_folder(spec, folder)) < len(spec.files):
        raise MissingDataError(f"{folder} could not be written")
    return f"fetched from {source}, sha256 verified"


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named sets into a folder; 0 if all are there in the end, else 1."""
    parser = argparse.ArgumentParser("python -m lib.data", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(names()))
    parser.add_argument("--into", type=Path, help="default: $LIB_DATA, else the user's cache")
    chosen = parser.parse_args(arguments)
    into = chosen.into or Path(os.environ.get("LIB_DATA") or cache_folder()).expanduser()
    try:
        specs = [spec for spec in map(spec_of, chosen.names or names()) if spec.files]
    except ValueError as error:
        parser.error(str(error))
    bar = _bar(sum(file.size for spec in specs for file in spec.files.values()))
    failed = 0
    for spec in specs:
        try:
            bar.write(f"{spec.name}: {_bring(spec, into / spec.name, bar)}")
        except (DataError, OSError) as error:
            failed += 1
            bar.write(f"{spec.name}: FAILED, {error}")
    bar.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
