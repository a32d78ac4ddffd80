"""The tangent kernel as a linear map, and what is known of it from products with vectors."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from nt_core.cells import Mixed
from nt_core.tracing import is_traced

from nt_empirical._axes import Axes, OutputAxes
from nt_empirical._batches import checked_outputs, make_batches
from nt_empirical._diagonal import empirical_ntk_diagonal_fn
from nt_empirical._parameters import Parametrised
from nt_empirical._vector_products import map_numbers
from nt_empirical._vmap import VMapAxes

Product = Callable[[jax.Array], jax.Array]

# What is smaller is nothing but rounding, in units of the precision.
_ROUNDINGS = 16


class Estimate(NamedTuple):
    """What was estimated from random vectors or networks, and its standard error."""

    value: jax.Array
    standard_error: jax.Array


class Eigenpairs(NamedTuple):
    """Eigenvalues, the largest first, and eigenvectors of length 1 along the first axis."""

    values: np.ndarray | jax.Array
    vectors: np.ndarray | jax.Array


def ntk_operator(
    f: Callable[..., Any],
    params: Any,
    x: Any,
    trace_axes: Axes = (-1,),
    vmap_axes: VMapAxes = None,
    *,
    scale: Any = None,
    **kwargs: Any,
) -> "NTKOperator":
    r"""Empirical NTK of a batch with itself as a linear map: it is multiplied by vectors, and never formed.

    A product takes one backward pass through the network, and one pass through its derivatives, for each index of the
    traced axes (with ``trace_axes=()`` one in all). Memory is that of a gradient and of the activations of the batch;
    for up to 32 of these indices at once.
    The products of a batch that is sharded over devices, along its samples, are computed there.

    Args:
      f: ``f(params, x, **kwargs)``, returns one array. The product of an operator is compiled once, at the first
        vector: what ``f`` reads besides its arguments stays what it was then.
      params: an array or a pytree of arrays.
      x: inputs.
      trace_axes, scale: as for :func:`empirical_ntk_fn`.
      vmap_axes: as there; used for the diagonal.
      **kwargs: keywords of ``f``.

    Returns:
      An :class:`NTKOperator`: ``operator(v)`` or ``operator @ v`` is the product with an array shaped as the outputs
      without the traced axes.

    Raises:
      TypeError: parameters or outputs are not real floating-point arrays, or outputs are several.
      ValueError: axes do not exist, or ``scale`` does not broadcast to ``params``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nt_empirical import ntk_operator
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> operator = ntk_operator(lambda w, x: x @ w, jnp.ones((2, 3)), x)
      >>> print(operator @ jnp.array([1.0, 1.0]), operator.trace())
      [2. 3.] 3.0
      >>> solution, _ = jax.scipy.sparse.linalg.cg(operator, jnp.array([2.0, 3.0]))
      >>> print(solution.round(3))
      [1. 1.]
    """
    network = Parametrised.of(f, params, scale)
    batch, _ = make_batches(x, None, kwargs)
    outputs = jax.eval_shape(lambda w: checked_outputs(network.f(w, batch.x, **batch.kwargs)), network.weights)
    if not isinstance(outputs, jax.ShapeDtypeStruct):
        raise TypeError(f"The function must return one array, got {jax.tree.structure(outputs)}. Join its outputs.")
    axes = OutputAxes.of(outputs.ndim, trace_axes, diagonal_axes=())
    axes.check_sizes(outputs.shape, outputs.shape)
    product = jax.jit(functools.partial(_product, network.f, axes))
    diagonal = empirical_ntk_diagonal_fn(f, trace_axes, vmap_axes, scale=scale)
    shape = tuple(size for axis, size in enumerate(outputs.shape) if axis not in axes.traced)
    return NTKOperator(
        lambda v: product(network.weights, network.scales, Mixed((batch.x, batch.kwargs)), v),
        lambda: diagonal(x, params, **kwargs),
        shape,
        jnp.promote_types(outputs.dtype, jnp.float32),
    )


class NTKOperator:
    """A tangent kernel as a linear map; made by :func:`ntk_operator`.

    Attributes:
      shape: of the vectors.
      dtype: of the vectors, that of the outputs, or float32 if they have less precision.
    """

    def __init__(self, product: Product, diagonal: Callable[[], jax.Array], shape: tuple[int, ...], dtype: Any):
        self._product, self._diagonal, self.shape, self.dtype = product, diagonal, shape, dtype

    def __call__(self, v: jax.Array) -> jax.Array:
        """Returns the product with an array of the operator's shape; a ValueError for other shapes."""
        if jnp.iscomplexobj(v):
            raise TypeError("The operator is real: give it the real and the imaginary part, one after the other.")
        v = jnp.asarray(v, self.dtype)
        if v.shape != self.shape:
            raise ValueError(f"The operator takes arrays of shape {self.shape}, got {v.shape}.")
        return self._product(v)

    __matmul__ = __call__

    def diagonal(self) -> jax.Array:
        """Returns the diagonal, of the operator's shape; see :func:`empirical_ntk_diagonal_fn`."""
        return self._diagonal()

    def trace(self) -> jax.Array:
        """Returns the trace, from the diagonal."""
        return jnp.sum(self.diagonal())

    def frobenius_norm(self, key: jax.Array, n_products: int = 90) -> Estimate:
        """Estimates the Frobenius norm, the root of the sum of squares of all entries, or of all eigenvalues.

        By Hutch++ (Meyer et al., 2021, arXiv:2010.09649): exact within the space that a third of the products finds, in
        which the large eigenvalues are, and the mean over random vectors outside of it.

        Args:
          key: of `jax.random`.
          n_products: how many products with vectors it may take; exact if they are 3 times the size of the operator.
            A third as many vectors are in memory.
        """
        return _root(self._squared_norm(self._product, key, n_products))

    def effective_rank(self, key: jax.Array, n_products: int = 90) -> Estimate:
        """Estimates the participation ratio of the eigenvalues: the square of their sum over the sum of squares.

        It is the number of eigenvalues if they are equal. Arguments are those of `frobenius_norm`.
        """
        square, error = self._squared_norm(self._product, key, n_products)
        _check_not_zero(square)
        rank = self.trace() ** 2 / square
        return Estimate(rank, rank * error / square)

    def alignment(self, labels: jax.Array, key: jax.Array, n_products: int = 90) -> Estimate:
        r"""Estimates the centred alignment of the kernel with that of labels (Cortes et al., 2012, arXiv:1203.0550).

        That is :math:`\langle K_c, Y_c Y_c^\top \rangle / (|K_c| |Y_c Y_c^\top|)`, where c stands for subtraction
        of the mean over samples, on both sides: 1 if the kernel is a multiple of :math:`Y Y^\top`.

        Args:
          labels: have the operator's shape, with samples along the first axis, and may have more axes: of one-hot
            labels, or several targets.
          key, n_products: as for `frobenius_norm`.

        Raises:
          ValueError: shapes do not fit, or labels are the same for all samples.
        """
        labels = jnp.asarray(labels, self.dtype)
        if labels.shape[: len(self.shape)] != self.shape:
            raise ValueError(f"Labels must have shape {self.shape}, or more axes after these, got {labels.shape}.")
        columns = jnp.moveaxis(_centred(labels).reshape(*self.shape, -1), -1, 0)
        rows = columns.reshape(len(columns), -1)
        norm = jnp.linalg.norm(_matmul(rows, rows.T))
        if not is_traced(norm) and norm <= _ROUNDINGS * jnp.finfo(self.dtype).eps * jnp.sum(labels**2):
            raise ValueError("Labels are the same for all samples: they have no alignment.")
        products = jax.lax.map(self._product, columns)
        overlap = jnp.sum(columns * products)

        def centred_product(v: jax.Array) -> jax.Array:
            return _centred(self._product(_centred(v)))

        square, error = self._squared_norm(centred_product, key, n_products)
        _check_not_zero(square, (_ROUNDINGS * jnp.finfo(self.dtype).eps * self.trace()) ** 2)
        value = overlap / (norm * jnp.sqrt(square))
        return Estimate(value, jnp.abs(value) * error / (2 * square))

    def eigenpairs(self, k: int, tolerance: float = 0.0, *, n_products: int | None = None) -> Eigenpairs:
        """Returns the `k` largest eigenvalues and their vectors, by Lanczos iterations.

        They are ARPACK's, on the CPU, as many as it takes; with `n_products` they are those of matfree, in JAX: where
        the operator is, and under `jax.jit` too.

        Args:
          k: less than the size of the operator.
          tolerance: relative, of the eigenvalues; 0 for the precision of numbers. Without `n_products`.
          n_products: how many products with vectors to take, at least `k` and at most the size of the operator.
            Eigenvalues outside of the space that these span are not seen. As many vectors are in memory. Where the
            space ends before, as that of a kernel of low rank, what is found in it is returned; where it has less than
            `k` dimensions, values and vectors of 0 after that.
            It needs matfree: ``pip install nt-empirical[matfree]``.

        Raises:
          ValueError: `k` or `n_products` is out of range, or both `tolerance` and `n_products` are given.
          ImportError: matfree is not installed.
          scipy.sparse.linalg.ArpackNoConvergence: iterations did not get there; it has what was found.
        """
        size = math.prod(self.shape)
        if not 1 <= k < size:
            raise ValueError(f"`k` must be from 1 to {size - 1}, less than the size of the operator, got {k}.")
        start = np.random.default_rng(0).normal(size=size).astype(self.dtype)
        if n_products is not None:
            if tolerance:
                raise ValueError("Give `tolerance` or `n_products`, not both: the latter says how long to iterate.")
            return self._by_matfree(k, n_products, start)

        def product(v: np.ndarray) -> np.ndarray:
            return np.asarray(self(jnp.asarray(v.reshape(self.shape)))).ravel()

        operator: Any = scipy.sparse.linalg.LinearOperator((size, size), product, dtype=self.dtype)  # type: ignore[call-arg]
        values, vectors = scipy.sparse.linalg.eigsh(operator, k, which="LA", v0=start, tol=tolerance)  # type: ignore[arg-type]
        return Eigenpairs(values[::-1], vectors.T[::-1].reshape(k, *self.shape))

    def _by_matfree(self, k: int, n_products: int, start: np.ndarray) -> Eigenpairs:
        try:
            from matfree import decomp
        except ImportError as error:
            raise ImportError(
                "`n_products` needs matfree: `pip install nt-empirical[matfree]`. Without it, leave it out: ARPACK."
            ) from error
        if not k <= n_products <= start.size:
            raise ValueError(f"`n_products` must be from {k} to {start.size}, got {n_products}.")
        # Without its own derivatives: their products would not know the values of an outer trace.
        found: Any = decomp.tridiag_sym(n_products, custom_vjp=False)(
            self._product, jnp.asarray(start.reshape(self.shape))
        )
        basis, tridiagonal = found.Q_tall.reshape(n_products, -1), found.J_small
        # Behind the end of the space, vectors are rounding errors divided by rounding errors.
        largest = jax.lax.cummax(jnp.abs(jnp.diag(tridiagonal)))[:-1]
        least = _ROUNDINGS * math.sqrt(start.size) * jnp.finfo(self.dtype).eps * largest
        goes_on = jnp.cumprod(jnp.abs(jnp.diag(tridiagonal, 1)) > least) > 0
        is_there = jnp.concatenate([jnp.ones(1, bool), goes_on])
        values, vectors = jnp.linalg.eigh(jnp.where(jnp.outer(is_there, is_there), tridiagonal, 0))
        vectors = _matmul(vectors.T, jnp.where(jnp.expand_dims(is_there, 1), basis, 0))
        return Eigenpairs(values[::-1][:k], vectors[::-1][:k].reshape(k, *self.shape))

    def _squared_norm(self, product: Product, key: jax.Array, n_products: int) -> Estimate:
        """Estimates the sum of squares of all entries of a symmetric map."""
        size, n = math.prod(self.shape), n_products // 3
        if n < 2:
            raise ValueError(f"`n_products` must be at least 6, got {n_products}.")

        def products(vectors: jax.Array) -> jax.Array:
            """Returns the products with the columns of a matrix, as such."""
            rows = jax.lax.map(product, vectors.T.reshape(-1, *self.shape))
            return rows.reshape(-1, size).T

        sketch, probes = (
            jax.random.rademacher(k, (size, m), self.dtype)
            for k, m in zip(jax.random.split(key), (min(n, size), n), strict=True)
        )
        found, _ = jnp.linalg.qr(products(sketch))
        inside = jnp.sum(products(found) ** 2)
        outside = jnp.sum(products(probes - _matmul(found, _matmul(found.T, probes))) ** 2, 0)
        return Estimate(inside + jnp.mean(outside), jnp.std(outside, ddof=1) / math.sqrt(n))


