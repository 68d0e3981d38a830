"""Shapes in the text of a compiled program: bf16[8,128]{1,0:T(8,128)S(1)} and tuples of them."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # others say it: bf16, f8e4m3
_ARRAY = re.compile(r"([a-z]+\d*[a-z\d]*)\[([\d,<=]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    """One array of a shape."""

    kind: str
    sizes: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Without padding."""
        bits = BITS.get(self.kind)
        if bits is None:
            bits = int(re.search(r"\d+", self.kind).group())
        return self.elements * bits / 8

    @property
    def in_memory(self) -> bool:
        """Whether it lies in the device's memory. S(1) is the fast memory of a TPU's core."""
        return "S(" not in self.layout


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, tuples flattened."""
    return [
        Array(kind, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), layout)
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays in a tuple, "(f32[8,128]{1,0}, s32[])"."""
    return int(sum(array.bytes for array in arrays(shape)))


def bare(shape: str) -> str:
    """Without layouts."""
    sizes = ((array.kind, ",".join(map(str, array.sizes))) for array in arrays(shape))
    return ", ".join(f"{kind}[{text}]" for kind, text in sizes)


def started(shape: str) -> str:
    """The result in the shape of an asynchronous start: (operands, results, ...)."""
    parts = list(_parts(shape)) if shape.startswith("(") else []
    return parts[1] if len(parts) > 1 else shape


def _parts(shape: str) -> Iterator[str]:
    """Elements of a tuple, which may be tuples."""
    depth, begin = 0, 1
    for mark in re.finditer(r"[()\[\]{},]", shape):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(mark.group(), -1)
        if (mark.group() == "," and depth == 1) or depth == 0:
            yield shape[begin : mark.start()]
            begin = mark.end()
