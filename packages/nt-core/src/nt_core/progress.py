"""Loops over long work: with a bar, and one step ahead."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


def with_progress(items: Sequence[_T], show: bool, description: str, unit: str) -> Iterator[_T]:
    """Yields items, and shows a bar once it has taken a second, if tqdm is installed and standard error is a terminal.

    Args:
      items: what to yield.
      show: otherwise there is no bar.
      description: of the work.
      unit: what an item is called.
    """
    bar, show, began = None, show and sys.stderr.isatty(), time.monotonic()
    for number, item in enumerate(items):
        if bar is not None:
            bar.update()
        elif show and time.monotonic() > began + 1:
            bar = _bar(number, len(items), description, unit)
            show = bar is not None
        yield item
    if bar is not None:
        bar.update()
        bar.close()


def _bar(number: int, total: int, description: str, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=number, total=total, unit=unit, desc=description)


def one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yields each item when the next one is there: devices work while the results before are taken care of."""
    previous: list[_T] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous
