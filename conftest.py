"""Settings that hold for every test and doctest of the workspace."""

import jax
import numpy as np
import pytest

# No code path may rely on implicit rank promotion: users switch it off.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs of one test file are not kept for the next."""
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
