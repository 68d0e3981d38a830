"""How rounds of decoding and their programs are built."""

from lsjax.platforms import tuning


def verification_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Draft lengths with a verification of their own in a program of several: the longest only, if
    all its positions take about as long as one."""
    return lengths[-1:] if tuning().positions_are_free else lengths


def lays_out_weights() -> bool:
    """Whether the compiler should choose the layouts of the weights."""
    return tuning().lays_out_weights
