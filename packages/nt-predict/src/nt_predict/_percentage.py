"""A bar for work that goes on inside a compiled program, which can only say how far it is."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from nt_core.progress import with_progress
from nt_core.tracing import is_traced


class Percentage:
    """One bar at a time, from 0 to 100 per cent."""

    def __init__(self) -> None:
        self._ticks: Iterator[int] = iter(())
        self._reached = 0

    @contextlib.contextmanager
    def shown(self, description: str) -> Iterator[None]:
        """Shows a bar, if the work in the context takes longer than a second."""
        self._ticks, self._reached = with_progress(range(101), True, description, "%"), 0
        next(self._ticks)
        yield
        self.reach(101)

    def reach(self, per_cent: Any) -> None:
        """Says that so much of the work is done."""
        ahead = int(per_cent) - self._reached
        self._reached += len(list(itertools.islice(self._ticks, max(ahead, 0))))


PERCENTAGE = Percentage()


def is_watched(*values: Any) -> bool:
    """Whether there is a terminal to show a bar on, and values that are computed now."""
    return sys.stderr.isatty() and not any(map(is_traced, (jnp.add(0, 0), *values)))
