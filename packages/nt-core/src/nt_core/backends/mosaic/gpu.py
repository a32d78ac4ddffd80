"""Runs stages on NVIDIA GPUs: a warpgroup computes one plane at a time, in registers and shared memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from nt_core.backends.mosaic.backend import SHARED_MEMORY, MosaicGpuBackend, shared_bytes
from nt_core.backends.mosaic.evaluate import Evaluation, Int, Place
from nt_core.backends.mosaic.plan import Stage
from nt_core.lowering import Pairs

plgpu: Any = mosaic_gpu  # older versions, which are refused, lack some of its names

# Those of one block of threads compute planes of one pair, or of pairs that share their first sample: tables are read
# through the same first-level cache. A multiprocessor has registers for that many.
_WARPGROUPS = 4
# Larger planes need twice the registers, which half as many warpgroups have.
_MAX_SLOTS = 20 * 128
# To aim for: several warpgroups share the planes of a pair where there are few pairs.
_MIN_TASKS = 4096


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
    """Computes the planes of a stage for all pairs of two blocks of samples, and reads them out.

    Args:
      first, second: tables of both blocks, in slots `(rows, slots, n1)`, and at addresses `(rows, reach, n2)`.
      sources: covariances that earlier stages have left, `(planes, rows, slots, n1, n2)`.
      triangle: whether pairs below the diagonal are not wanted.
      own: only the pairs of each sample with itself; both blocks are the same, and `n2` is 1 in what comes and goes.

    Returns:
      Sums over the planes, `(kernels, slots, n1, n2)`, or the planes after a pool, `(offset, kernels, slots, n1, n2)`,
      where `kernels` counts the covariance and the tangent kernel.
    """
    n1, n2 = first.shape[-1], 1 if own else second.shape[-1]
    torus, n_kernels, n_planes = stage.torus, 2 if stage.has_ntk else 1, stage.offsets * math.prod(stage.stride)
    is_pool = stage.windows is not None
    warpgroups = _WARPGROUPS if torus.slots <= _MAX_SLOTS else 2
    warpgroups = min(warpgroups, SHARED_MEMORY // max(1, shared_bytes(stage)))
    results = (stage.offsets if is_pool else 1, n_kernels, torus.slots)
    if is_pool:  # many numbers, and the planes of a pair add to one another
        parts = min(_MIN_TASKS, MosaicGpuBackend.hardware.numbers // math.prod(results)) // (n1 * n2)
    else:
        parts = warpgroups * -(-_MIN_TASKS // (warpgroups * n1 * n2))
    parts = max(1, min(parts, n_planes))
    n_tasks = n1 * n2 * parts
    blocks = -(-n_tasks // warpgroups)
    out_shape = (blocks * warpgroups, *results)

    def kernel(coefficients_ref, triangle_ref, first_ref, second_ref, sources_ref, out_ref, *buffers):
        warpgroup = lax.axis_index("warpgroup")
        task = lax.axis_index("block") * warpgroups + warpgroup
        pair, part = lax.div(task, jnp.int32(parts)), lax.rem(task, jnp.int32(parts))
        i, j = lax.div(pair, jnp.int32(n2)), lax.rem(pair, jnp.int32(n2))
        is_wanted = jnp.logical_and(task < n_tasks, jnp.logical_not(jnp.logical_and(triangle_ref[0] > 0, i > j)))
        count = jnp.where(is_wanted, lax.div(n_planes - part + parts - 1, jnp.int32(parts)), 0)
        refs = (coefficients_ref, first_ref, second_ref, sources_ref)

        def add(offset: Int, plane: list[Pairs]) -> None:
            """Adds to the sums of this warpgroup, each thread to its own."""
            for piece, planes in enumerate(plane):
                for which, x in enumerate(planes.arrays()):
                    at = (task, offset, which, pl.ds(piece * torus.width, torus.width))
                    out_ref[at] = _load(out_ref, at, torus.width) + x

        def clear(offset: Array, carry: Any) -> Any:
            for which in range(n_kernels):
                for piece in range(torus.pieces):
                    out_ref[task, offset, which, pl.ds(piece * torus.width, torus.width)] = _zeros(torus.width)
            return carry

        def compute(k: Array, carry: Any) -> Any:
            number = part + k * parts  # neighbouring warpgroups read nearly the same of the second sample's table
            finer, offset = lax.div(number, jnp.int32(stage.offsets)), lax.rem(number, jnp.int32(stage.offsets))
            along = (0, 0)
            if stage.stride != (1, 1):
                along = lax.div(finer, jnp.int32(stage.stride[1])), lax.rem(finer, jnp.int32(stage.stride[1]))
            machine = _Machine(stage, refs, buffers, warpgroup, pair, i, i if own else j, number)
            evaluation = Evaluation(stage, machine, offset, along)
            evaluation.run()
            if is_pool:
                evaluation.pooled(add)
            else:
                add(0, evaluation.root())
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(results[0]), clear, ())
        lax.fori_loop(jnp.int32(0), count, compute, ())

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_types=[
            plgpu.SMEM((warpgroups * phases * n_kernels * torus.piece_reach,), jnp.float32) for phases in stage.buffers
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # see `_Machine.write`
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        coefficients,
        triangle.astype(jnp.int32).reshape(1),
        jnp.moveaxis(first, -1, 0),
        jnp.moveaxis(second, -1, 0),
        jnp.moveaxis(sources, (-2, -1), (0, 1)).reshape(n1 * n2, *sources.shape[:3]),
    )
    out = out[:n_tasks].reshape(n1, n2, parts, *results)
    out = jnp.moveaxis(jnp.sum(out, 2), (0, 1), (-2, -1))
    return out if is_pool else out[0]


class _Machine:
    """Tables in global memory, buffers in shared memory, planes in registers (see `Machine`)."""

    def __init__(
        self,
        stage: Stage,
        refs: tuple[Any, ...],
        buffers: tuple[Any, ...],
        warpgroup: Array,
        pair: Array,
        i: Array,
        j: Array,
        number: Int,
    ) -> None:
        self._stage = stage
        self._coefficients, self._first, self._second, self._sources = refs
        self._buffers, self._warpgroup = buffers, warpgroup
        self._pair, self._i, self._j, self._number = pair, i, j, number
        self._torus = stage.torus

    def coefficient(self, index: Int) -> Array:
        return self._coefficients[index]

    def begin(self, table: int, iteration: Int) -> None:
        pass

    def first(self, place: Place, piece: int) -> Array:
        return self._load(self._first, (self._i, self._row(place)), piece * self._torus.width)

    def second(self, place: Place, start: Int, piece: int) -> Array:
        return self._load(self._second, (self._j, self._row(place)), start + piece * self._torus.pitch)

    def _row(self, place: Place) -> Int:
        start, size = self._stage.first_row(place.table), self._stage.tables[place.table].size
        return start + place.iteration * size + place.row

    def source(self, row: Int, piece: int) -> Array:
        return self._load(self._sources, (self._pair, self._number, row), piece * self._torus.width)

    def read(self, buffer: int, is_ntk: bool, phase: Int, start: Int, piece: int) -> Array:
        address = start + piece * self._torus.pitch
        if self._torus.pieces > 1:
            size = self._torus.size
            address = address % size if isinstance(address, int) else lax.rem(address, jnp.int32(size))
        return self._load(self._buffers[buffer], (), self._at(buffer, is_ntk, phase) + address)

    def write(self, buffer: int, phase: Int, plane: list[Pairs]) -> None:
        """Writes a plane, and its first piece again behind the last address: pieces may start at any.

        Threads read what others have written: all have read before any writes, and have written before any reads.
        Nothing else is written to shared memory. Where pieces overlap, two threads write the same number.
        """
        torus, ref = self._torus, self._buffers[buffer]
        plgpu.commit_smem()
        for piece, planes in enumerate(plane):
            for is_ntk, x in enumerate(planes):
                if x is not None:
                    at = self._at(buffer, bool(is_ntk), phase)
                    ref[pl.ds(at + piece * torus.pitch, torus.width)] = x
                    if piece == 0:
                        ref[pl.ds(at + torus.size, torus.width)] = x
        plgpu.commit_smem()

    def _at(self, buffer: int, is_ntk: bool, phase: Int) -> Int:
        kernels = 2 if self._stage.has_ntk else 1
        of_warpgroup = self._warpgroup * (self._stage.buffers[buffer] * kernels)
        return (of_warpgroup + phase * kernels + is_ntk) * self._torus.piece_reach

    def _load(self, ref: Any, at: tuple[Any, ...], start: Int) -> Array:
        return _load(ref, (*at, pl.ds(start, self._torus.width)), self._torus.width)


def _layout(width: int) -> Any:
    # One number at a time: a shift by an odd number would misalign vector loads.
    return plgpu.Layout.WG_STRIDED((width,), vec_size=1)


def _load(ref: Any, at: tuple[Any, ...], width: int) -> Array:
    return plgpu.load(ref.at[at], layout=_layout(width))


def _zeros(width: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((width,), jnp.float32), _layout(width))
