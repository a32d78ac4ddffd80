"""Settings that hold for every test and doctest of the workspace."""

import jax
import pytest

# No code path may rely on implicit rank promotion: users switch it off.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs of one test file are not kept for the next."""
    yield
    jax.clear_caches()
