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
from nt_core.backends.mosaic.plan import Hardware, Instance, Stage, lower_for_planes, make_plan, n_planes
from nt_core.backends.mosaic.tables import coefficients, positions, tables
from nt_core.evaluation.block import Block
from nt_core.evaluation.geometry import AllPairs, Geometry, Sides
from nt_core.evaluation.samples import Batch, SourceLoader, batch, crossed, own_block
from nt_core.evaluation.statistics import Statistics
from nt_core.evaluation.tiles import map_pairs, map_samples
from nt_core.lowering import Lowered, LoweredNode, Pairs, windows
from nt_core.lowering.primitives import Flatten, Pool
from nt_core.program import Program
from nt_core.sources import Source, identical_batches, is_symmetric

_MAX_SAMPLES = 128
# Numbers in the tables of a block of samples.
_MAX_NUMBERS = 2**29

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
        self._program = program
        self._lowered = lower_for_planes(program, sources, request.ntk)
        self._sources = sources
        self._request = request
        self._run_stage = run_stage
        self._hardware = hardware
        self._stages = make_plan(self._lowered, sources, hardware)
        self._symmetric = all(map(is_symmetric, sources))

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
        samples = min(_MAX_SAMPLES, _MAX_NUMBERS // max(map(_numbers_of_sample, self._stages)))
        columns = max(1, min(n2, samples, pairs))
        return max(1, min(n1, samples, pairs // columns)), columns

    def _samples(self, which: int) -> tuple[Batch, Statistics]:
        """Looks at each sample of a batch on its own."""
        lowered = lower_for_planes(self._program, self._sources, ntk=False)
        data = batch(lowered, self._sources, which)
        stages = make_plan(lowered, self._sources, self._hardware)
        own_stages = {s.end: s for s in stages if s.deficit and isinstance(s.primitive, Pool)}

        def compute(samples: Batch) -> Statistics:
            def pool_sums(block: Block, number: int) -> Pairs:
                stage, statistics = own_stages[number], block.statistics
                read = {s.number: Pairs(block.stored(s.number).value[..., None], None) for s in stage.sources}
                out = self._run(stage, lowered, (samples, statistics), (samples, statistics), read, own=True)[..., 0]
                (value,) = summed_windows(stage, out)
                return Pairs(value, None)

            load = SourceLoader(lowered, samples, samples, {}, True, True)
            return own_block(lowered, samples, load, pool_sums)[1]

        n = data.index.shape[0]
        per_sample = max([*map(_numbers_of_sample, stages), *map(_numbers_between, own_stages.values())])
        return data, map_samples(compute, data, n, max(1, min(n, self._hardware.numbers // per_sample)))

    def _block(self, block1: tuple[Batch, Statistics], block2: tuple[Batch, Statistics], same: Any) -> Pairs:
        index1, index2 = block1[0].index, block2[0].index
        equal = (index1[:, None] == index2[None, :]) & same
        read: dict[int, Pairs] = {}
        for stage in self._stages:
            out = self._run(stage, self._lowered, block1, block2, read)
            read[stage.end] = ended(stage, out, block1[1], block2[1], equal)
        return self._tail(read, block1[1], block2[1])

    def _run(
        self,
        stage: Stage,
        lowered: Lowered,
        block1: tuple[Batch, Statistics],
        block2: tuple[Batch, Statistics],
        read: dict[int, Pairs],
        own: bool = False,
    ) -> Array:
        """Runs a stage for all pairs of two blocks; with `own`, of each sample with itself: `(..., n, 1)`."""
        index1, index2 = block1[0].index, block2[0].index
        arguments = (
            coefficients(stage, lowered, (block1[1], block2[1])),
            tables(stage, lowered, *block1, stage.torus.addresses()),
            tables(stage, lowered, *block2, np.arange(stage.torus.reach) % stage.torus.size),
            _planes(stage, read, (index1.shape[0], 1 if own else index2.shape[0])),
            jnp.array(self._symmetric and not own) & (index1[0] == index2[0]),
        )
        # One after another under `vmap`: each call fills the device, and memory stays what it is.
        run_stage = jax.custom_batching.sequential_vmap(partial(self._run_stage, stage, own=own))
        return _varying(run_stage(*(_varying(x, arguments) for x in arguments)), arguments)

    def _tail(self, read: dict[int, Pairs], first: Statistics, second: Statistics) -> Pairs:
        """What follows the last stages: few numbers, for `xla`."""
        lowered, kept = _after(self._lowered, set(read))

        def renumbered(statistics: Statistics) -> Statistics:
            def pick(of_values: dict[int, Any]) -> dict[int, Any]:
                return {i: of_values[number] for i, number in enumerate(kept) if number in of_values}

            return Statistics(pick(statistics.variance), pick(statistics.scale), repeated=pick(statistics.repeated))

        load = _Ends([read[number] for number in kept[: lowered.n_sources]])
        statistics1, statistics2 = crossed(renumbered(first), renumbered(second))
        return Block(lowered, statistics1, statistics2, load, self._request.ntk).covariance(lowered.outputs[0])


class _Ends:
    """The ends of the stages, as sources of what follows."""

    def __init__(self, pairs: list[Pairs]) -> None:
        self._pairs = pairs

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        return self._pairs[number]

    def is_stored(self, number: int) -> bool:
        return False

    def continued(self, n_space: int) -> "_Ends":
        raise NotImplementedError("What follows the last stage holds no pool over an image.")

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("What follows the last stage holds no pool over an image.")

    def same(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("Programs with dropout are refused.")


def _numbers_between(stage: Stage) -> int:
    """How many numbers of one pair of samples are in memory before or after a stage."""
    after = stage.offsets if stage.windows is not None else 1
    before = n_planes(stage) * sum(source.n_source_rows for source in stage.sources)
    return stage.torus.slots * max(before, 2 * after)


def _numbers_of_sample(stage: Stage) -> int:
    """How many numbers of one sample are in the tables of a stage."""
    return stage.n_rows * (stage.torus.slots + stage.torus.reach)


def ended(stage: Stage, out: Array, first: Statistics, second: Statistics, equal: Array) -> Pairs:
    """Turns what a stage has summed into covariances, or deficits, `(*pairs, n1, n2)`.

    Args:
      out: of `run_stage`.
      equal: which pairs are of equal samples.
    """
    primitive = stage.primitive
    if isinstance(primitive, Flatten):
        value, *ntk = _total(stage, out) / math.prod(stage.root.space)
        return Pairs(value, ntk[0] if ntk else None)
    pooled, pairs = summed_windows(stage, out), AllPairs(len(primitive.windows))
    size = primitive.divisors(out.dtype)
    value, *ntk = pooled / lax.expand_dims(pairs.first(size) * pairs.second(size), (0, -2, -1))
    if stage.deficit:
        value = _pooled_deficit(stage, primitive, value, crossed(first, second), equal)
    shape = value.shape if primitive.keeps_axes else value.shape[-2:]
    return Pairs(value.reshape(shape), ntk[0].reshape(shape) if ntk else None)


def _total(stage: Stage, out: Array) -> Array:
    """Sums a plane over all addresses."""
    return jnp.sum(out[:, stage.torus.slot(np.arange(stage.torus.size))], 1)


def summed_windows(stage: Stage, out: Array) -> Array:
    """Turns what a stage that ends in a pool has summed into sums over pairs of windows, `(kernels, *pairs, ...)`."""
    assert isinstance(stage.primitive, Pool)
    space = windows.counts(stage.primitive.windows)
    if stage.windows is None:
        return lax.expand_dims(_total(stage, out), range(1, 1 + 2 * len(space)))
    offset, slot = pairs_on_torus(stage, space)
    return jnp.moveaxis(out[offset, :, slot], offset.ndim, 0)


def _pooled_deficit(
    stage: Stage, pool: Pool, average: Array, statistics: tuple[Statistics, Statistics], equal: Array
) -> Array:
    """Turns a pooled deficit into the deficit of the pooled covariance."""
    along, pairs = pool.windows, AllPairs(len(pool.windows))
    identical = lax.expand_dims(equal, range(2 * len(along)))
    for axis, n in enumerate(windows.counts(along)):
        same_position = jnp.eye(n, dtype=bool)
        others = [a for a in range(average.ndim) if a not in (2 * axis, 2 * axis + 1)]
        identical = identical & lax.expand_dims(same_position, others)
    held = lax.expand_dims(windows.positions_inside(along), (-2, -1))
    return pool.deficit(
        average,
        own=Sides(pairs, *(s.self_deficit[stage.end] for s in statistics)),
        sums=Sides(pairs, *(windows.sums(along, s.variance[stage.root.number]) for s in statistics)),
        inside=Sides(pairs, held, held),
        is_identical=identical,
    )


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


def _after(lowered: Lowered, read: set[int]) -> tuple[Lowered, list[int]]:
    """Returns the part of a program that starts from some of its values, and the numbers that its values had."""
    (output,) = lowered.outputs
    needed = {output}
    for number, node in reversed(list(lowered.numbered_nodes())):
        if number in needed and number not in read:
            needed.update(node.inputs)
    kept = [*sorted(needed & read), *sorted(needed - read)]
    n_sources = len(needed & read)
    nodes = []
    for number in kept[n_sources:]:
        node = lowered.node(number)
        assert node is not None
        nodes.append(LoweredNode(node.primitive, tuple(kept.index(i) for i in node.inputs)))
    forms = tuple(lowered.forms[number] for number in kept)
    return Lowered(n_sources, tuple(nodes), forms, (kept.index(output),)), kept


def _varying(x: Array, like: Sequence[Array]) -> Array:
    """Says that an array varies over the mesh axes of `jax.shard_map` over which others do, as Pallas does not."""
    axes = frozenset[str]().union(*(jax.typeof(other).manual_axis_type.varying for other in like))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _mirrored(x: Array) -> Array:
    return jnp.triu(x) + jnp.triu(x, 1).T
