"""Lays sources out for evaluation: spatial axes first, batch axes last."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.backends.xla.block import Pairs, select
from nt_core.backends.xla.geometry import AllPairs, Geometry, OffsetPlane, SamePosition
from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped, zipped_diagonal
from nt_core.sources import Inputs, Source
from nt_core.spec import Spec

# With more channels than this a matrix product is so much faster than differences that these are kept for pairs so
# close that the product loses digits.
_MAX_CHANNELS_FOR_DIFFERENCES = 16
_CLOSE = 1e-3


@dataclasses.dataclass(frozen=True)
class Batch:
    """What is known of each sample alone, laid out with the batch axis last.

    Attributes:
      index: number of each sample, `(n,)`.
      inputs: for sources that are inputs, `(*space, channels, n)`.
      variance: of every source, `(*space, n)`.
    """

    index: Array
    inputs: dict[int, Array]
    variance: dict[int, Array]


jax.tree_util.register_dataclass(Batch, data_fields=["index", "inputs", "variance"], meta_fields=[])


def batch(sources: tuple[Source, ...], which: int) -> Batch:
    """Returns batch 1 or 2 of the sources. Where there is no second batch, it is the first."""
    inputs, variance = {}, {}
    for i, source in enumerate(sources):
        if isinstance(source, Inputs):
            x = source.first() if which == 1 else source.second()
            inputs[i] = jnp.moveaxis(x, 0, -1)
            variance[i] = jnp.mean(inputs[i] ** 2, -2)
        else:
            variance[i] = _variance(source, which)
    spec = sources[0].spec
    return Batch(jnp.arange(spec.n1 if which == 1 else spec.n2), inputs, variance)


def paired(sources: tuple[Source, ...]) -> dict[int, Pairs]:
    """Returns the covariances of materialised sources, `(*pairs, n1, n2)`."""
    return {
        i: Pairs(
            _batch_last(s.nngp, s.spec, 2), None if s.ntk is None or s.ntk.ndim == 0 else _batch_last(s.ntk, s.spec, 2)
        )
        for i, s in enumerate(sources)
        if isinstance(s, Kernel)
    }


def paired_with_self(sources: tuple[Source, ...], which: int) -> dict[int, Pairs]:
    """Returns the covariances of each sample of a batch with itself, of materialised sources, `(*pairs, n)`."""
    return {i: Pairs(_self_covariance(s, which), None) for i, s in enumerate(sources) if isinstance(s, Kernel)}


def paired_full_batch(sources: tuple[Source, ...], which: int) -> dict[int, Pairs]:
    """Returns the covariances of a batch with itself, of materialised sources that hold them, `(*pairs, n, n)`."""
    covs = {
        i: s.cov1 if which == 1 or s.cov2 is None else s.cov2 for i, s in enumerate(sources) if isinstance(s, Kernel)
    }
    return {i: Pairs(_batch_last(cov, sources[i].spec, 2), None) for i, cov in covs.items()}


@dataclasses.dataclass(frozen=True)
class Loader:
    """Forms the covariances of sources.

    Attributes:
      first, second: the batches, laid out to broadcast against pairs (see `crossed`).
      pairs: the materialised covariances.
      needs: whether each source is wanted as a deficit.
      same: the batches hold the same samples, a (traced) boolean.
    """

    specs: tuple[Spec, ...]
    first: Batch
    second: Batch
    pairs: dict[int, Pairs]
    needs: tuple[bool, ...]
    same: bool | Array

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        as_deficit = self.needs[number]
        if number in self.first.inputs:
            x1, x2 = geometry.first(self.first.inputs[number]), geometry.second(self.second.inputs[number])
            return Pairs(self._input_deficit(number, geometry, x1, x2) if as_deficit else self._product(x1, x2), None)
        stored = AllPairs(len(self.specs[number].space))
        if self.specs[number].diagonal_spatial or not self.specs[number].space:
            stored = SamePosition()
        value, ntk = self.pairs[number]
        value = select(value, stored, geometry)
        if as_deficit:
            value = self._deficit_of(number, geometry, value)
        return Pairs(value, None if ntk is None else select(ntk, stored, geometry))

    def _input_deficit(self, number: int, geometry: Geometry, x1: Array, x2: Array) -> Array:
        if not self._is_crossed():
            return jnp.mean((x1 - x2) ** 2, -2) / 2
        if x1.shape[-3] <= _MAX_CHANNELS_FOR_DIFFERENCES:
            return _half_mean_square_difference(x1, x2)
        deficit = jnp.maximum(self._deficit_of(number, geometry, self._product(x1, x2)), 0)
        var1, var2 = self.first.variance[number], self.second.variance[number]
        close = deficit < _CLOSE * (geometry.first(var1) + geometry.second(var2))
        doubtful = jnp.any(close & ~self.identical(self.specs[number].space, geometry, deficit.ndim))
        return lax.cond(doubtful, self._deficit_row_by_row, lambda *_: deficit, x1, x2)

    def _deficit_row_by_row(self, x1: Array, x2: Array) -> Array:
        rows = lax.map(
            lambda row: jnp.mean((row[..., None] - x2[..., 0, :]) ** 2, -2) / 2, jnp.moveaxis(x1[..., 0], -1, 0)
        )
        return jnp.moveaxis(rows, 0, -2)

    def _product(self, x1: Array, x2: Array) -> Array:
        """Mean over the channels of the product."""
        if not self._is_crossed():
            return jnp.mean(x1 * x2, -2)
        rows, columns = jnp.swapaxes(x1[..., 0], -1, -2), x2[..., 0, :]
        return jnp.matmul(rows, columns, precision=lax.Precision.HIGHEST) / rows.shape[-1]

    def _is_crossed(self) -> bool:
        return self.first.index.ndim == 2

    def _deficit_of(self, number: int, geometry: Geometry, covariance: Array) -> Array:
        """The deficit by subtraction, exactly 0 for what is known to be identical."""
        var1, var2 = self.first.variance[number], self.second.variance[number]
        deficit = (geometry.first(var1) + geometry.second(var2)) / 2 - covariance
        return jnp.where(self.identical(self.specs[number].space, geometry, deficit.ndim), 0, deficit)

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        same_sample = (self.first.index == self.second.index) & self.same
        return lax.expand_dims(same_sample, range(ndim - same_sample.ndim)) & _same_position(geometry, space, ndim)


def crossed(batch1: Any, batch2: Any) -> tuple[Any, Any]:
    """Lays two trees of arrays with a trailing batch axis out such that they broadcast to all pairs of samples."""
    return (
        jax.tree.map(lambda a: jnp.expand_dims(a, -1), batch1),
        jax.tree.map(lambda a: jnp.expand_dims(a, -2), batch2),
    )


def _half_mean_square_difference(x1: Array, x2: Array) -> Array:
    """`mean((x1 - x2)^2) / 2` over the channels, which stand before two batch axes."""
    n_channels = x1.shape[-3]
    squares = [(x1[..., c, :, :] - x2[..., c, :, :]) ** 2 for c in range(n_channels)]
    return sum(squares[1:], squares[0]) / (2 * n_channels)


def _same_position(geometry: Geometry, space: tuple[int, ...], ndim: int) -> Array:
    """Which pairs are of equal positions, broadcasting against pairs of rank `ndim`."""
    same = jnp.ones((1,) * ndim, bool)
    if isinstance(geometry, OffsetPlane):
        for offset in geometry.offset:
            same &= offset == 0
    if isinstance(geometry, AllPairs):
        for axis, size in enumerate(space):
            shape = [1] * ndim
            shape[2 * axis : 2 * axis + 2] = size, size
            same &= jnp.eye(size, dtype=bool).reshape(shape)
    return same


def _batch_last(x: Any, spec: Spec, n_batch: int) -> Array:
    if spec.is_reversed and not spec.diagonal_spatial:
        x = reverse_zipped(x, n_batch)
    return jnp.moveaxis(x, range(n_batch), range(-n_batch, 0))


def _self_covariance(kernel: Kernel, which: int) -> Array:
    """Covariance of each sample of a batch with itself, `(*pairs, n)`."""
    cov = kernel.cov1 if which == 1 or kernel.cov2 is None else kernel.cov2
    if cov is None:
        raise ValueError("This kernel holds no cov1; ask for the whole kernel (get=None) to apply more layers to it.")
    if not kernel.diagonal_batch:
        cov = jnp.moveaxis(jnp.diagonal(cov, axis1=0, axis2=1), -1, 0)
    return _batch_last(cov, kernel.spec, 1)


def _variance(kernel: Kernel, which: int) -> Array:
    cov = jnp.moveaxis(_self_covariance(kernel, which), -1, 0)
    return jnp.moveaxis(cov if kernel.diagonal_spatial else zipped_diagonal(cov, 1), 0, -1)
