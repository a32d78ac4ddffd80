"""Samples in chunks that the caches of a processor hold."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from nt_core.grid import evenly
from nt_core.tracing import is_traced

from nt_empirical._cost import bytes_of, cost_of
from nt_empirical._equations import evaluated_in_loop

# What a core has in its caches, about. Memory that is new to a process is slow too: it is handed out page by page.
CACHE = 4 * 2**20
# What keeps a core busy: of less, many samples are faster at once, wherever they are.
WORK = 2**20


def map_chunks(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function of many samples, along the leading axis of arrays, as `jax.vmap` does.

    A program that is compiled for one processor takes large samples in turn, as many at once as its caches hold.
    """

    def of_samples(samples: list[jax.Array]) -> Any:
        n = samples[0].shape[0]
        if n < 2 or not _is_for_one_processor():
            return jax.vmap(fn)(samples)
        program, shapes = jax.make_jaxpr(fn, return_shape=True)([a[0] for a in samples])
        chunk = jax.vmap(lambda *sample: evaluated_in_loop(program, sample))
        size = evenly(n, _samples_at_once(program, jax.make_jaxpr(chunk)(*(a[:2] for a in samples)), n))
        leaves = chunk(*samples) if size == n else _in_turn(chunk, samples, size)
        return jax.tree.structure(shapes).unflatten(leaves)

    return of_samples


def _is_for_one_processor() -> bool:
    # Equation by equation a loop would be compiled in each call; and devices share samples only if these are no loop.
    return is_traced(jnp.add(0, 0)) and jax.default_backend() == "cpu" and jax.device_count() == 1


def _samples_at_once(of_one: ClosedJaxpr, of_two: ClosedJaxpr, n: int) -> int:
    """Returns how many of `n` samples to take at once, by the programs of one and of two."""
    cores = os.cpu_count() or 1
    of_sample = cost_of(of_two.jaxpr).peak_bytes - cost_of(of_one.jaxpr).peak_bytes
    results = sum(map(bytes_of, of_one.jaxpr.outvars))
    if of_sample - results < max(cores * WORK, results / 2):  # results of loops are copied
        return n
    # What all share, as weights, is read anew for each chunk, which should be worth it.
    shared = sum(map(bytes_of, of_one.jaxpr.constvars))
    return max(1, max(cores * CACHE, shared) // of_sample)


def _in_turn(fn: Callable[..., list[Any]], samples: Sequence[jax.Array], size: int) -> list[Any]:
    """Calls a function of many samples with so many at a time."""
    n = samples[0].shape[0]
    chunks = -(-n // size)
    repeated = [jnp.concatenate([a, *[a[-1:]] * (chunks * size - n)]) for a in samples]
    found = jax.lax.map(lambda chunk: fn(*chunk), [a.reshape(chunks, size, *a.shape[1:]) for a in repeated])
    return [a.reshape(chunks * size, *a.shape[2:])[:n] for a in found]
