"""Nested lists and tuples, the containers in which networks with several inputs or outputs take arrays and kernels.

Unlike a pytree, such a tree ends at anything that is not a plain list or tuple: a `Kernel`, a namedtuple, a dict and
None are leaves.
"""

from collections.abc import Callable
from typing import Any


def nt_tree_map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Applies `fn` to the leaves of nested lists and tuples, and keeps the containers.

    Args:
      fn: takes one leaf of each tree.
      tree: a leaf, or nested lists and tuples of leaves.
      *rest: trees of the same structure.

    Raises:
      ValueError: the trees differ in structure.

    >>> nt_tree_map(lambda a, b: a + b, [1, (2, 3)], [10, (20, 30)])
    [11, (22, 33)]
    """
    if not _is_container(tree):
        for other in rest:
            if _is_container(other):
                raise _mismatch(tree, other)
        return fn(tree, *rest)
    for other in rest:
        if type(other) is not type(tree) or len(other) != len(tree):
            raise _mismatch(tree, other)
    return type(tree)(nt_tree_map(fn, *branches) for branches in zip(tree, *rest, strict=True))


def nt_tree_leaves(tree: Any) -> list[Any]:
    """Returns the leaves of nested lists and tuples, in order.

    >>> nt_tree_leaves([1, (2, [3]), None])
    [1, 2, 3, None]
    """
    if not _is_container(tree):
        return [tree]
    return [leaf for branch in tree for leaf in nt_tree_leaves(branch)]


def _is_container(tree: Any) -> bool:
    return isinstance(tree, list) or (isinstance(tree, tuple) and not hasattr(tree, "_fields"))


def _mismatch(tree: Any, other: Any) -> ValueError:
    return ValueError(
        f"Expected nested lists and tuples of the same structure, got {_describe(tree)} where another has "
        f"{_describe(other)}. Give both the same containers (list or tuple) of the same lengths."
    )


def _describe(tree: Any) -> str:
    kind = type(tree).__name__
    return f"a {kind} of length {len(tree)}" if _is_container(tree) else f"a leaf ({kind})"
