import jax
import pytest


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
