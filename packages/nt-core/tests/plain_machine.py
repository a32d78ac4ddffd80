"""Stages of the Mosaic backends in plain JAX, on any version: plan and evaluation are theirs, the machine is not.

The interpreters of Pallas take minutes for a few pixels. This takes a minute for an image of 32 x 32, so that what
large planes alone have (several pieces, many layers before a pool) can be tested. Only under `jax.disable_jit()`: the
buffers are Python dictionaries, also within loops.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from nt_core import backends
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend
from nt_core.backends.mosaic.evaluate import Evaluation


def use(monkeypatch):
    """Adds the backends 'plain_gpu' and 'plain_tpu', with the plans for these machines."""
    for base in (MosaicGpuBackend, MosaicTpuBackend):
        name = base.name.replace("mosaic", "plain")
        backend = type(name, (base,), {"name": name, "module": __name__})(interpret=True)
        monkeypatch.setitem(backends._BACKENDS, name, backend)
    monkeypatch.setattr(jax.custom_batching, "sequential_vmap", lambda fn: fn)  # would trace loops


def run_stage(stage, coefficients, first, second, sources, triangle, interpret, own=False):
    """See `nt_core.backends.mosaic.gpu.run_stage`."""
    is_pool, n_kernels = stage.windows is not None, 2 if stage.has_ntk else 1
    n_offsets, (_, columns) = stage.offsets, stage.stride

    def planes(first, second, sources):
        """The planes of a pair of samples, or their sum."""

        def at(number):
            finer, offset = number // n_offsets, number % n_offsets
            machine = PlainMachine(stage, coefficients, first, second, sources, number)
            evaluation, found = Evaluation(stage, machine, offset, (finer // columns, finer % columns)), []

            def add(offset, plane):
                pieces = zip(*(piece.arrays() for piece in plane), strict=True)
                found.append((jnp.asarray(offset, jnp.int32), jnp.stack([jnp.concatenate(x) for x in pieces])))

            evaluation.run()
            if is_pool:
                evaluation.pooled(add)
            else:
                add(0, evaluation.root())
            return found

        total = jnp.zeros((n_offsets if is_pool else 1, n_kernels, stage.torus.slots), jnp.float32)
        for offset, plane in jax.vmap(at)(jnp.arange(n_offsets * math.prod(stage.stride), dtype=jnp.int32)):
            total = total.at[offset].add(plane)
        return total if is_pool else total[0]

    n1, n2 = first.shape[-1], 1 if own else second.shape[-1]
    rows = [
        [planes(first[..., i], second[..., i if own else j], sources[..., i, j]) for j in range(n2)] for i in range(n1)
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


class PlainMachine:
    """See `nt_core.backends.mosaic.evaluate.Machine`; all for one pair of samples."""

    def __init__(self, stage, coefficients, first, second, sources, number):
        self._stage, self._torus = stage, stage.torus
        self._coefficients, self._first, self._second, self._sources = coefficients, first, second, sources
        self._number = number
        self._buffers = {}

    def coefficient(self, index):
        return self._coefficients[index]

    def begin(self, table, iteration):
        pass

    def first(self, place, piece):
        return self._cut(self._first[self._row(place)], piece * self._torus.width)

    def second(self, place, start, piece):
        return self._cut(self._second[self._row(place)], start + piece * self._torus.pitch)

    def _row(self, place):
        return self._stage.first_row(place.table) + place.iteration * self._stage.tables[place.table].size + place.row

    def source(self, row, piece):
        return self._cut(self._sources[self._number, row], piece * self._torus.width)

    def read(self, buffer, is_ntk, phase, start, piece):
        address = start + piece * self._torus.pitch
        return self._cut(self._buffers[buffer, is_ntk, int(phase)], address % self._torus.size)

    def write(self, buffer, phase, plane):
        for is_ntk in (False, True):
            if plane[0][is_ntk] is None:
                continue
            numbers = jnp.zeros(self._torus.piece_reach, jnp.float32)
            for piece, pairs in enumerate(plane):
                numbers = lax.dynamic_update_slice(numbers, pairs[is_ntk], (piece * self._torus.pitch,))
            numbers = lax.dynamic_update_slice(numbers, plane[0][is_ntk], (self._torus.size,))
            self._buffers[buffer, is_ntk, int(phase)] = numbers

    def _cut(self, numbers, start):
        return lax.dynamic_slice(numbers, (jnp.asarray(start, jnp.int32),), (self._torus.width,))
