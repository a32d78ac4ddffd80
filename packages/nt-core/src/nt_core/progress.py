"""Bars for long work."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


def with_progress(items: Iterable[_T], show: bool, total: int, description: str, unit: str) -> Iterator[_T]:
    """Yields items, and shows a bar once it has taken a second, if tqdm is installed and standard error is a terminal.

    Args:
      items: what to yield.
      show: otherwise there is no bar.
      total: how many items there are.
      description: of the work.
      unit: what an item is called.
    """
    bar, show, began = None, show and sys.stderr.isatty(), time.monotonic()
    for number, item in enumerate(items):
        if bar is not None:
            bar.update()
        elif show and time.monotonic() > began + 1:
            bar = _bar(number, total, description, unit)
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
