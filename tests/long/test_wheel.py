"""The wheel, outside of the checkout. Long: it is built and installed, trains 20 steps and decodes.

The packages that it needs come from this environment, without lsjax itself.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program of a fresh environment, in an empty folder; returns what it prints."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *build], check=True)
    venv.create(folder / "env", with_pip=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("lsjax-*.whl")
    own = [str(folder / "env" / "bin" / "python"), *pip[1:]]
    subprocess.run([*own, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"LSJAX_CACHE": str(folder / "cache")}

    def called(name: str, *words: str) -> str:
        command = [str(folder / "env" / "bin" / name), *words]
        options = dict(cwd=elsewhere, env=environment, capture_output=True, text=True)
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return called


def test_it_trains_and_decodes(run):
    where = run("python", "-c", "import lsjax; print(lsjax.__file__)")
    assert "site-packages" in where and str(ROOT) not in where
    assert "lsjax PROGRAM --help" in run("lsjax")
    trained = run(
        "lsjax", "train", "--config", "quickstart", "--num-steps", "20", "--workdir", "run"
    )
    assert "step 20/20" in trained and "done: " in trained
    words = ("--prompt", "import ", "--max-new-tokens", "8", "--json", "-")
    written = json.loads(run("lsjax", "decode", "--model", "run", *words))
    assert written["num_new_tokens"] == 8 and written["strategy"] == "auto"


def test_its_modules_and_configurations_are_complete(run):
    """Every module imports, and every configuration is found by its name."""
    code = (
        "import importlib, pkgutil, lsjax\n"
        "for one in pkgutil.walk_packages(lsjax.__path__, 'lsjax.'):\n"
        "    if not one.name.endswith(('lm_eval', 'tunix', '__main__')):\n"
        "        importlib.import_module(one.name)"
    )
    run("python", "-c", code)
    for config in ROOT.glob("configs/*.py"):
        assert "--num-steps" in run("lsjax", "train", "--config", config.stem, "--help")
