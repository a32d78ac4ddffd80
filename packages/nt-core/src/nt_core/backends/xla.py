"""The reference backend: pure JAX, on any device, in any floating point type, differentiable.

Covariances are carried as deficits while later steps read variances (see docs/numerics.md). Where a network pools over
an image, each offset plane (all pairs of positions a given distance apart) runs through the layers on its own.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.backends.base import Device, Request
from nt_core.evaluation.angular import AngularBlock, AngularLoader, has_no_positions, with_derivatives_of
from nt_core.evaluation.block import Block
from nt_core.evaluation.fusion import unfused
from nt_core.evaluation.samples import (
    Batch,
    SourceLoader,
    batch,
    crossed,
    own_block,
    paired,
    paired_full_batch,
    paired_with_self,
)
from nt_core.evaluation.statistics import Statistics
from nt_core.evaluation.tiles import block_size, map_pairs, map_samples
from nt_core.grid import mirrored
from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped
from nt_core.lowering import Pairs, fold_repeats, lower
from nt_core.program import Program
from nt_core.sources import Source, identical_batches, is_symmetric, same_batches
from nt_core.spec import Spec


class XlaBackend:
    """Takes every program."""

    name = "xla"

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request, device: Device) -> str | None:
        return None

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        return _Propagation(program, sources, request).kernels()


class _Propagation:
    """One execution of a program."""

    def __init__(self, program: Program, sources: tuple[Source, ...], request: Request) -> None:
        self._specs = [program.spec(i) for i in program.outputs]
        lowered = lower(program, sources, ntk=request.ntk, covariances=request.covariances)
        self._lowered = fold_repeats(lowered)
        self._sources = sources
        self._request = request
        self._symmetric = all(is_symmetric(source) for source in sources)
        self._block = block_size(self._lowered, sources[0].spec.n1, sources[0].spec.n2)

    def kernels(self) -> tuple[Kernel, ...]:
        first = self._one_batch(1)
        second = first if self._symmetric else self._one_batch(2)
        pairs = self._pairs(first, second, paired(self._sources), self._request.ntk, self._symmetric)
        cov1 = self._covariances(1, first)
        cov2 = [None] * len(cov1) if self._symmetric else self._covariances(2, second)
        kernels = []
        for i, spec in enumerate(self._specs):
            nngp, ntk = pairs[i].value, pairs[i].ntk
            if self._request.ntk and ntk is None:
                ntk = jnp.zeros((), nngp.dtype)  # no parameters seen yet
            elif ntk is not None:
                ntk = _batch_first(ntk, spec, 2)
            kernels.append(
                Kernel.from_spec(
                    spec,
                    nngp=_batch_first(nngp, spec, 2),
                    ntk=ntk,
                    cov1=cov1[i],
                    cov2=cov2[i],
                    x1_is_x2=same_batches(self._sources),
                )
            )
        return tuple(kernels)

    def _one_batch(self, which: int) -> "_OneBatch":
        """Looks at each sample of a batch on its own."""
        data = batch(self._lowered, self._sources, which)
        wants_covariances = self._request.covariances and self._sources[0].spec.diagonal_batch

        def compute(blocks: tuple[Batch, dict[int, Pairs]]) -> tuple[Statistics, list[Array]]:
            samples, own = blocks
            loader = SourceLoader(self._lowered, samples, samples, own, True, True)
            block, statistics = own_block(self._lowered, samples, loader)
            outputs = self._lowered.outputs if wants_covariances else ()
            return statistics, [block.covariance(i).value for i in outputs]

        n = data.index.shape[0]
        blocks = (data, paired_with_self(self._sources, which))
        statistics, covariances = map_samples(compute, blocks, n, self._block[0] * self._block[1])
        return _OneBatch(data, statistics, covariances)

    def _covariances(self, which: int, one: "_OneBatch") -> list[Array | None]:
        """Returns the covariances of a batch with itself at the outputs, as a `Kernel` stores them."""
        if not self._request.covariances:
            return [None] * len(self._specs)
        if one.covariances:
            return [_batch_first(c, spec, 1) for c, spec in zip(one.covariances, self._specs, strict=True)]
        pairs = self._pairs(one, one, paired_full_batch(self._sources, which), ntk=False, symmetric=True)
        return [_batch_first(x.value, spec, 2) for x, spec in zip(pairs, self._specs, strict=True)]

    def _pairs(
        self, first: "_OneBatch", second: "_OneBatch", pairs: dict[int, Pairs], ntk: bool, symmetric: bool
    ) -> list[Pairs]:
        """Returns the covariances at the outputs, `(*pairs, n1, n2)`."""
        identical = True if symmetric else identical_batches(self._sources)
        same = True if symmetric else same_batches(self._sources)

        def compute(blocks1: Any, blocks2: Any, pairs: dict[int, Pairs]) -> list[Pairs]:
            (batch1, statistics1), (batch2, statistics2) = crossed(blocks1, blocks2)
            loader = SourceLoader(self._lowered, batch1, batch2, pairs, identical, same)
            block = Block(self._lowered, statistics1, statistics2, loader, ntk)
            plain = [block.covariance(i) for i in self._lowered.outputs]
            if not has_no_positions(self._lowered):
                return plain
            loader = AngularLoader(self._lowered, batch1, batch2, pairs, identical, same)
            block = AngularBlock(self._lowered, statistics1, statistics2, loader, ntk)
            return jax.tree.map(with_derivatives_of, [block.covariance(i) for i in self._lowered.outputs], plain)

        data1, data2 = (first.data, first.statistics), (second.data, second.statistics)
        shape = (first.data.index.shape[0], second.data.index.shape[0])
        outputs = map_pairs(compute, data1, data2, pairs, shape, self._block, symmetric)
        if not symmetric:
            return outputs
        return [_mirrored_pairs(x, spec) for x, spec in zip(outputs, self._specs, strict=True)]


@dataclasses.dataclass(frozen=True)
class _OneBatch:
    data: Batch
    statistics: Statistics
    covariances: list[Array]


def _batch_first(x: Array, spec: Spec, n_batch: int) -> Array:
    """From `(*pairs, *batch)` to the layout of a `Kernel`."""
    x = jnp.moveaxis(x, range(-n_batch, 0), range(n_batch))
    return reverse_zipped(x, n_batch) if spec.is_reversed and not spec.diagonal_spatial else x


def _mirrored_pairs(pairs: Pairs, spec: Spec) -> Pairs:
    """Makes covariances `(*pairs, n, n)` of a batch with itself exactly symmetric."""
    n_zipped = 0 if spec.diagonal_spatial else len(spec.space)
    axes = [(-2, -1), *((axis, axis + 1) for axis in range(0, 2 * n_zipped, 2))]
    # Apart from what precedes it: XLA might compute both triangles anew, each with roundings of its own.
    return jax.tree.map(lambda x: unfused(lambda x: mirrored(x, axes), x), pairs)
