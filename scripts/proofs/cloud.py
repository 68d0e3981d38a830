"""Trains in a bucket while processes are killed and the bucket fails, and reads the run there.

    python scripts/proofs/cloud.py --directory /tmp/cloud --kills 10

The bucket is a server on this machine (fake_bucket.py). It holds workdir, data, tokenizer and the
model to start from. One of two processes is killed at random moments (kills.py). The result must
equal that of an undisturbed run on the local disk, bit for bit. Then the bucket fails for 20
seconds while another run trains: first it answers with errors, then not at all. The result must be
the same. Finally the programs that read a run must print the same for the run in the bucket as for
the one on the disk.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import kills as drill
import tyro
from fake_bucket import BUCKET, served

from lsjax.cli.errors import one_line_errors
from lsjax.config import as_path, check
from lsjax.io.files import whole_directory

OUTAGE = 20.0  # seconds
TRAIN = f"{sys.executable} train.py --config scripts/proofs/tiny_run.py --workdir {{workdir}} "
FROM_FILES = (
    "--init-from {parent}/files/model --data.tokenizer {parent}/files/model "
    "--data.source text --data.paths {parent}/files/*.txt --mesh.fsdp -1 "
    "--distributed.heartbeat-timeout 10 --distributed.start-timeout 45 "
)


def main(
    directory: str,
    kills: int = 10,
    terms: int = 1,
    steps: int = 200,
    seed: int = 0,
    bucket_cache: bool = False,
) -> None:
    """Runs the drill; exits with 1, or an error, if anything differs.

    Args:
        directory: directory for the runs on the disk, and for all logs.
        kills: number of times to kill the run.
        terms: number of times to stop it by SIGTERM, after that.
        steps: number of steps of the run.
        seed: seed of the moments and of the choice of processes.
        bucket_cache: whether the runs in the bucket also make and read their tokens there.
    """
    here, there = Path(directory), as_path(f"gs://{BUCKET}")
    with served() as server:
        files = here / "files"
        if not files.exists():
            make_files(files)
        with whole_directory(there / "files") as copy:
            copy_files(files, Path(copy))
        command = f"{TRAIN}{FROM_FILES}--num-steps {steps}"
        if bucket_cache:
            command = f"env LSJAX_CACHE={{parent}}/cache {command}"
            for parent in (here, there):
                drill.remove_directory(parent / "cache")
        drill.main(
            command,
            directory,
            f"{there}",
            kills=kills,
            terms=terms,
            processes=2,
            seed=seed,
        )
        calm = drill.Run(here / "undisturbed", here)
        for name, outage in (("status 503", server.failing(503)), ("no answer", server.away())):
            run = drill.Run(there / "failing", here)
            drill.remove_directory(run.workdir)
            began = time.monotonic()
            with drill.start(command, run, 2) as programs:
                check(drill.until_it_trains(programs, run) is not None, f"see {run.log()}")
                with outage:
                    time.sleep(OUTAGE)
                check(programs[0].poll() is None, f"the run ended before: see {run.log()}")
                check(not any(drill.ends(programs)), f"the run failed: see {run.log()}")
            different = list(drill.differences(calm, run))
            check(not different, f"after {name}: {different}")
            took = time.monotonic() - began
            print(f"{OUTAGE:.0f} s of {name}: the same result, after {took:.0f} s", flush=True)
        for one in (calm, run):
            drill.remove_directory(one.workdir.parent / "out")
        for number, words in enumerate(READERS):
            texts = [output_of(words, one.workdir, here, number) for one in (calm, run)]
            check(texts[0] == texts[1], f"{words}: {texts[1]} is not {texts[0]}")
            print(f"{words}: the same from the bucket", flush=True)


READERS = (
    "decode.py --model {run} --prompt import --max-new-tokens 16 --json {out}",
    "-m lsjax convert {run} {out}",
    "decode.py --model {model} --prompt import --max-new-tokens 16",
    "-m lsjax report --no-training --model {run} --prompts 2 --new-tokens 8 --output {out}",
    "-m lsjax evaluate --task gsm8k --model {run} --data {files}/questions.jsonl"
    " --max-new-tokens 8 --output {out}.jsonl",
)


def output_of(words: str, run: Path, directory: Path, number: int) -> str:
    """What a program prints about the run, without times and places."""
    out = run.parent / "out" / str(number)
    (directory / "out").mkdir(exist_ok=True)
    command = [
        sys.executable,
        *words.format(
            run=run, out=out, model=out.with_name("1"), files=run.parent / "files"
        ).split(),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, f"{words} failed: {done.stderr[-1000:]}")
    text = done.stdout.replace(str(out), "OUT").replace(run.name, "RUN")
    return re.sub(r"\s+", " ", text)


def make_files(files: Path) -> None:
    """A model trained for a few steps, with its tokenizer, and text."""
    start = files.parent / "start"
    run = f"{TRAIN.format(workdir=start)}--num-steps 4"
    for words in (run, f"{sys.executable} -m lsjax convert {start} {files}/model"):
        subprocess.run(words.split(), check=True, stdout=subprocess.DEVNULL)
    rows = "".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(4))
    (files / "questions.jsonl").write_text(rows)
    for module in sorted(Path(os.__file__).parent.glob("[a-f]*.py"))[:20]:
        (files / f"{module.stem}.txt").write_bytes(module.read_bytes())


def copy_files(files: Path, copy: Path) -> None:
    """Copies a folder with its subfolders."""
    for file in files.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(files)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
