"""Large samples in turn, in chunks that the caches of a processor hold."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from nt_core.grid import evenly

from nt_empirical._cost import bytes_of, cost_of
from nt_empirical._equations import evaluated_channels_last

# What a core has in its caches, about. Memory that is new to a process is slow too: it is handed out page by page.
CACHE = 4 * 2**20
# What keeps a core busy. Where a sample has less, a loop over samples costs more than it saves.
WORK = 2**20


def is_for_one_processor() -> bool:
    """Whether programs are for one CPU. Of several devices, each would take all samples if these were in a loop."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def map_chunks(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function of many samples, along the leading axis of arrays, as `jax.vmap` does.

    It takes large samples in turn, as many at once as the caches of this machine hold.
    """

    def of_samples(samples: list[jax.Array]) -> Any:
        n, *others = {a.shape[0] for a in samples}
        if n < 2 or others:
            return jax.vmap(fn)(samples)
        program, shapes = jax.make_jaxpr(fn, return_shape=True)([a[0] for a in samples])
        several = jax.vmap(jaxpr_as_fun(program))
        size = evenly(n, _samples_at_once(program, jax.make_jaxpr(several)(*(a[:2] for a in samples)), n))
        leaves = several(*samples) if size == n else _in_turn(program, samples, size)
        return jax.tree.structure(shapes).unflatten(leaves)

    return of_samples


def _samples_at_once(of_one: ClosedJaxpr, of_two: ClosedJaxpr, n: int) -> int:
    """Returns how many of `n` samples to take at once, by the programs of one and of two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # What one more sample needs; the rest are weights and copies of them.
    of_sample = cost_of(of_two.jaxpr).peak_bytes - cost_of(of_one.jaxpr).peak_bytes
    results = sum(map(bytes_of, of_one.jaxpr.outvars))
    # A loop has the results of all samples in the end, and they are copied; it saves what is there on the way to them.
    if of_sample - results < max(cores * WORK, 2 * results):
        return n
    # Each chunk reads the weights anew: it should be no smaller than they are.
    weights = sum(map(bytes_of, of_one.jaxpr.constvars))
    return max(1, max(cores * CACHE, weights) // of_sample)


def _in_turn(program: ClosedJaxpr, samples: Sequence[jax.Array], size: int) -> list[Any]:
    """Evaluates the program of a sample for many, so many at a time."""
    several = jax.vmap(lambda *sample: evaluated_channels_last(program, sample))
    n = samples[0].shape[0]
    chunks = -(-n // size)
    repeated = [jnp.concatenate([a, *[a[-1:]] * (chunks * size - n)]) for a in samples]
    found = jax.lax.map(lambda chunk: several(*chunk), [a.reshape(chunks, size, *a.shape[1:]) for a in repeated])
    return [a.reshape(chunks * size, *a.shape[2:])[:n] for a in found]
