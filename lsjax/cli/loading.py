"""Reading a model while people watch."""

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from lsjax.checkpoints import RunSource, TensorSource, assemble
from lsjax.model.llama import Llama, stacked


def load_shown(
    source: TensorSource | RunSource,
    notes: Console,
    *,
    dtype: str,
    stack_layers: bool = False,
    mesh: Mesh | None = None,
) -> Llama:
    """The model of an opened checkpoint, with a bar where `notes` is a terminal."""
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        model = assemble(
            source,
            dtype=dtype,
            track=lambda parts: progress.track(parts, description="loading"),
            mesh=mesh,
        )
    return stacked(model) if stack_layers else model
