"""Samples one by one: the sources laid out with their batch axes last, and what must be known of each sample alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation.block import Block, Loader, pool_same_position, select
from nt_core.evaluation.fusion import rematerialized
from nt_core.evaluation.geometry import AllPairs, Geometry, OffsetPlane, SamePosition, continued, window_sums
from nt_core.evaluation.statistics import Statistics
from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped, same_sample, zipped_diagonal
from nt_core.lowering import Lowered, LoweredNode, Pairs, Repeated
from nt_core.lowering.primitives import Dropout, Dual, Flatten, Gather, Pool, Product, Rescale, Sum, Tied, Untie
from nt_core.sources import Inputs, Source, dtype_of
from nt_core.spec import Spec

# With more channels than this a matrix product is so much faster than differences that these are kept for pairs so
# close that the product loses digits.
MAX_CHANNELS_FOR_DIFFERENCES = 16
_CLOSE = 1e-3

_NO_COVARIANCES = "This kernel holds no cov1; ask for the whole kernel (get=None) to apply more layers to it."


@dataclasses.dataclass(frozen=True)
class Batch:
    """What comes in of each sample, laid out with the batch axis last.

    Attributes:
      index: number of each sample, `(n,)`.
      inputs: for sources that are inputs, `(*space, channels, n)`.
      variance: of the sources that are deficits, `(*space, n)`.
      numbers: that come with rescalings, `(*space, n)`.
      repeated: of repeated blocks, the numbers in their body, `(count, *space, n)`.
    """

    index: Array
    inputs: dict[int, Array]
    variance: dict[int, Array]
    numbers: dict[int, Array]
    repeated: dict[int, dict[int, Array]]


jax.tree_util.register_dataclass(
    Batch, data_fields=["index", "inputs", "variance", "numbers", "repeated"], meta_fields=[]
)


def batch(lowered: Lowered, sources: tuple[Source, ...], which: int) -> Batch:
    """Returns batch 1 or 2 of the sources. Where there is no second batch, it is the first."""
    inputs, variance, dtype = {}, {}, dtype_of(sources[0])
    for i, source in enumerate(sources):
        if isinstance(source, Inputs):
            x = source.first() if which == 1 else source.second()
            inputs[i] = jnp.moveaxis(x, 0, -1)
            if lowered.forms[i].deficit:
                variance[i] = jnp.mean(inputs[i] ** 2, -2)
        elif lowered.forms[i].deficit:
            variance[i] = _variance(source, which)
    repeated = {
        number: _numbers(node.primitive.body, which, dtype, batch_axis=1)
        for number, node in lowered.numbered_nodes()
        if isinstance(node.primitive, Repeated)
    }
    numbers = _numbers(lowered, which, dtype, batch_axis=0)
    spec = sources[0].spec
    return Batch(jnp.arange(spec.n1 if which == 1 else spec.n2), inputs, variance, numbers, repeated)


def _numbers(lowered: Lowered, which: int, dtype: jnp.dtype, batch_axis: int) -> dict[int, Array]:
    """The numbers of each sample of a batch that come with rescalings, the batch axis last."""
    rescalings = ((i, node.primitive) for i, node in lowered.numbered_nodes() if isinstance(node.primitive, Rescale))
    numbers = {i: rescaling.sample_numbers(which) for i, rescaling in rescalings}
    return {i: jnp.moveaxis(x.astype(dtype), batch_axis, -1) for i, x in numbers.items() if x is not None}


def own_block(
    lowered: Lowered,
    samples: Batch,
    load: Loader,
    pool_sums: Callable[[Block, int], Pairs] | None = None,
) -> tuple[Block, Statistics]:
    """Looks at each sample of a batch with itself.

    Returns:
      A block of the samples with themselves, without tangent kernels, and their statistics.
    """
    statistics = Statistics(dict(samples.variance))
    block = Block(lowered, statistics, statistics, load, False, pool_sums)
    for number, node in lowered.numbered_nodes():
        if isinstance(node.primitive, Rescale):
            before = statistics.variance.get(node.inputs[0])
            statistics.scale[number] = node.primitive.scale(before, samples.numbers.get(number))
        if lowered.forms[number].deficit:
            _add_variance(block, lowered, number, node, samples, statistics)
    return block, statistics


def _add_variance(
    block: Block, lowered: Lowered, number: int, node: LoweredNode, samples: Batch, statistics: Statistics
) -> None:
    primitive, variances = node.primitive, [statistics.variance[i] for i in node.inputs]
    if isinstance(primitive, Pool) and not lowered.input_form(node).same_position:
        along = primitive.windows
        own = select(block.pool_average(number).value, AllPairs(len(along)), SamePosition())
        variance = primitive.own_variance(own, window_sums(variances[0], along))
        statistics.self_deficit[number] = own
        statistics.variance[number] = variance if primitive.keeps_axes else variance.reshape(variance.shape[-1:])
    elif isinstance(primitive, Repeated):
        variance, of_body = _repeated_statistics(primitive, variances[0], samples.repeated[number])
        statistics.variance[number], statistics.repeated[number] = variance, of_body
    else:
        statistics.variance[number] = _variance_after(node, variances, statistics.scale.get(number))


def _variance_after(node: LoweredNode, variances: list[Array], scale: Array | None) -> Array:
    """Variances, `(*space, n)`, after a primitive for which those before it are enough."""
    primitive, var = node.primitive, variances[0]
    match primitive:
        case Tied():
            sums, n_space = window_sums(var, primitive.windows), len(primitive.order)
            return primitive.variance(jnp.transpose(sums, (*primitive.order, *range(n_space, var.ndim))))
        case Rescale():
            assert scale is not None
            return primitive.variance(var, scale)
        case Dual() | Dropout() | Sum() | Product() | Gather():
            return primitive.variance(*variances)
        case Untie():
            return var
        case Flatten():
            return jnp.mean(var, tuple(range(var.ndim - 1)))
        case Pool():
            pooled = pool_same_position(primitive, var)
            return pooled if primitive.keeps_axes else pooled.reshape(pooled.shape[-1:])
    raise NotImplementedError(f"No variance after the primitive {type(primitive).__name__}.")


def _repeated_statistics(primitive: Repeated, source: Array, numbers: dict[int, Array]) -> tuple[Array, Statistics]:
    """Variances after repeated layers, and the statistics of every iteration."""

    def apply(source: Array, iteration: tuple[Lowered, dict[int, Array]]) -> tuple[Array, Statistics]:
        body, numbers = iteration
        statistics = Statistics({0: source})
        for number, node in body.numbered_nodes():
            variances = [statistics.variance[i] for i in node.inputs]
            if isinstance(node.primitive, Rescale):
                statistics.scale[number] = node.primitive.scale(variances[0], numbers.get(number))
            statistics.variance[number] = _variance_after(node, variances, statistics.scale.get(number))
        return statistics.variance[body.outputs[0]], statistics

    return lax.scan(apply, source, (primitive.body, numbers))


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
    """Returns the covariances of each sample of a batch with itself, of materialised sources that hold them, as
    `(*pairs, n)`."""
    kernels = {i: s for i, s in enumerate(sources) if isinstance(s, Kernel) and s.cov1 is not None}
    return {i: Pairs(_self_covariance(s, which), None) for i, s in kernels.items()}


def paired_full_batch(sources: tuple[Source, ...], which: int) -> dict[int, Pairs]:
    """Returns the covariances of a batch with itself, of materialised sources that hold them, `(*pairs, n, n)`."""
    covs = {
        i: s.cov1 if which == 1 or s.cov2 is None else s.cov2 for i, s in enumerate(sources) if isinstance(s, Kernel)
    }
    return {i: Pairs(_batch_last(cov, sources[i].spec, 2), None) for i, cov in covs.items()}


@dataclasses.dataclass(frozen=True)
class SourceLoader:
    """Forms the covariances of sources.

    Attributes:
      lowered: the program that starts from them.
      first, second: the batches, laid out to broadcast against pairs (see `crossed`).
      pairs: the materialised covariances.
      are_identical: the batches are equal, a (traced) boolean.
      are_same: the batches hold the same samples to dropout, a (traced) boolean.
    """

    lowered: Lowered
    first: Batch
    second: Batch
    pairs: dict[int, Pairs]
    are_identical: bool | Array
    are_same: bool | Array

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        form = self.lowered.forms[number]
        as_deficit = form.deficit
        if number in self.first.inputs:
            x1, x2 = geometry.first(self.first.inputs[number]), geometry.second(self.second.inputs[number])
            return Pairs(self._input_deficit(number, geometry, x1, x2) if as_deficit else self._product(x1, x2), None)
        stored = SamePosition() if form.same_position else AllPairs(len(form.space))
        if number not in self.pairs:
            raise ValueError(_NO_COVARIANCES)
        value, ntk = self.pairs[number]
        value = select(value, stored, geometry)
        if as_deficit:
            value = self._deficit_of(number, geometry, value)
        return Pairs(value, None if ntk is None else select(ntk, stored, geometry))

    def is_stored(self, number: int) -> bool:
        return number not in self.first.inputs

    def continued(self, n_space: int) -> "SourceLoader":
        inputs = {i: continued(x, n_space) for i, x in self.second.inputs.items()}
        variance = {i: continued(v, n_space) for i, v in self.second.variance.items()}
        return dataclasses.replace(self, second=dataclasses.replace(self.second, inputs=inputs, variance=variance))

    def _input_deficit(self, number: int, geometry: Geometry, x1: Array, x2: Array) -> Array:
        if not self._is_crossed():
            return jnp.mean((x1 - x2) ** 2, -2) / 2
        var1, var2 = geometry.first(self.first.variance[number]), geometry.second(self.second.variance[number])
        identical = self.identical(self.lowered.forms[number].space, geometry, var1.ndim)
        return crossed_deficit(x1, x2, var1, var2, identical)

    def _product(self, x1: Array, x2: Array) -> Array:
        """Mean over the channels of the product."""
        return crossed_product(x1, x2) if self._is_crossed() else jnp.mean(x1 * x2, -2)

    def _is_crossed(self) -> bool:
        return self.first.index.ndim == 2

    def _deficit_of(self, number: int, geometry: Geometry, covariance: Array) -> Array:
        """The deficit by subtraction, exactly 0 for what is known to be identical."""
        var1, var2 = self.first.variance[number], self.second.variance[number]
        deficit = (geometry.first(var1) + geometry.second(var2)) / 2 - covariance
        return jnp.where(self.identical(self.lowered.forms[number].space, geometry, deficit.ndim), 0, deficit)

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        return self._paired(self.are_identical, space, geometry, ndim)

    def same(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        return self._paired(self.are_same, space, geometry, ndim)

    def _paired(self, batches: bool | Array, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        same_sample = (self.first.index == self.second.index) & batches
        return lax.expand_dims(same_sample, range(ndim - same_sample.ndim)) & _same_position(geometry, space, ndim)


def crossed(batch1: Any, batch2: Any) -> tuple[Any, Any]:
    """Lays two trees of arrays with a trailing batch axis out such that they broadcast to all pairs of samples."""
    return (
        jax.tree.map(lambda a: jnp.expand_dims(a, -1), batch1),
        jax.tree.map(lambda a: jnp.expand_dims(a, -2), batch2),
    )


def crossed_product(x1: Array, x2: Array) -> Array:
    """Returns the means over the channels of the products of all samples, `(..., channels, n1, 1)` with
    `(..., channels, 1, n2)`."""
    return product_of_vectors(*_as_vectors(x1, x2))


def crossed_deficit(x1: Array, x2: Array, var1: Array, var2: Array, identical: Array) -> Array:
    """Returns the deficits of all pairs of samples, of the same shapes, with their variances."""
    return deficit_of_vectors(*_as_vectors(x1, x2), var1, var2, identical)


def _as_vectors(x1: Array, x2: Array) -> tuple[Array, Array]:
    return jnp.swapaxes(x1[..., 0], -1, -2), jnp.swapaxes(x2[..., 0, :], -1, -2)


def product_of_vectors(x1: Array, x2: Array) -> Array:
    """Returns the means of the products of all vectors, `(..., n1, channels)` with `(..., n2, channels)`."""
    return jnp.matmul(x1, jnp.swapaxes(x2, -1, -2), precision=lax.Precision.HIGHEST) / x1.shape[-1]


def deficit_of_vectors(x1: Array, x2: Array, var1: Array, var2: Array, identical: Array) -> Array:
    """Returns the deficits of all vectors, `(..., n1, channels)` with `(..., n2, channels)`, given their variances,
    `(..., n1, 1)` and `(..., 1, n2)`.

    Differences are formed where a product would lose digits, and exactly 0 is what is known to be identical.
    """
    if x1.shape[-1] <= MAX_CHANNELS_FOR_DIFFERENCES:
        return half_mean_square_difference(jnp.swapaxes(x1, -1, -2)[..., None], jnp.swapaxes(x2, -1, -2)[..., None, :])
    deficit = jnp.maximum(jnp.where(identical, 0, (var1 + var2) / 2 - product_of_vectors(x1, x2)), 0)
    doubtful = jnp.any((deficit < _CLOSE * (var1 + var2)) & ~identical)
    # Derivatives keep the inputs alone: not all differences, or zeros in their place where nothing is doubtful.
    return lax.cond(doubtful, rematerialized(_deficit_row_by_row), lambda *_: deficit, x1, x2)


def _deficit_row_by_row(x1: Array, x2: Array) -> Array:
    def row(x: Array) -> Array:
        return jnp.mean((x[..., None, :] - x2) ** 2, -1) / 2

    return jnp.moveaxis(lax.map(rematerialized(row), jnp.moveaxis(x1, -2, 0)), 0, -2)


def half_mean_square_difference(x1: Array, x2: Array) -> Array:
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
        raise ValueError(_NO_COVARIANCES)
    if not kernel.diagonal_batch:
        cov = same_sample(cov)
    return _batch_last(cov, kernel.spec, 1)


def _variance(kernel: Kernel, which: int) -> Array:
    cov = jnp.moveaxis(_self_covariance(kernel, which), -1, 0)
    return jnp.moveaxis(cov if kernel.diagonal_spatial else zipped_diagonal(cov, 1), 0, -1)
