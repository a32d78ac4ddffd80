"""What fits in memory."""

import os

import jax
import jax.numpy as jnp


def fits_in_memory(dimension: int, copies: float) -> bool:
    """Whether half of the memory of the device holds so many matrices of this dimension."""
    return copies * dimension**2 * jnp.zeros(()).dtype.itemsize <= _memory_of_device() / 2


def _memory_of_device() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", _memory_of_machine())


def _memory_of_machine() -> int:
    if not hasattr(os, "sysconf"):  # Windows
        return 2**33
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
