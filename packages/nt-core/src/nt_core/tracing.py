"""Which values are known, and how to compute with those at once."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def is_traced(value: Any) -> bool:
    """Returns whether an array stands for values that are not known yet."""
    return isinstance(value, Tracer)


def evaluate_now() -> contextlib.AbstractContextManager[None]:
    """Returns a context where operations on known values are carried out, not staged by a surrounding `jax.jit`.

    Results that are kept must be computed in it: what is staged belongs to one trace, and is useless in the next.
    """
    # Outside of a jit the context would do nothing but make every jitted function compile once more.
    return jax.ensure_compile_time_eval() if is_traced(jnp.add(0, 0)) else contextlib.nullcontext()
