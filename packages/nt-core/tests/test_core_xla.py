"""The xla backend: the conformance suite, and what is its own."""

import jax
import nt_core.backends.xla.block as block
import pytest
from conformance import CHAINS, Conformance
from nt_core.steps import GlobalPool, Pool

POOLS = (Pool, GlobalPool)


class TestXla(Conformance):
    implementation = "xla"


@pytest.mark.parametrize("name", [n for n, (_, layers) in CHAINS.items() if any(isinstance(s, POOLS) for s in layers)])
def test_planes(name, x64, monkeypatch):
    """Pooling on offset planes, which by default only larger images take."""
    jax.clear_caches()
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    TestXla().check_chain(name)
    jax.clear_caches()
