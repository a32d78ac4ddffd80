"""Executes a program stage by stage, on blocks of pairs of samples."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.backends.base import Request
from nt_core.backends.mosaic.plan import Hardware, Instance, Stage, fold, make_plan, n_planes
from nt_core.backends.mosaic.tables import coefficients, positions, tables
from nt_core.backends.xla.block import Block, Pairs
from nt_core.backends.xla.geometry import AllPairs, Geometry
from nt_core.backends.xla.sources import Batch, Loader, batch, crossed
from nt_core.backends.xla.tiles import map_pairs, map_samples
from nt_core.backends.xla.variances import Statistics, pool_sum, window_counts
from nt_core.program import Node, Program
from nt_core.sources import Inputs, Source, identical_batches
from nt_core.steps import Flatten, GlobalPool, Pool

_MAX_SAMPLES = 128

RunStage = Callable[..., Array]  # see `run_stage` of both kinds of hardware


class Propagation:
    """One execution of a program."""

    def __init__(
        self,
        program: Program,
        sources: tuple[Source, ...],
        request: Request,
        run_stage: RunStage,
        hardware: Hardware,
    ) -> None:
        self._program, self._needs = fold(program)
        self._sources = sources
        self._request = request
        self._run_stage = run_stage
        self._hardware = hardware
        self._stages = make_plan(self._program, self._needs, sources, request.ntk, hardware)
        self._symmetric = all(isinstance(s, Inputs) and s.x2 is None for s in sources)

    def pairs(self) -> Pairs:
        """Returns the covariances of all pairs of samples, `(n1, n2)`, and their tangent kernel."""
        first = self._samples(1)
        second = first if self._symmetric else self._samples(2)
        n1, n2 = first[0].index.shape[0], second[0].index.shape[0]
        same = True if self._symmetric else identical_batches(self._sources)

        def compute(block1: Any, block2: Any, pairs: dict[int, Pairs]) -> list[Pairs]:
            return [self._block(block1, block2, same)]

        (out,) = map_pairs(compute, first, second, {}, (n1, n2), self._block_size(n1, n2), self._symmetric)
        return jax.tree.map(_mirrored, out) if self._symmetric else out

    def _block_size(self, n1: int, n2: int) -> tuple[int, int]:
        pairs = self._hardware.numbers // max(_numbers_between(stage) for stage in self._stages)
        columns = max(1, min(n2, _MAX_SAMPLES, pairs))
        return max(1, min(n1, _MAX_SAMPLES, pairs // columns)), columns

    def _samples(self, which: int) -> tuple[Batch, Statistics]:
        """Looks at each sample of a batch on its own."""
        data = batch(self._sources, which)
        own_stages = make_plan(self._program, self._needs, self._sources, False, self._hardware)
        own_stages = [stage for stage in own_stages if stage.deficit and not isinstance(stage.step, Flatten)]

        def compute(samples: Batch) -> Statistics:
            statistics = Statistics(dict(samples.variance))

            def pool_sums(stage: Stage, read: dict[int, Pairs]) -> Array:
                read = {i: Pairs(x.value[..., None], None) for i, x in read.items()}
                return self._run(stage, (samples, statistics), (samples, statistics), read, own=True)[..., 0]

            load = Loader(self._program.sources, samples, samples, {}, self._needs, True)
            _OwnPairs(self._program, self._needs, statistics, load, own_stages, pool_sums).complete_statistics()
            return statistics

        n = data.index.shape[0]
        per_sample = max(map(_numbers_between, own_stages), default=1)
        return data, map_samples(compute, data, n, max(1, min(n, self._hardware.numbers // per_sample)))

    def _block(self, block1: tuple[Batch, Statistics], block2: tuple[Batch, Statistics], same: Any) -> Pairs:
        index1, index2 = block1[0].index, block2[0].index
        equal = (index1[:, None] == index2[None, :]) & same
        read: dict[int, Pairs] = {}
        for stage in self._stages:
            out = self._run(stage, block1, block2, read)
            read[stage.readout] = read_out(stage, out, block1[1], block2[1], equal)
        return self._tail(read, block1[1], block2[1])

    def _run(
        self,
        stage: Stage,
        block1: tuple[Batch, Statistics],
        block2: tuple[Batch, Statistics],
        read: dict[int, Pairs],
        own: bool = False,
    ) -> Array:
        """Runs a stage for all pairs of two blocks; with `own`, of each sample with itself: `(..., n, 1)`."""
        index1, index2 = block1[0].index, block2[0].index
        arguments = (
            coefficients(stage),
            tables(stage, self._program, *block1, stage.torus.addresses()),
            tables(stage, self._program, *block2, np.arange(stage.torus.reach) % stage.torus.size),
            _planes(stage, read, (index1.shape[0], 1 if own else index2.shape[0])),
            jnp.array(self._symmetric and not own) & (index1[0] == index2[0]),
        )
        # One after another under `vmap`: each call fills the device, and memory stays what it is.
        run_stage = jax.custom_batching.sequential_vmap(partial(self._run_stage, stage, own=own))
        return _varying(run_stage(*(_varying(x, arguments) for x in arguments)), arguments)

    def _tail(self, read: dict[int, Pairs], first: Statistics, second: Statistics) -> Pairs:
        """What follows the last readouts: few numbers, for `xla`."""
        program, kept = _after(self._program, set(read))

        def renumbered(statistics: Statistics) -> Statistics:
            variance = {
                i: statistics.variance[number] for i, number in enumerate(kept) if number in statistics.variance
            }
            repeated = {
                i: statistics.repeated[number] for i, number in enumerate(kept) if number in statistics.repeated
            }
            return Statistics(variance, repeated=repeated)

        needs = tuple(self._needs[number] for number in kept)
        load = _Readouts([read[number] for number in kept[: len(program.sources)]])
        statistics1, statistics2 = crossed(renumbered(first), renumbered(second))
        block = Block(program, needs, statistics1, statistics2, load, self._request.ntk)
        return block.covariance(program.outputs[0])


class _OwnPairs(Block):
    """Each sample of a block with itself, with pools by kernels."""

    def __init__(
        self,
        program: Program,
        needs: tuple[bool, ...],
        statistics: Statistics,
        load: Loader,
        stages: list[Stage],
        pool_sums: Callable[[Stage, dict[int, Pairs]], Array],
    ) -> None:
        super().__init__(program, needs, statistics, statistics, load, ntk=False)
        self._stages = {stage.readout: stage for stage in stages}
        self._kernel_sums = pool_sums

    def _pool_sums(self, number: int, pool: Pool) -> Pairs:
        stage = self._stages[number]
        (value,) = summed_windows(
            stage, self._kernel_sums(stage, self._readouts), window_counts(pool, stage.spec).shape
        )
        return Pairs(value, None)


class _Readouts:
    """The readouts of the stages, as sources of what follows."""

    def __init__(self, pairs: list[Pairs]) -> None:
        self._pairs = pairs

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        return self._pairs[number]

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("What follows the last readout holds no pool over an image.")


def _numbers_between(stage: Stage) -> int:
    """How many numbers of one pair of samples are in memory before or after a stage."""
    after = stage.offsets if stage.windows is not None else 1
    before = n_planes(stage) * sum(source.n_source_rows for source in stage.sources)
    return stage.torus.slots * max(before, 2 * after)


def read_out(stage: Stage, out: Array, first: Statistics, second: Statistics, equal: Array) -> Pairs:
    """Turns what a stage has summed into covariances, or deficits, `(*pairs, n1, n2)`.

    Args:
      out: of `run_stage`.
      equal: which pairs are of equal samples.
    """
    spec, step = stage.spec, stage.step
    if isinstance(step, Flatten):
        value, *ntk = _total(stage, out) / math.prod(spec.space)
        return Pairs(value, ntk[0] if ntk else None)
    pool = step if isinstance(step, Pool) else Pool(spec.space, (1,) * len(spec.space), "VALID", step.mean)  # type: ignore
    counts = window_counts(pool, spec)
    pairs = AllPairs(len(spec.space))
    pooled = summed_windows(stage, out, counts.shape)
    size = counts if pool.normalize_edges else jnp.full_like(counts, math.prod(pool.window))
    if pool.mean:
        divisor = (pairs.first(size) * pairs.second(size)).astype(out.dtype)
        pooled = pooled / lax.expand_dims(divisor, (0, -2, -1))
    value, *ntk = pooled
    if stage.deficit:
        value = _pooled_deficit(stage, pool, value, counts, crossed(first, second), equal)
    shape = value.shape[-2:] if isinstance(step, GlobalPool) else value.shape
    return Pairs(value.reshape(shape), ntk[0].reshape(shape) if ntk else None)


def _total(stage: Stage, out: Array) -> Array:
    """Sums a plane over all addresses."""
    return jnp.sum(out[:, stage.torus.slot(np.arange(stage.torus.size))], 1)


def summed_windows(stage: Stage, out: Array, space: tuple[int, ...]) -> Array:
    """Turns what a stage that ends in a pool has summed into sums over pairs of windows, `(kernels, *pairs, ...)`."""
    if stage.windows is None:
        return lax.expand_dims(_total(stage, out), range(1, 1 + 2 * len(space)))
    offset, slot = pairs_on_torus(stage, space)
    return jnp.moveaxis(out[offset, :, slot], offset.ndim, 0)


def _pooled_deficit(
    stage: Stage, pool: Pool, pooled: Array, counts: Array, statistics: tuple[Statistics, Statistics], equal: Array
) -> Array:
    """Turns a pooled deficit into the deficit of the pooled covariance, exactly 0 for equal pairs."""
    pairs, (first, second) = AllPairs(counts.ndim), statistics
    own = pairs.first(first.self_deficit[stage.readout]) + pairs.second(second.self_deficit[stage.readout])
    identical = lax.expand_dims(equal, range(2 * counts.ndim))
    for axis, n in enumerate(counts.shape):
        same_position = jnp.eye(n, dtype=bool)
        others = [a for a in range(pooled.ndim) if a not in (2 * axis, 2 * axis + 1)]
        identical = identical & lax.expand_dims(same_position, others)
    deficit = jnp.where(identical, 0, pooled - own / 2)
    if pool.mean and pool.normalize_edges:
        return deficit
    size = math.prod(pool.window) if pool.mean else 1
    uneven = ((pairs.first(counts) - pairs.second(counts)) / (2 * size**2)).astype(pooled.dtype)
    sums1, sums2 = (pool_sum(pool, stage.spec, s.variance[stage.root.number]) for s in (first, second))
    return deficit + lax.expand_dims(uneven, (-2, -1)) * (pairs.first(sums1) - pairs.second(sums2))


def pairs_on_torus(stage: Stage, space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns offset and slot of each pair of positions after a pool, zipped."""
    torus, (rows, columns) = stage.torus, stage.torus.shape
    axes = [np.arange(n) for n in space]
    zipped = np.meshgrid(*(a for axis in axes for a in (axis, axis)), indexing="ij")
    y, y_other = (zipped[0], zipped[1]) if len(space) == 2 else (0, 0)
    x, x_other = zipped[-2:]
    if torus.wraps:
        offset = (y_other - y) % rows * columns + (x_other - x) % columns
    else:
        offset = ((y_other - y) * torus.steps[0] + (x_other - x) * torus.steps[1]) % torus.size
    return offset, torus.slot((y * torus.steps[0] + x * torus.steps[1]) % torus.size)