def _product(
    f: Callable[..., Any],
    axes: OutputAxes,
    weights: list[Any],
    scales: list[jax.Array | None],
    inputs: Mixed,
    v: jax.Array,
) -> jax.Array:
    """Returns the product of the kernel and an array: a mean over the indices of traced axes.

    Args:
      f: of a list of arrays and inputs, as in `Parametrised`.
      axes: of the outputs.
      weights, scales: as in `Parametrised`. Arguments, so that one compiled product serves all their values.
      inputs: `x` and keywords.
      v: has the shape of the outputs without the traced axes; so has the product.
    """
    network = Parametrised(f, weights, scales)
    x, kwargs = inputs.tree
    outputs, pull_back = jax.vjp(lambda w: checked_outputs(network.f(w, x, **kwargs)), network.weights)
    # Not by forward-mode differentiation, which functions with a `custom_vjp` do not have.
    push_forward = jax.linear_transpose(pull_back, outputs)
    traced_shape = [outputs.shape[axis] for axis in axes.traced]
    dtype, v = v.dtype, jnp.expand_dims(v, axes.traced).astype(outputs.dtype)

    def at(index: jax.Array) -> jax.Array:
        unit = (jnp.arange(math.prod(traced_shape)) == index).astype(v.dtype).reshape(traced_shape)
        others = [axis for axis in range(axes.ndim) if axis not in axes.traced]
        chosen = jnp.expand_dims(unit, others)
        (gradients,) = pull_back(v * chosen)
        (derivatives,) = push_forward((network.scaled(gradients),))
        return jnp.sum(derivatives * chosen, axes.traced, dtype)

    products = map_numbers(at, math.prod(traced_shape))
    return jnp.mean(products, 0)


# Not in the reduced precision that accelerators default to: a projection would leave some of what it is to remove.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _centred(v: jax.Array) -> jax.Array:
    return v - jnp.mean(v, 0, keepdims=True)


def _check_not_zero(square: jax.Array, least: Any = 0) -> None:
    """Raises a ValueError for a kernel that is known to be 0, by which others cannot be divided."""
    if not is_traced(square) and square <= least:
        raise ValueError("The kernel is 0, or the same for all pairs of samples: this has no value.")


def _root(square: Estimate) -> Estimate:
    root = jnp.sqrt(square.value)
    return Estimate(root, square.standard_error / (2 * root))
