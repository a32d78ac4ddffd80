"""Steps and activations of different classes are different structures, whatever their fields."""

import itertools

import jax
import numpy as np
from nt_core import activations, steps

VALUES = [
    activations.ABRelu(0.5, 2.0),
    activations.Exp(0.5, 2.0),
    activations.Erf(0.5, 2.0, 0.0),
    activations.Sin(0.5, 2.0, 0.0),
    steps.Flatten(batch_axis=0),
    steps.GlobalPool(mean=False),
]


def test_structures_differ():
    for a, b in itertools.combinations(VALUES, 2):
        assert jax.tree.structure(a) != jax.tree.structure(b)
    for value in VALUES:
        other = jax.tree.map(lambda leaf: leaf + 1, value)
        assert jax.tree.structure(value) == jax.tree.structure(other)
        assert type(other) is type(value)


def test_jit_tells_them_apart():
    """Not by their hashes alone, which would make it a matter of luck: all structures go through one cache."""

    @jax.jit
    def number(value):
        return [type(v) for v in VALUES].index(type(value))

    for _ in range(2):
        np.testing.assert_array_equal([number(value) for value in VALUES], range(len(VALUES)))


def test_names_of_leaves():
    (path, leaf), *_ = jax.tree_util.tree_leaves_with_path(activations.ABRelu(0.5, 2.0))
    assert jax.tree_util.keystr(path) == ".a" and leaf == 0.5
