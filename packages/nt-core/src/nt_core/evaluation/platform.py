"""The kind of device that JAX code is traced for. The arithmetic is the same on all; how it is cut into pieces is not.

A CPU wants arrays that stay in its cache, a GPU arrays that occupy all of its threads: what it takes to start a kernel
is what it takes to compute a million numbers.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

# In arrays that a GPU computes at once.
NUMBERS_ON_GPU = 2**24

_PLATFORM = ContextVar("platform", default="cpu")


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced in this context will run on devices of a kind, as `jax.Device.platform` names it."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def is_gpu() -> bool:
    """Whether what is traced now will run on a GPU."""
    return _PLATFORM.get() == "gpu"
