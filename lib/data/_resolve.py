"""From a name to a verified data set: folder, cache, sources, embedded default."""

from __future__ import annotations

import gzip
import lzma
import os
import secrets
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

from ._spec import (
    Dataset,
    DataWarning,
    Default,
    MissingDataError,
    RawFile,
    Spec,
    WrongFileError,
    spec_of,
    verify,
)

__all__ = ["cache_folder", "fetch_into", "load", "read_folder"]

Raw = dict[str, bytes]


def load(name: str) -> Dataset:
    """Load a data set by name and print one line: its source and its number of examples.

    Looks into ``$LIB_DATA/<name>/``, the user's cache, the set's sources (unless
    ``LIB_DATA_OFFLINE=1``) and the embedded default, in this order.

    Args:
        name: one of :func:`lib.data.names`.

    Returns:
        The data set. If the embedded default stands in, its ``full`` is False and a
        :class:`DataWarning` gives the reason for which each source failed.

    Raises:
        ValueError: if there is no such set; the message lists those there are.
        WrongFileError: if a file is there but is not the one it should be; the message gives the
            file, the expected and the seen sha256.
        MissingDataError: if the set is nowhere to be had and has no default.

    >>> pelts = load("hare_lynx")
    hare_lynx: train 21; source: numbers in the source code
    >>> pelts["train"][0].tolist()
    [1900.0, 30.0, 4.0]
    """
    spec = spec_of(name)
    data = _embedded(spec) if spec.parse is None else _full_or_default(spec)
    print(data.summary())
    return data


def _full_or_default(spec: Spec) -> Dataset:
    try:
        raw, source = _obtain(spec)
    except MissingDataError as error:
        if spec.default is None:
            raise
        _warn(f"{error}. The embedded default stands in, which is not {spec.name}")
        return _embedded(spec)
    assert spec.parse is not None
    return Dataset(spec.name, spec.parse(raw), source, spec.licence, True, spec.about)


def _obtain(spec: Spec) -> tuple[Raw, str]:
    """The raw files of the full set and the place they were found in."""
    if not spec.files:
        return {}, "numbers in the source code"
    if os.environ.get("LIB_DATA"):
        raw = read_folder(spec, Path(os.environ["LIB_DATA"]).expanduser() / spec.name)
        if len(raw) == len(spec.files):
            return raw, "the LIB_DATA folder, sha256 verified"
        if raw:
            absent = ", ".join(sorted(spec.files.keys() - raw.keys()))
            _warn(f"the LIB_DATA folder has {spec.name} without {absent}: looking further")
    cache = cache_folder() / spec.name
    raw = read_folder(spec, cache)
    if len(raw) == len(spec.files):
        return raw, "the cache, sha256 verified"
    return fetch_into(spec, cache)


def _embedded(spec: Spec) -> Dataset:
    """The default of ``spec``, which may be that of another set."""
    home = spec_of(spec.default) if isinstance(spec.default, str) else spec
    default = home.default
    assert isinstance(default, Default)
    raw = {name: _embedded_file(name, seal) for name, seal in default.files.items()}
    source = f"embedded default ({default.label})"
    if home is not spec:
        source += f", standing in for {spec.name}"
    return Dataset(home.name, default.parse(raw), source, default.licence, False, default.about)


def _embedded_file(name: str, seal: RawFile) -> bytes:
    path = resources.files(__package__) / "embedded" / f"{name}.xz"
    return verify(str(path), lzma.decompress(path.read_bytes()), seal)


