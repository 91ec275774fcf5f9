"""A matrix as a product of two thin ones: its best approximation of a rank, or nearly."""

import jax
import jax.numpy as jnp
from jax import lax

_MORE = 128  # directions beyond twice the rank: the spectra of weights fall slowly
_ITERATIONS = 5
"""Of SmolLM2's down_proj, the flattest seen, the entries at rank 128 are then off by 0.1% (root mean square),
and of the 2.3% largest 99.9% are found; after one iteration those are 18% and 83%."""


def low_rank(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    r"""Two factors whose product is the best approximation of a matrix of that rank.

    Of a small matrix exactly, by the eigenvectors of $W W^\top$. Of a large one in a random subspace of
    some more directions, which $(W W^\top)^q$ turns to the leading ones: randomised SVD.

    Args:
        matrix: [R, C] floats.
        rank: At least 1; that of the matrix itself where it has no more rows or columns.

    Returns:
        [R, rank] and [rank, C], float32, or float64 for float64.

    Example:
        >>> left, right = low_rank(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 1)
        >>> (left @ right).round(4).tolist()
        [[4.0, 0.0], [0.0, 0.0]]

    References:
        Halko, Martinsson, Tropp, `Finding structure with randomness <https://arxiv.org/abs/0909.4061>`_,
        algorithms 4.4 and 5.1.
    """
    rows, columns = matrix.shape
    if rows > columns:
        left, right = low_rank(matrix.T, rank)
        return right.T, left.T
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    def orthonormal(a: jax.Array) -> jax.Array:
        return jnp.linalg.qr(a)[0]

    def turned(basis: jax.Array, _: None) -> tuple[jax.Array, None]:
        inputs = orthonormal(product(matrix.T, basis))
        return orthonormal(product(matrix, inputs)), None

    basis, wide = None, 2 * rank + _MORE
    if 2 * wide < rows:  # else the eigenvectors of all of it take no longer
        directions = jax.random.normal(jax.random.key(0), (columns, wide), matrix.dtype)
        basis, _ = lax.scan(turned, orthonormal(product(matrix, directions)), length=_ITERATIONS)
    inside = matrix if basis is None else product(basis.T, matrix)
    _, vectors = jnp.linalg.eigh(product(inside, inside.T))  # of the largest last
    leading = vectors[:, -rank:]
    return leading if basis is None else product(basis, leading), product(leading.T, inside)
