"""The public names of lsjax: what `dir` shows, and what type checkers see."""

import subprocess
import sys
from pathlib import Path

import pytest

import lsjax

SCRIPT = """
import jax
import lsjax
import optax

config = lsjax.TrainConfig(
    model=lsjax.LlamaConfig.tiny(),
    num_steps=2,
    batch_size=2,
    seq_len=16,
    early_exit=lsjax.EarlyExitConfig(curriculum="all"),
)


def loss(
    logits: jax.Array, labels: jax.Array, final_logits: jax.Array, exit: jax.Array
) -> jax.Array:
    return exit * lsjax.cross_entropy(logits, labels)


state = lsjax.train(config, "run", optimizer=optax.lion(1e-4), exit_loss=loss, quiet=True)
engine = lsjax.Engine(lsjax.load("run"), lsjax.load_tokenizer("run"), lsjax.SelfSpeculative(1, 3))
completion = engine.generate([lsjax.Request(prompt="a", exits=(1,))])[0]
reveal_type(state)
reveal_type(completion)
reveal_type(completion.exits[1].log_probs_n)
reveal_type(lsjax.__version__)
lsjax.train(config, "run", optimiser=None)
lsjax.Engin
"""


def test_dir_shows_the_public_names_and_all_exist():
    assert {"load", "Engine", "train", "DecoderModel", "__version__"} <= {*dir(lsjax)}
    assert not {"Any", "IMPORTED", "time", "import_module"} & {*dir(lsjax)}
    for name in lsjax.__all__:
        assert callable(getattr(lsjax, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        lsjax.Engin  # noqa: B018


def test_type_checkers_see_the_same_names():
    """Each is imported for them, from where it is found at run time."""
    source = Path(lsjax.__file__).read_text()
    for name, module in lsjax._HOME.items():
        block = source.partition("if TYPE_CHECKING:")[2].partition(f"from lsjax.{module} import")[2]
        assert f" {name} as {name}" in block.partition("from lsjax.")[0], name
        assert getattr(lsjax, name).__module__.startswith("lsjax."), name


@pytest.mark.long
def test_a_users_script_is_checked(tmp_path):
    """The right types, and the two mistakes at its end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(script)]
    command += ["--cache-dir", str(tmp_path / "cache"), "--ignore-missing-imports"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    revealed = [line for line in lines if line.startswith("note: Revealed type")]
    expected = ("training.step.TrainState", "completion.Completion", "", "str")
    assert len(revealed) == 4
    for line, name in zip(revealed, expected, strict=True):
        assert name in line and '"Any"' not in line, line
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 2, done.stdout
    assert '"optimiser"' in errors[0] and '"Engin"' in errors[1]
