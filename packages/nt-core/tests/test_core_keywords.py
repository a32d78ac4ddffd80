"""Keywords of two inputs, and the keys of random numbers."""

import warnings

import jax
import numpy as np
import pytest
from nt_core.keywords import split_kwargs

X = np.arange(6.0, dtype="float32").reshape(2, 3)
OTHER = X + np.array([0, 0, 1], "float32")


def key(seed, typed):
    return jax.random.key(seed) if typed else jax.random.PRNGKey(seed)


def data(k):
    return np.asarray(jax.random.key_data(k)).tolist()


def rngs(rng, x1, x2):
    first, second = split_kwargs({"rng": rng}, x1, x2)
    return data(first["rng"]), data(second["rng"])


def test_tuples_of_two_are_split_and_nothing_else():
    same = {"flag": True, "list": [1, 2], "triple": (1, 2, 3), "single": (1,), "array": X, "none": None}
    first, second = split_kwargs({**same, "pair": (1, None), "arrays": (X, OTHER), "nested": ((1, 2), [3])}, X, OTHER)
    for kwargs in (first, second):
        assert all(kwargs[name] is value for name, value in same.items())
    assert (first["pair"], first["arrays"] is X, first["nested"]) == (1, True, (1, 2))
    assert (second["pair"], second["arrays"] is OTHER, second["nested"]) == (None, True, [3])


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("jit", [True, False])
def test_one_key(typed, jit):
    """Equal inputs share the key; different ones do not. It is the values that count, also under jit."""
    k = key(0, typed)
    derived = data(jax.random.fold_in(k, 1))
    split = jax.jit(lambda a, b: split_kwargs({"rng": k}, a, b)) if jit else lambda a, b: split_kwargs({"rng": k}, a, b)

    def keys(x1, x2):
        first, second = split(x1, x2)
        return data(first["rng"]), data(second["rng"])

    assert keys(X, X.copy()) == (data(k), data(k))
    assert keys(X, OTHER) == (data(k), derived)
    assert keys(X, X[:1]) == (data(k), derived)
    assert keys(X, None) == (data(k), data(k))
    assert keys((X, OTHER), (X + 0, OTHER + 0)) == (data(k), data(k))
    assert keys((X, OTHER), (X, X)) == (data(k), derived)
    assert keys((X, OTHER), [X, OTHER]) == (data(k), derived)
    assert keys(X.astype("int32"), X.astype("int32")) == (data(k), data(k))


def test_masked_inputs_are_compared_with_nan_equal_to_nan():
    k, x = key(0, True), np.array([1.0, np.nan])
    assert rngs(k, x, x.copy()) == (data(k), data(k))


@pytest.mark.parametrize("typed", [True, False])
def test_two_keys_are_used_if_they_are_equal_where_the_inputs_are(typed):
    k, other = key(0, typed), key(5, typed)
    assert rngs((k, other), X, OTHER) == (data(k), data(other))
    assert rngs((k, k), X, X + 0) == (data(k), data(k))


@pytest.mark.parametrize("typed", [True, False])
def test_two_keys_that_contradict_the_inputs(typed):
    k, other = key(0, typed), key(5, typed)
    with pytest.warns(UserWarning, match="two different keys for equal inputs x1 and x2; the second key is replaced"):
        assert rngs((k, other), X, X + 0) == (data(k), data(k))
    with pytest.warns(UserWarning, match="two equal keys for different inputs x1 and x2; the second key is replaced"):
        assert rngs((k, k), X, OTHER) == (data(k), data(jax.random.fold_in(k, 1)))


def test_two_keys_under_jit():
    """The same rule; there is nothing to say, as values are not known."""
    k, other = key(0, True), key(5, True)

    @jax.jit
    def second(pair, x1, x2):
        return split_kwargs({"rng": pair}, x1, x2)[1]["rng"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data(second((k, other), X, X)) == data(k)
        assert data(second((k, k), X, OTHER)) == data(jax.random.fold_in(k, 1))
        assert data(second((k, other), X, OTHER)) == data(other)


def test_no_key():
    assert split_kwargs({"rng": None}, X, OTHER) == ({"rng": None}, {"rng": None})


@pytest.mark.parametrize(
    "rng", [3, "key", np.zeros(2), (jax.random.key(0), 1), (1, 2, 3), jax.random.split(jax.random.key(0), 3)]
)
def test_other_values_of_rng(rng):
    with pytest.raises(TypeError, match="`rng` must be one key"):
        split_kwargs({"rng": rng}, X, OTHER)
