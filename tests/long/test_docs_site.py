"""`make docs`. Long: it builds the whole site, and every link and public name must be found."""

import re
import subprocess
import sys
from pathlib import Path

import lsjax

ROOT = Path(__file__).parents[2]


def test_the_site(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    api = (tmp_path / "api.html").read_text()
    anchors = set(re.findall(r'id="lsjax\.([\w.]+)"', api))
    home = {**lsjax._HOME, "train": "", "report": ""}
    missing = [name for name in home if f"{home[name]}.{name}".strip(".") not in anchors]
    assert not missing
    for page in ("index.html", "extending.html", "changes.html", "limitations.html"):
        assert "lsjax" in (tmp_path / page).read_text()
    assert (tmp_path / "source" / "lsjax" / "training" / "loss.py.txt").exists()
