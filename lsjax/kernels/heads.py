"""Heads as rows of matmuls."""

from jaxtyping import Array, Float


def rows_of_heads(q_BTNH: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K R H"]:
    """Queries grouped by K/V head, as rows r = (g, t)."""
    batch, steps, _, size = q_BTNH.shape
    q_BKGTH = q_BTNH.reshape(batch, steps, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    return q_BKGTH.reshape(batch, kv_heads, -1, size)


def heads_of_rows(mixed: Float[Array, "B K R H"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The inverse of `rows_of_heads`; shape: B, T, N, H."""
    mixed_BKGTH = mixed.reshape(*mixed.shape[:2], -1, shape[1], shape[3])
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(shape)
