"""Which matrix: the kernel of the training points, and what is added to its diagonal."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from nt_core import KernelStore, batch
from nt_core.grid import evenly
from nt_core.layouts import make_2d
from nt_core.store import StoredMatrix
from nt_core.tracing import evaluate_now

from nt_predict._factored import Factored
from nt_predict._layout import OutputLayout, as_array
from nt_predict._tiles import Tiles

# Kernels between test points and training points are computed, used and forgotten in blocks of this size.
_BLOCK_BYTES = 2**28

_NO_TEST_TEST = "The kernel is an array: the covariance of test points needs `k_test_test`."


class Gram:
    r"""The matrix of a Gaussian process: the kernel of the training points, plus a multiple of the identity.

    It says which matrix; how to solve with it is up to :func:`fit`. Nothing is computed before that.

    Args:
      kernel: ``kernel_fn(x1, x2, get)``, of an infinite network or any function that returns an array, ``x2=None``
        standing for ``x1``; bind further keywords by ``functools.partial``. Or the train-train kernel itself, an array
        of shape ``(n, n)``, or with a pair of axes for every axis of the labels that is not a trace axis; or the
        :class:`nt_core.KernelStore` that it lies in, which :class:`PCG` reads in every pass.
      x_train: training inputs, samples along the first axis (of every array, if it is a tree of them); None for a
        kernel that is an array.
      get: which kernel to ask ``kernel_fn`` or the store for, ``'nngp'`` or ``'ntk'``.
      diag_reg: multiple of the identity to add, in units of the mean of the kernel's diagonal: the variance of the
        noise of the labels.
      diag_reg_absolute_scale: whether ``diag_reg`` is to be taken as it is, not in units of the mean of the diagonal.

    Raises:
      TypeError: inputs without a kernel function, or a kernel function without inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import Gram, fit
      >>> def kernel_fn(x1, x2, get):
      ...     return x1 @ (x1 if x2 is None else x2).T
      >>> x_train, y_train = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [3.0]])
      >>> print(fit(Gram(kernel_fn, x_train), y_train).mean(jnp.array([[1.0, 2.0]])))
      [[5.]]
      >>> print(fit(Gram(x_train @ x_train.T), y_train).mean(jnp.array([[1.0, 2.0]]) @ x_train.T))
      [[5.]]
    """

    def __init__(
        self,
        kernel: Callable[..., Any] | Any,
        x_train: Any = None,
        get: str = "nngp",
        diag_reg: Any = 0.0,
        diag_reg_absolute_scale: bool = False,
    ):
        if callable(kernel) != (x_train is not None):
            raise TypeError(
                "Give `Gram` a kernel function and training inputs, `Gram(kernel_fn, x_train, 'ntk')`, or the "
                f"train-train kernel as one array, `Gram(kernel_fn(x_train, None, 'ntk'))`; got "
                f"{type(kernel).__name__} and {type(x_train).__name__}."
            )
        self.kernel = getattr(kernel, get) if isinstance(kernel, KernelStore) else kernel
        self.x_train = x_train
        self.get = get
        self.diag_reg = diag_reg
        self.diag_reg_absolute_scale = diag_reg_absolute_scale

    def factored(self, layout: OutputLayout, name: str = "k_train_train") -> Factored:
        """Returns the matrix for labels of this layout, to be factored once; errors call the kernel by its name."""
        with evaluate_now():
            kernel = self.kernel(self.x_train, None, self.get) if callable(self.kernel) else self.kernel
            matrix = layout.train_train(kernel, name)
        return Factored(matrix, self.diag_reg, self.diag_reg_absolute_scale)

    def tiles(self, layout: OutputLayout, hold: bool | None, progress: bool) -> Tiles:
        """Returns the kernel without regularisation, for labels of this layout, as a linear map.

        Args:
          layout: of the labels.
          hold: whether to keep what `kernel_fn` returns between passes, see `Tiles`.
          progress: whether to show bars.
        """
        if not callable(self.kernel):
            matrix = layout.given_matrix(self.kernel, "k_train_train")
            stored = matrix.grid.rows if isinstance(matrix, StoredMatrix) else 1
            return Tiles(len(matrix), 1, functools.partial(_part, matrix), False, progress, stored)
        kernel_fn, get = batch(self.kernel, progress=False), self.get

        def block(rows: np.ndarray, columns: np.ndarray | None) -> jax.Array:
            others = None if columns is None else samples(self.x_train, columns)
            return make_2d(as_array(kernel_fn(samples(self.x_train, rows), others, get), "k_train_train"))

        layout.check_points(n_samples(self.x_train), kernel_fn(samples(self.x_train, slice(1)), None, get))
        positions = math.prod(layout.train_positions[1:])
        return Tiles(layout.n_points, positions, block, hold, progress)

    def joined(self, layout: OutputLayout, test: Any, k_test_test: Any) -> tuple["Gram", OutputLayout]:
        """Returns the kernel of training points followed by test points, without regularisation, and its layout."""
        n = layout.n_points + self.test_points(test, k_test_test).n
        layout = layout.with_points(n)
        if callable(self.kernel):
            x = jax.tree.map(lambda *parts: jnp.concatenate(parts), self.x_train, test)
            return Gram(self.kernel, x, self.get), layout
        if k_test_test is None:
            raise ValueError(_NO_TEST_TEST)
        order = [1, 0, *(i + (1 if i % 2 == 0 else -1) for i in range(2, test.ndim))]
        rows = [[self.kernel, test.transpose(order)], [test, k_test_test]]
        return Gram(np.concatenate([np.concatenate(row, axis=1) for row in rows])), layout

    def test_points(self, test: Any, k_test_test: Any = None) -> "TestPoints":
        """Returns the kernels of test points.

        Args:
          test: test inputs, or the test-train kernel if that of the training points is an array.
          k_test_test: the test-test kernel if that of the training points is an array.
        """
        if not callable(self.kernel):

            def given(rows: slice, columns: slice) -> Any:
                if k_test_test is None:
                    raise ValueError(_NO_TEST_TEST)
                return k_test_test[rows, columns]

            return TestPoints(len(test), lambda rows: test[rows], given)
        if k_test_test is not None:
            raise ValueError("`k_test_test` is computed by the kernel function: give the test inputs alone.")
        kernel_fn, x_train, get = self.kernel, self.x_train, self.get

        def prior(rows: slice, columns: slice) -> Any:
            return kernel_fn(samples(test, rows), None if rows == columns else samples(test, columns), get)

        return TestPoints(n_samples(test), lambda rows: kernel_fn(samples(test, rows), x_train, get), prior)


class TestPoints(NamedTuple):
    """Test points, by their kernels.

    Attributes:
      n: how many there are.
      cross: the kernel of some of them and all training points.
      prior: the kernel of some of them and some of them.
    """

    n: int
    cross: Callable[[slice], Any]
    prior: Callable[[slice, slice], Any]

    def blocks(self, n_train: int) -> list[slice]:
        """Returns blocks of test points whose kernels with so many training points are of moderate size."""
        size = evenly(self.n, max(1, _BLOCK_BYTES // (8 * n_train))) if self.n else 1
        return [slice(start, min(start + size, self.n)) for start in range(0, self.n, size)] or [slice(0, 0)]


def samples(x: Any, rows: Any) -> Any:
    """Returns some samples of inputs; of arrays of NumPy they alone are brought to the device."""

    def of(leaf: Any) -> jax.Array:
        return jnp.asarray((leaf if isinstance(leaf, np.ndarray | jax.Array) else jnp.asarray(leaf))[rows])

    return jax.tree.map(of, x)


def n_samples(x: Any) -> int:
    """Returns how many samples inputs have; raises `ValueError` if arrays of them differ in that."""
    sizes = {len(leaf) for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1:
        raise ValueError(f"All arrays of the inputs must have the same number of samples, got {sorted(sizes)}.")
    return sizes.pop()


def _part(matrix: Any, rows: np.ndarray, columns: np.ndarray | None) -> jax.Array:
    """Returns some rows and columns of a matrix, which may be larger than memory; ascending ones in slices."""
    columns = rows if columns is None else columns
    key: Any = tuple(slice(at[0], at[-1] + 1) for at in (rows, columns))
    if any(at[-1] - at[0] + 1 != len(at) for at in (rows, columns)):
        is_array = isinstance(matrix, np.ndarray | jax.Array)
        key = np.ix_(rows, columns) if is_array else (rows, columns)  # a store chooses from each axis by itself
    return jnp.asarray(matrix[key])
