"""Nested lists and tuples of arrays and kernels."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nt_core.trees import nt_tree_leaves, nt_tree_map

Pair = collections.namedtuple("Pair", "a b")
TREES = st.recursive(
    st.integers(), lambda branch: st.lists(branch, max_size=3) | st.lists(branch, max_size=3).map(tuple), max_leaves=8
)


@settings(deadline=None)
@given(TREES)
def test_map_keeps_the_containers(tree):
    assert nt_tree_map(lambda x: x, tree) == tree  # a list never equals a tuple
    assert nt_tree_leaves(nt_tree_map(lambda x: x + 1, tree)) == [x + 1 for x in nt_tree_leaves(tree)]


@settings(deadline=None)
@given(TREES)
def test_map_over_several_trees(tree):
    tens = nt_tree_map(lambda x: 10 * x, tree)
    assert nt_tree_map(lambda a, b: b - a, tree, tens) == nt_tree_map(lambda x: 9 * x, tree)


@pytest.mark.parametrize("leaf", [None, Pair(1, 2), {"a": 1}, "text", 3.0])
def test_everything_else_is_a_leaf(leaf):
    assert nt_tree_leaves([leaf, (leaf,)]) == [leaf, leaf]
    assert nt_tree_map(lambda x: x, (leaf,)) == (leaf,)
    assert nt_tree_map(lambda x: [x], leaf) == [leaf]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1, 2], (1, 2), "a list of length 2 where another has a tuple of length 2"),
        ([1, 2], [1], "a list of length 2 where another has a list of length 1"),
        ([1, (2, 3)], [1, 2], r"a tuple of length 2 where another has a leaf \(int\)"),
        ([1, 2], [1, [2]], r"a leaf \(int\) where another has a list of length 1"),
        ((1, 2), Pair(1, 2), r"a tuple of length 2 where another has a leaf \(Pair\)"),
    ],
)
def test_trees_of_different_structure_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        nt_tree_map(lambda a, b: a, first, second)
