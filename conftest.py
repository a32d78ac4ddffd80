"""Settings that hold for every test and doctest of the workspace."""

import itertools
import zlib

import jax
import numpy as np
import pytest

# No code path may rely on implicit rank promotion: users switch it off.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    """Compiled programs of one test file are not kept for the next. They are as users have them, unless the file says
    that they take long and optimisation does not matter."""
    unoptimised = any(mark.name == "unoptimised" for mark in request.node.iter_markers())
    jax.config.update("jax_disable_most_optimizations", unoptimised)
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def doctest_precision(request):
    """Examples in docstrings print four digits: the last places differ between backends and versions of JAX."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with np.printoptions(precision=4):
        yield


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """Runs a test in both precisions, each with JAX's default types to match."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked slow
def pytest_collection_modifyitems(items):
    """Of the cases of a test with the marker `sample(n)` all but n are slow, chosen by chance and always the same."""
    sampled = [item for item in items if item.get_closest_marker("sample")]
    for _, cases in itertools.groupby(sampled, key=lambda item: item.nodeid.partition("[")[0]):
        by_chance = sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))
        for case in by_chance[by_chance[0].get_closest_marker("sample").args[0] :]:
            case.add_marker("slow")
