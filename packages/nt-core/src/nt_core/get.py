"""What callers ask for by name: `get` of kernel functions, of predictions and of empirical kernels."""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

Get = str | Sequence[str] | None


def parse_get(get: Get, allowed: Sequence[str]) -> tuple[str, ...]:
    """Returns the names that are asked for, in lower case and in their order; None stands for NNGP and NTK.

    Args:
      get: a name or several, in any case; or None.
      allowed: the names that exist, in lower case.

    Raises:
      ValueError: no name, or one twice.
      KeyError: a name that does not exist.

    >>> parse_get("NTK", ("nngp", "ntk")), parse_get(None, ("nngp", "ntk"))
    (('ntk',), ('nngp', 'ntk'))
    """
    given = ("nngp", "ntk") if get is None else (get,) if isinstance(get, str) else tuple(get)
    names = tuple(name.lower() for name in given)
    if not names:
        raise ValueError('"get" must be non-empty: give a name, a tuple of names, or None.')
    if len(set(names)) < len(names):
        raise ValueError(f'All strings in "get" must be unique, got {given}.')
    for name in names:
        if name not in allowed:
            # Without quotation marks, which the message of a KeyError escapes.
            raise KeyError(f"`get` asks for {name}, and there are {', '.join(allowed)} only.")
    return names


def as_named(get: Get, type_name: str, values: Mapping[str, Any]) -> Any:
    """Returns the value that a string `get` names, or a named tuple of all values.

    Args:
      get: as `parse_get` takes it.
      type_name: of the named tuple.
      values: by the names that `parse_get` returned, in their order.

    >>> as_named("NTK", "AnalyticKernel", {"ntk": 3.0})
    3.0
    >>> as_named(("NTK",), "AnalyticKernel", {"ntk": 3.0})
    AnalyticKernel(ntk=3.0)
    """
    return values[get.lower()] if isinstance(get, str) else _named_tuple(type_name, tuple(values))(*values.values())


@functools.cache  # two results of the same names have the same type, and so the same pytree structure
def _named_tuple(type_name: str, names: tuple[str, ...]) -> Any:
    return collections.namedtuple(type_name, names)
