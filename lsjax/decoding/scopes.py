"""Names of the parts of compiled programs, which lsjax.aot counts by."""

PROMPT_CHUNKS, ROUNDS = "prompt_chunks", "rounds"  # loops
DRAFT, VERIFY = "draft", "verify"


def guard_of_length(length: int) -> str:
    """Name of the branch that verifies up to `length` drafts."""
    return f"up_to_{length}_drafts"


def guard_of_layers(lo: int, hi: int) -> str:
    """Name of the branch around layers lo..hi-1."""
    return f"layers_{lo}_to_{hi - 1}"


def guard_of_exit(exit_layer: int) -> str:
    """Name of the branch around what an exit drafts from (`draft_state`)."""
    return f"state_of_exit_{exit_layer}"
