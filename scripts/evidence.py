"""Makes the reports and tables of docs/results.md, each in at most 150 minutes on two cores.

    make evidence                  all that are missing, one after the other
    make evidence ONLY=quickstart

The same command resumes. Experiments that lack an input are skipped; evidence_list.py says where
inputs come from. scripts/results.py then writes the page.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from evidence_list import EXPERIMENTS


def main(names: list[str]) -> int:
    """Makes the named reports, by default all. Returns 1 if one fails or lacks an input."""
    known = {one.name: one for one in EXPERIMENTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"there is no experiment {unknown[0]}: choose from {', '.join(known)}")
        return 2
    code = 0
    for one in map(known.get, names or known):
        missing = [need for need in one.needs if not Path(need).exists()]
        if missing:
            print(f"{one.name} is left out: {missing[0]} is missing")
            code = 1
        elif not one.is_done:
            print(one.command, flush=True)
            program, *words = shlex.split(one.command)
            own = ["-m", "lsjax"] if program == "lsjax" else []
            found = subprocess.run([sys.executable, *own, *words])
            code = code or int(found.returncode != 0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