def cache_folder() -> Path:
    """``$LIB_DATA_CACHE``, else ``why-it-works`` in ``$XDG_CACHE_HOME`` or the platform's cache."""
    if os.environ.get("LIB_DATA_CACHE"):
        return Path(os.environ["LIB_DATA_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "why-it-works"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "why-it-works"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "why-it-works"


def read_folder(spec: Spec, folder: Path) -> Raw:
    """The verified files of ``spec`` that are in ``folder``, plain or with ``.gz``.

    Raises:
        WrongFileError: if one is there but is not what it should be.
    """
    raw = {}
    for name, seal in spec.files.items():
        for path in (folder / name, folder / f"{name}.gz"):
            if os.path.isfile(path):  # False, not an error, in a folder that is closed to us
                raw[name] = verify(path, _read(path, seal), seal)
                break
    return raw


def _read(path: Path, seal: RawFile) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise WrongFileError(
            f"{path} is not the file it should be: expected {seal.size:,} raw bytes with sha256 "
            f"{seal.sha256}, seen {path.stat().st_size:,} bytes that do not unpack ({error})"
        ) from error


def fetch_into(
    spec: Spec, folder: Path, progress: Callable[[int], object] = lambda size: None
) -> tuple[Raw, str]:
    """Bring the files that ``folder`` lacks from the sources, tried in turn, and keep them there.

    Args:
        spec: the set.
        folder: where its files are kept. If it cannot be written, a warning says so and the files
            are only returned.
        progress: called with the raw size of each file that arrived.

    Raises:
        MissingDataError: if files are still missing after the last source, with every reason.
        WrongFileError: the same, if a source brought a file that is not the one it should be.
    """
    if os.environ.get("LIB_DATA_OFFLINE", "").lower() not in ("", "0", "false", "no", "off"):
        named = os.environ.get("LIB_DATA")
        places = dict.fromkeys([*([Path(named).expanduser() / spec.name] if named else []), folder])
        raise MissingDataError(
            f"{spec.name} is not on this machine and LIB_DATA_OFFLINE is set: there is no "
            f"{', '.join(spec.files)} in {' or '.join(map(str, places))}"
        )
    with _one_process_at_a_time(folder):
        raw = read_folder(spec, folder)
        used: list[str] = []
        failures: dict[str, Exception] = {}
        for source in spec.sources:
            wanted = spec.files.keys() - raw.keys()
            try:
                offered = source.fetch(wanted) if wanted else {}
                brought = {
                    name: verify(f"{name} from {source}", offered[name], spec.files[name])
                    for name in spec.files
                    if name in wanted and name in offered
                }
            except Exception as error:  # whatever a source dies of, the next one gets its turn
                failures[str(source)] = error
                continue
            if brought:
                used.append(str(source))
                raw |= brought
                _store(folder, brought)
                progress(sum(map(len, brought.values())))
    _judge(spec, raw, failures)
    return raw, ", ".join(used) or "the cache, sha256 verified"


def _judge(spec: Spec, raw: Raw, failures: Mapping[str, Exception]) -> None:
    """Raise if files are missing after the last source; warn if a source failed on the way."""
    reasons = "; ".join(f"{source}: {e or type(e).__name__}" for source, e in failures.items())
    absent = ", ".join(sorted(spec.files.keys() - raw.keys()))
    if absent:
        wrong = any(isinstance(error, WrongFileError) for error in failures.values())
        raise (WrongFileError if wrong else MissingDataError)(
            f"no source brought {absent} of {spec.name} ({reasons or 'it names no source'})"
        )
    if reasons:
        _warn(f"{spec.name} came from its other sources; what failed: {reasons}")


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Let others wait, rather than fetch the same. The kernel frees the lock of a killed process.

    A courtesy only, and silently none where there are no such locks: what keeps the files whole
    is that each is renamed into place when it is complete and verified.
    """
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115 - closed below
    except (ImportError, OSError):
        yield
        return
    with handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            for leftover in folder.glob(".*.part"):
                leftover.unlink()
        yield


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files so that each is either whole or not there, whatever interrupts it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            part = folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
            try:
                with open(part, "wb") as handle:
                    handle.write(data)
                    handle.flush()
                    os.fsync(handle.fileno())
                os.replace(part, folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        _warn(f"{folder} cannot be written ({error}): {', '.join(files)} only kept in memory")


def _warn(message: str) -> None:
    """Warn at the line outside of this package that asked for the data."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__package__") == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DataWarning, stacklevel=level)
