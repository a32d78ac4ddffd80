"""Runs stages on TPUs: planes of 128 pairs at once, which share their first sample, in vector memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nt_core.backends.mosaic.backend import TPU_LANES, VECTOR_MEMORY, is_streamed, kept_rows
from nt_core.backends.mosaic.evaluate import Evaluation, Int, Place
from nt_core.backends.mosaic.plan import Stage
from nt_core.lowering import Pairs


def run_stage(
    stage: Stage,
    coefficients: Array,
    first: Array,
    second: Array,
    sources: Array,
    triangle: Array,
    interpret: bool,
    own: bool = False,
) -> Array:
    """Computes the planes of a stage for all pairs of two blocks of samples: as `run_stage` of the GPU."""
    n1, n2 = 1 if own else first.shape[-1], second.shape[-1]
    if own:  # both samples along the lanes
        first, sources = first[..., :1], jnp.swapaxes(sources, -2, -1)
    width = n2 if interpret else TPU_LANES
    columns = -(-n2 // width)
    second, sources = (_pad_last(x, columns * width) for x in (second, sources))
    sources = jnp.moveaxis(sources, -2, 0)
    lanes, kernels = stage.torus.slots, 2 if stage.has_ntk else 1
    n_offsets = stage.offsets * math.prod(stage.stride)
    is_pool = stage.windows is not None
    has_sources = bool(stage.sources)
    streamed = is_streamed(stage)

    def kernel(coefficients_ref, triangle_ref, first_ref, second_ref, sources_ref, out_ref, *scratch):
        i, column, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        *buffers, sums, semaphore, first_rows, fetched, second_rows = scratch

        def copy(source: Any, target: Any) -> None:
            moved = pltpu.make_async_copy(source, target, semaphore)
            moved.start()
            moved.wait()

        def spread(table: Any, rows: Any) -> None:
            """Lays rows of the first sample along the sublanes, the same in each lane."""

            def row(k: Array, carry: tuple[()]) -> tuple[()]:
                along_lanes = jnp.broadcast_to(table[k], (width, table.shape[-1]))
                first_rows[rows.start + k] = along_lanes.T[:lanes]
                return carry

            lax.fori_loop(jnp.int32(0), jnp.int32(rows.size), row, ())

        def fetch(begin: Int, rows: Any) -> None:
            """Brings rows of both tables, from one on, into vector memory."""
            there = pl.ds(begin, rows.size)
            copy(first_ref.at[i, there], fetched.at[pl.ds(0, rows.size)])
            spread(fetched, rows)
            copy(second_ref.at[there, :, pl.ds(column * width, width)], second_rows.at[rows])

        @pl.when(number == 0)
        def _() -> None:
            if not streamed:
                spread(first_ref.at[0], pl.ds(0, stage.n_rows))
            elif stage.tables[0].size:
                fetch(0, pl.ds(0, stage.tables[0].size))
            sums[...] = jnp.zeros(sums.shape, jnp.float32)
            if is_pool:

                def clear(offset: Array, carry: tuple[()]) -> tuple[()]:
                    copy(sums, out_ref.at[i, column, offset])
                    return carry

                lax.fori_loop(jnp.int32(0), jnp.int32(stage.offsets), clear, ())

        @pl.when(jnp.logical_not(jnp.logical_and(triangle_ref[0] > 0, i >= (column + 1) * width)))
        def _() -> None:
            finer, offset = lax.div(number, jnp.int32(stage.offsets)), lax.rem(number, jnp.int32(stage.offsets))
            along = (0, 0)
            if stage.stride != (1, 1):
                along = lax.div(finer, jnp.int32(stage.stride[1])), lax.rem(finer, jnp.int32(stage.stride[1]))
            refs = (coefficients_ref, first_rows, second_rows if streamed else second_ref, sources_ref)
            machine = _Machine(stage, refs, tuple(buffers), own, fetch if streamed else None)
            evaluation = Evaluation(stage, machine, offset, along)
            evaluation.run()

            def add_to_sums(plane: list[Pairs]) -> None:
                for k, x in enumerate(plane[0].arrays()):
                    sums[k] += x

            def add_to_pooled(offset: Int, plane: list[Pairs]) -> None:
                copy(out_ref.at[i, column, offset], sums)
                add_to_sums(plane)
                copy(sums, out_ref.at[i, column, offset])

            if is_pool:
                evaluation.pooled(add_to_pooled)
            else:
                add_to_sums(evaluation.root())

        if not is_pool:

            @pl.when(number == n_offsets - 1)
            def _() -> None:
                copy(sums, out_ref.at[i, column, 0])

    # Along the lanes, where they take no more memory than they have numbers.
    first = jnp.moveaxis(first, -1, 0)[:, :, None]
    first = _pad_last(first, -(-lanes // TPU_LANES) * TPU_LANES)
    if streamed:
        n_rows, n_fetched = kept_rows(stage), max(table.size for table in stage.tables)
        table_specs = (pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY))
    else:
        n_rows, n_fetched = stage.n_rows, 1
        table_specs = (
            pl.BlockSpec((1, *first.shape[1:]), lambda i, j, k: (i, 0, 0, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((*second.shape[:2], width), lambda i, j, k: (0, 0, j), pipeline_mode=pl.Buffered(1)),
        )

    out = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct(
            (n1, columns, stage.offsets if is_pool else 1, kernels, lanes, width),
            jnp.float32,
            manual_axis_type=jax.typeof(first).manual_axis_type,
        ),
        grid=(n1, columns, n_offsets),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *table_specs,
            pl.BlockSpec((1, 1, *sources.shape[2:-1], width), lambda i, j, k: (i, k if has_sources else 0, 0, 0, j)),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),  # too large for vector memory after a pool
        scratch_shapes=[
            *(pltpu.VMEM((n * kernels, stage.torus.reach, width), jnp.float32) for n in stage.buffers),
            pltpu.VMEM((kernels, lanes, width), jnp.float32),
            pltpu.SemaphoreType.DMA,
            pltpu.VMEM((n_rows, lanes, width), jnp.float32),
            pltpu.VMEM((n_fetched, *first.shape[2:]), jnp.float32),
            pltpu.VMEM((n_rows if streamed else 1, stage.torus.reach if streamed else 8, width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VECTOR_MEMORY),
        interpret=interpret,
    )(
        coefficients,
        triangle.astype(jnp.int32).reshape(1),
        first,
        second,
        sources,
    )
    out = jnp.moveaxis(out, (0, 1), (-3, -2))
    out = out.reshape(*out.shape[:-2], columns * width)[..., :n2]
    out = out if is_pool else out[0]
    return jnp.swapaxes(out, -2, -1) if own else out


class _Machine:
    """Everything in vector memory, a pair in each lane (see `Machine`).

    Args:
      own: the first sample of each pair is the second.
      fetch: brings rows of the tables to where others are, where all do not fit at once; None where they do.
    """

    def __init__(
        self,
        stage: Stage,
        refs: tuple[Any, ...],
        buffers: tuple[Any, ...],
        own: bool,
        fetch: Callable[[Int, Any], None] | None,
    ) -> None:
        self._stage = stage
        self._kernels = 2 if stage.has_ntk else 1
        self._torus = stage.torus
        self._coefficients, self._first, self._second, self._sources = refs
        self._buffers = buffers
        self._own, self._fetch = own, fetch

    def coefficient(self, index: Int) -> Array:
        return self._coefficients[index]

    def begin(self, table: int, iteration: Int) -> None:
        size = self._stage.tables[table].size
        if self._fetch is not None and size:
            begin = self._stage.first_row(table) + iteration * size
            self._fetch(begin, pl.ds(self._stage.tables[0].size, size))

    def first(self, place: Place, piece: int) -> Array:
        return self.second(place, 0, piece) if self._own else self._first[self._row(place)]

    def second(self, place: Place, start: Int, piece: int) -> Array:
        return self._second[self._row(place), pl.ds(start, self._torus.slots), :]

    def _row(self, place: Place) -> Int:
        if self._fetch is not None:
            return place.row if place.table == 0 else self._stage.tables[0].size + place.row
        start, size = self._stage.first_row(place.table), self._stage.tables[place.table].size
        return start + place.iteration * size + place.row

    def source(self, row: Int, piece: int) -> Array:
        return self._sources[0, 0, row]

    def read(self, buffer: int, is_ntk: bool, phase: Int, start: Int, piece: int) -> Array:
        return self._buffers[buffer][phase * self._kernels + is_ntk, pl.ds(start, self._torus.slots), :]

    def write(self, buffer: int, phase: Int, plane: list[Pairs]) -> None:
        """Writes a plane twice, so that shifts around the torus are contiguous."""
        for is_ntk, x in enumerate(plane[0]):
            if x is not None:
                for start in (0, self._torus.size):
                    at = phase * self._kernels + is_ntk
                    self._buffers[buffer][at, pl.ds(start, self._torus.slots), :] = x


def _pad_last(x: Array, n: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n - x.shape[-1])])