def _planes(stage: Stage, read: dict[int, Pairs], shape: tuple[int, int]) -> Array:
    """Returns the covariances that a stage starts from, `(planes, rows, lanes, n1, n2)`."""
    if not stage.sources:
        return jnp.zeros((1, 1, 1, *shape), jnp.float32)
    found = []
    for source in stage.sources:
        n = math.prod(source.space)
        at = _pairs_of_planes(stage, source)
        for x in read[source.number]:
            if x is not None:
                n_space = (x.ndim - 2) // 2
                order = [*range(0, 2 * n_space, 2), *range(1, 2 * n_space, 2), x.ndim - 2, x.ndim - 1]
                flat = jnp.transpose(x, order).reshape(n * n, *shape)
                with_ghost = jnp.pad(flat, ((0, 1), (0, 0), (0, 0)))
                found.append(jnp.take(with_ghost, at.reshape(-1), axis=0).reshape(*at.shape, *shape))
    return jnp.concatenate(found, 1)


def _pairs_of_planes(stage: Stage, source: Instance) -> np.ndarray:
    """Returns the number of the pair in each slot, `(planes, phases, slots)`; with a ghost, that is their count."""
    torus, (rows, columns), scale = stage.torus, stage.torus.shape, source.scale
    at = positions(torus, source.space, scale)
    plane, phase, address = np.ix_(range(n_planes(stage)), range(source.phases), torus.addresses().tolist())
    finer, offset = plane // stage.offsets, plane % stage.offsets
    y = phase // scale[1] + scale[0] // stage.stride[0] * (finer // stage.stride[1])
    x = phase % scale[1] + scale[1] // stage.stride[1] * (finer % stage.stride[1])
    partner_phase = y % scale[0] * scale[1] + x % scale[1]
    if torus.wraps:
        row = (address // columns + offset // columns + y // scale[0]) % rows
        partner = row * columns + (address + offset + x // scale[1]) % columns
    else:
        partner = (address + offset + y // scale[0] * torus.steps[0] + x // scale[1] * torus.steps[1]) % torus.size
    n = math.prod(source.space)
    first, second = at[phase, address], at[partner_phase, partner]
    return np.where((first < n) & (second < n), first * n + second, n * n)


def _after(program: Program, read: set[int]) -> tuple[Program, list[int]]:
    """Returns the part of a program that starts from some of its values, and the numbers that its values had."""
    first_node, (output,) = len(program.sources), program.outputs
    needed = {output}
    for number in range(program.n_values - 1, first_node - 1, -1):
        if number in needed and number not in read:
            needed.update(program.nodes[number - first_node].inputs)
    kept = [*sorted(needed & read), *sorted(needed - read)]
    sources = tuple(program.spec(number) for number in kept[: len(needed & read)])
    nodes = []
    for number in kept[len(sources) :]:
        node = program.nodes[number - first_node]
        nodes.append(Node(node.step, tuple(kept.index(i) for i in node.inputs), node.spec))
    return Program(sources, tuple(nodes), (kept.index(output),)), kept


def _varying(x: Array, like: Sequence[Array]) -> Array:
    """Says that an array varies over the mesh axes of `jax.shard_map` over which others do, as Pallas does not."""
    axes = frozenset[str]().union(*(jax.typeof(other).manual_axis_type.varying for other in like))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _mirrored(x: Array) -> Array:
    return jnp.triu(x) + jnp.triu(x, 1).T
