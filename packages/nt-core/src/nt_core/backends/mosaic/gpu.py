"""Runs stages on NVIDIA GPUs: one warpgroup computes one plane, in registers and shared memory."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from nt_core.backends.mosaic.evaluate import Evaluation, Int, Planes
from nt_core.backends.mosaic.plan import Stage

plgpu: Any = mosaic_gpu  # older versions, which are refused, lack some of its names

# Warpgroups to aim for: those of a pair of samples share its offsets.
_MIN_PROGRAMS = 4096


def run_stage(
    stage: Stage,
    coefficients: Array,
    first: Array,
    second: Array,
    sources: Array,
    triangle: Array,
    interpret: bool,
) -> Array:
    """Computes the planes of a stage for all pairs of two blocks of samples, and reads them out.

    Args:
      first, second: tables of both blocks, `(rows, lanes, n)`.
      sources: covariances that earlier stages have left, `(offsets, rows, lanes, n1, n2)`.
      triangle: whether pairs below the diagonal are not wanted.

    Returns:
      Sums over the planes, `(kernels, lanes, n1, n2)`, or the planes after a pool, `(offset, kernels, lanes, n1, n2)`,
      where `kernels` counts the covariance and the tangent kernel.
    """
    n1, n2 = first.shape[-1], second.shape[-1]
    torus, n_out = stage.torus, 2 if stage.has_ntk else 1
    n_offsets = stage.offsets * math.prod(stage.stride)
    is_pool = stage.windows is not None
    chunks = 1 if is_pool else max(1, min(n_offsets, -(-(2 if interpret else _MIN_PROGRAMS) // (n1 * n2))))
    chunk_size = -(-n_offsets // chunks)
    out_shape = (n1 * n2, stage.offsets if is_pool else chunks, n_out, torus.slots)

    def kernel(coefficients_ref, triangle_ref, first_ref, second_ref, sources_ref, out_ref, *buffers):
        pair, chunk = lax.axis_index("pair"), lax.axis_index("chunk")
        i, j = lax.div(pair, jnp.int32(n2)), lax.rem(pair, jnp.int32(n2))
        refs = (coefficients_ref, first_ref, second_ref, sources_ref)
        begin = chunk * chunk_size
        end = jnp.minimum(begin + chunk_size, jnp.int32(n_offsets))
        end = jnp.where(jnp.logical_and(triangle_ref[0] > 0, i > j), begin, end)
        zero = _full(torus.width)
        pieces = [pl.ds(piece * torus.width, torus.width) for piece in range(torus.pieces)]

        def evaluation(number: Array) -> Evaluation:
            finer, offset = lax.div(number, jnp.int32(stage.offsets)), lax.rem(number, jnp.int32(stage.offsets))
            along = (0, 0)
            if stage.stride != (1, 1):
                along = lax.div(finer, jnp.int32(stage.stride[1])), lax.rem(finer, jnp.int32(stage.stride[1]))
            machine = _Machine(stage, refs, buffers, pair, i, j, number)
            made = Evaluation(stage, machine, offset, along)
            made.run()
            return made

        def add_to_sums(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            arrays = [x for planes in evaluation(number).root() for x in planes.arrays()]
            return tuple(s + x for s, x in zip(sums, arrays, strict=True))

        def add_to_pooled(number: Array, carry: Any) -> Any:
            def add(offset: Int, plane: list[Planes]) -> None:
                for planes, piece in zip(plane, pieces, strict=True):
                    for k, x in enumerate(planes.arrays()):
                        at = (pair, offset, k, piece)
                        out_ref[at] = _load(out_ref, at, torus.width) + x

            evaluation(number).pooled(add)
            return carry

        def clear(offset: Array, carry: Any) -> Any:
            for piece in pieces:
                for k in range(n_out):
                    out_ref[pair, offset, k, piece] = zero
            return carry

        if is_pool:
            lax.fori_loop(jnp.int32(0), jnp.int32(stage.offsets), clear, ())
            lax.fori_loop(begin, end, add_to_pooled, ())
        else:
            sums = lax.fori_loop(begin, end, add_to_sums, (zero,) * (torus.pieces * n_out))
            for number, x in enumerate(sums):
                out_ref[pair, chunk, number % n_out, pieces[number // n_out]] = x

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_types=[plgpu.SMEM((phases * n_out * torus.reach,), jnp.float32) for phases in stage.buffers],
        grid=(n1 * n2, chunks),
        grid_names=("pair", "chunk"),
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
    if not is_pool:
        out = jnp.sum(out, 1)
    return jnp.moveaxis(out.reshape(n1, n2, *out.shape[1:]), (0, 1), (-2, -1))


class _Machine:
    """Tables in global memory, buffers in shared memory, planes in registers (see `Machine`)."""

    def __init__(
        self,
        stage: Stage,
        refs: tuple[Any, ...],
        buffers: tuple[Any, ...],
        pair: Array,
        i: Array,
        j: Array,
        number: Int,
    ) -> None:
        self._stage = stage
        self._coefficients, self._first, self._second, self._sources = refs
        self._buffers = buffers
        self._pair, self._i, self._j, self._number = pair, i, j, number
        self._torus = stage.torus

    def coefficient(self, index: Int) -> Array:
        return self._coefficients[index]

    def first(self, row: Int, piece: int) -> Array:
        return self._load(self._first, (self._i, row), 0, piece)

    def second(self, row: Int, start: Int, piece: int) -> Array:
        return self._load(self._second, (self._j, row), start, piece)

    def source(self, row: Int, piece: int) -> Array:
        return self._load(self._sources, (self._pair, self._number, row), 0, piece)

    def read(self, buffer: int, is_ntk: bool, phase: Int, start: Int, piece: int) -> Array:
        return self._load(self._buffers[buffer], (), self._at(is_ntk, phase) + start, piece)

    def write(self, buffer: int, phase: Int, plane: list[Planes]) -> None:
        """Writes a plane twice, so that shifts around the torus are contiguous.

        Threads read what others have written: all have read before any writes, and have written before any reads.
        Nothing else is written to shared memory. Where pieces overlap, two threads write the same number.
        """
        plgpu.commit_smem()
        for piece, planes in enumerate(plane):
            for is_ntk, x in enumerate(planes):
                if x is not None:
                    at = self._at(bool(is_ntk), phase) + piece * self._torus.pitch
                    self._buffers[buffer][pl.ds(at, self._torus.width)] = x
                    self._buffers[buffer][pl.ds(at + self._torus.size, self._torus.width)] = x
        plgpu.commit_smem()

    def _at(self, is_ntk: bool, phase: Int) -> Int:
        kernels = 2 if self._stage.has_ntk else 1
        return (phase * kernels + is_ntk) * self._torus.reach

    def _load(self, ref: Any, at: tuple[Any, ...], start: Int, piece: int) -> Array:
        width = self._torus.width
        return _load(ref, (*at, pl.ds(start + piece * self._torus.pitch, width)), width)


def _layout(lanes: int) -> Any:
    # One number at a time: a shift by an odd number would misalign vector loads.
    return plgpu.Layout.WG_STRIDED((lanes,), vec_size=1)


def _load(ref: Any, at: tuple[Any, ...], lanes: int) -> Array:
    return plgpu.load(ref.at[at], layout=_layout(lanes))


def _full(lanes: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((lanes,), jnp.float32), _layout(lanes))
