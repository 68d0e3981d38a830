"""Which steps are traced, in which process, and what a run that ends leaves."""

import jax
import pytest

from lsjax.config import ProfileConfig
from lsjax.training.profiling import traced
from tests.marks import long


@pytest.fixture
def steps_of(tmp_path):
    """Runs steps `first` + 1 to `last`; returns the numbers in the trace, or None without one."""

    def run(first=0, last=9, error=None, process=0, **fields):
        add = jax.jit(lambda state, batch: (state + batch, {"loss": state}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: process)
            try:
                with traced(add, ProfileConfig(**fields), tmp_path, first) as step:
                    state = 0
                    for _ in range(first, last):
                        state, _ = step(state, 1)
                    if error:
                        raise error
            except OSError:
                pass
        assert state == last - first
        files = [*tmp_path.glob(f"plugins/profile/step_*_process_{process}/*.xplane.pb")]
        if not files:
            assert not any(tmp_path.iterdir())
            return None
        (file,) = files
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        return [dict(event.stats)["step_num"] for event in events if event.name == "train"]

    return run


@pytest.mark.parametrize("fields", [dict(), *long(dict(steps=2, start=4), dict(steps=9, start=1))])
def test_only_the_last_step_of_a_trace_is_waited_for(fields, tmp_path, monkeypatch):
    """Otherwise the next step would be dispatched too late."""
    waited, config = [], ProfileConfig(**fields)
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    with traced(lambda state, batch: (state + 1, state + 1), config, tmp_path, 0) as step:
        state = 0
        for _ in range(12):
            state, _ = step(state, None)
    assert waited == [config.start + config.steps - 1] * (config.steps > 0)


@pytest.mark.parametrize(
    "options, numbers",
    [
        (dict(first=5), None),
        (dict(last=3), None),
        (dict(last=4, error=OSError()), [4]),
        (dict(steps=0), None),
        (dict(process=1), None),
        *long(
            (dict(), [4, 5]),
            (dict(first=4), [5]),  # resumed within the trace
            (dict(last=4), [4]),  # the run ends within it
            (dict(process=1, all_processes=True), [4, 5]),
        ),
    ],
)
def test_steps_of_a_trace(steps_of, options, numbers):
    assert steps_of(**{"start": 4, "steps": 2, **options}) == numbers
