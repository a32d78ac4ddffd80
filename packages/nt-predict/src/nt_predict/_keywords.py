"""Keyword arguments of `kernel_fn` for pairs of training and test points.

A kernel function hands a keyword that is a pair to the first and the second inputs, and any other to both. Training and
test points may come with different arrays (patterns, keys, ...), which then belong together in a pair.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from nt_core.keywords import is_array
from nt_core.tracing import is_traced


def test_test_keywords(train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of the test-test kernel: what is not given for test points is as for training points."""
    return {**train, **test}


def test_train_keywords(train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of the test-train kernel, or raises `ValueError` if both sides must agree and do not."""
    return {
        key: _test_train(key, value, train.get(key), key in train) if key in test else value
        for key, value in test_test_keywords(train, test).items()
    }


def _test_train(key: str, test: Any, train: Any, is_given_for_training: bool) -> Any:
    if _same(test, train):
        return test
    if _is_array_or_pair(test) and (_is_array_or_pair(train) or train is None):
        return _first(test), _first(train)
    if not is_given_for_training:
        return test
    raise ValueError(
        f"The keyword `{key}` of `kernel_fn` must be the same for training and test points (only arrays and pairs of "
        f"arrays may differ): it was {train!r} when the predictor was made, and is {test!r} now."
    )


def _is_array_or_pair(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2 and any(map(is_array, value))
    return is_array(value) or (is_pair and all(part is None or is_array(part) for part in value))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _same(first: Any, second: Any) -> bool:
    """Returns whether two keywords, such as trees of parameters, are known to have the same value."""
    first_leaves, first_tree = jax.tree.flatten(first)
    second_leaves, second_tree = jax.tree.flatten(second)
    return first_tree == second_tree and all(map(_same_leaf, first_leaves, second_leaves))


def _same_leaf(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if is_traced(first) or is_traced(second):
        return False
    if is_array(first) and is_array(second):
        return first.dtype == second.dtype and np.array_equal(_numbers(first), _numbers(second))
    return not is_array(first) and not is_array(second) and bool(first == second)


def _numbers(array: Any) -> Any:
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
