"""Run every chapter the way Colab would: alone, in an empty folder, with what Colab has.

A fresh environment holds torch, numpy, matplotlib and the like, but not this project;
google.colab is importable and imported before the first cell. The notebook's own first cell must
install the project, and its address is swapped for the wheel built from this working tree. No data
folder is given and the network is off for lib.data, so the chapters also prove that they run on
the embedded defaults.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from lib.book.pairs import chapter_sources

ROOT = Path(__file__).resolve().parents[2]
COLAB_HAS = ["matplotlib", "scipy", "scikit-learn", "tqdm", "ipykernel", "nbclient", "pooch"]
pytestmark = [pytest.mark.book, pytest.mark.timeout(1500)]


def _run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, **options)


@pytest.fixture(scope="session")
def colab(tmp_path_factory, worker_id):
    """The folder of an environment like Colab's, one per test worker."""
    home = tmp_path_factory.mktemp(f"colab-{worker_id}")
    python = home / "env/bin/python"
    _run(sys.executable, "-m", "venv", home / "env")
    uv = [sys.executable, "-m", "uv", "pip"]
    _run(*uv, "install", "-q", "-p", python, "pip", os.environ.get("TORCH", "torch==2.13.0"),
         f"numpy=={_version('numpy')}", "hatchling", *COLAB_HAS)  # fmt: skip
    _run(python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w",
         home / "wheels", ROOT)  # fmt: skip
    wheel = next((home / "wheels").glob("*.whl"))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home / "env")}))
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").touch()
    (site / "zz_colab.pth").write_text("import google.colab\n")
    (site / "sitecustomize.py").write_text(
        textwrap.dedent(f"""\
            import sys
            if "pip" in sys.orig_argv:
                swap = "why-it-works[book] @ file://{wheel}"
                sys.argv[:] = [swap if "git+https://" in word else word for word in sys.argv]
            """)
    )
    return home


def _version(package):
    from importlib.metadata import version

    return version(package)


@pytest.mark.parametrize("source", chapter_sources(ROOT), ids=lambda path: path.stem)
def test_chapter_runs_alone(colab, source, tmp_path):
    shutil.copy(source.with_suffix(".ipynb"), tmp_path)
    bin_folder = colab / "env/bin"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LIB_DATA")
    }
    environment |= {
        "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}",
        "LIB_DATA_OFFLINE": "1",
        "LIB_DATA_CACHE": str(tmp_path / "cache"),
    }
    try:
        done = subprocess.run(
            [bin_folder / "jupyter-execute", "--timeout=900", f"{source.stem}.ipynb"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        uninstall = [bin_folder / "python", "-m", "pip", "uninstall", "-q", "-y", "why-it-works"]
        subprocess.run(uninstall, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
