"""Traces that xprof and TensorBoard open."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import jax

from lsjax.config import Path, ProfileConfig, in_bucket
from lsjax.data.files import whole_directory


@contextmanager
def trace(directory: Path, name: str = "") -> Iterator[None]:
    """Adds a trace of this context, named by time by default, to a directory or a bucket's."""
    options = jax.profiler.ProfileOptions()
    options.session_id = name
    options.python_tracer_level = 0  # Python's calls would fill the trace
    with whole_directory(directory) if in_bucket(directory) else nullcontext(directory) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with jax.profiler.trace(folder, profiler_options=options):
            yield


@contextmanager
def traced(train_step: Callable, config: ProfileConfig, directory: Path, done: int):
    """Yields the train step, which traces the configured steps. done: steps done before."""
    begin, end = max(config.start, done + 1), config.start + config.steps

    def traced_step(state, batch):
        nonlocal done
        done += 1
        if begin == done < end and (config.all_processes or jax.process_index() == 0):
            tracing.enter_context(trace(directory, f"step_{done}_process_{jax.process_index()}"))
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = train_step(state, batch)
        if done == end - 1:
            jax.block_until_ready(metrics)
            tracing.close()
        return state, metrics

    with ExitStack() as tracing:
        yield traced_step
