"""Rebuild the embedded files: ``LIB_DATA=.data python lib/data/embedded/make.py``.

Cuts them out of the full sets and prints the registry line of each file. The files change only
if the code below does.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
from pathlib import Path

import lib.data
from lib.data._resolve import read_folder
from lib.data._spec import spec_of
from lib.data._verses import EXCERPT, whole_groups

FOLDER = Path(__file__).parent
IMAGES = {"train": 1000, "t10k": 300}


def write(name: str, data: bytes) -> None:
    """Compress ``data`` into this folder, always into the same bytes."""
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    (FOLDER / f"{name}.xz").write_bytes(packed)
    print(
        f'"{name}": RawFile({len(data):_}, "{hashlib.sha256(data).hexdigest()}")  # {len(packed)}'
    )


def write_fashion_mnist() -> None:
    """The first images of both halves of Fashion-MNIST, as idx files of the same names."""
    data = lib.data.load("fashion_mnist")
    for half, split in (("train", "train"), ("t10k", "test")):
        images, labels = (array[: IMAGES[half]] for array in data[split])
        header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
        write(f"{half}-images-idx3-ubyte", header + images.tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
        write(f"{half}-labels-idx1-ubyte", header + labels.astype("uint8").tobytes())


def write_verses() -> None:
    """KJV, ASV and WEB of the books of the excerpt, a group a line behind its book's number."""
    raw = read_folder(spec_of("verses"), Path(os.environ["LIB_DATA"]) / "verses")
    lines = (
        "\t".join((str(book), group["KJV"], group["ASV"], group["WEB"]))
        for book, group in whole_groups(raw)
        if book in EXCERPT
    )
    write("verses.tsv", "\n".join(lines).encode())


if __name__ == "__main__":
    write_verses()
    write_fashion_mnist()
