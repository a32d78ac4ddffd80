"""The plans of the Mosaic backends and how they are evaluated, in plain JAX: what does not depend on Pallas.

Where test_core_mosaic.py has the smallest images there are, these are as large as it takes: planes of several pieces,
layers that are repeated before a pool.
"""

import jax
import numpy as np
import plain_machine
import pytest
from conformance import CHAINS, MEAN, RELU, chain, conv, dense, inputs, pool, run, spec_of
from nt_core import Request, activations, steps
from test_core_activations import ACTIVATIONS
from test_core_mosaic import MORE, REFUSED

PAIRS = Request(ntk=True, covariances=False)
TOLERANCE = 1e-6
BLOCK = [conv(), RELU]
CASES = {name: case for name, case in CHAINS.items() if name not in REFUSED} | {
    f"{name}, more": case for name, case in MORE.items()
}
REPEATED = {
    "before a pool": ((8, 8), [*BLOCK, pool(), *BLOCK * 3, pool(), *BLOCK, pool(), steps.Flatten(), dense()]),
    "before a pool with padding": ((8, 6), [*BLOCK * 4, pool((3, 3), (2, 2), "SAME"), *BLOCK, steps.GlobalPool(MEAN)]),
    "before overlapping windows": ((6, 6), [*BLOCK * 4, pool((2, 2), (1, 1), "SAME"), *BLOCK, steps.Flatten()]),
    "linear, before a pool": ((8, 8), [conv(), *[conv()] * 3, pool(), *BLOCK, steps.GlobalPool(MEAN)]),
    "in pieces": ((12, 12), [*BLOCK * 3, steps.GlobalPool(MEAN)]),
    "in pieces, before a pool": ((24, 22), [*BLOCK * 4, pool(), *BLOCK, steps.Flatten()]),
}
MYRTLE10 = [*BLOCK * 2, pool(), *BLOCK * 3, pool(), *BLOCK * 3, pool(), pool(), pool(), steps.Flatten(), dense()]


def check(case, backend, monkeypatch, n1=2, n2=1):
    plain_machine.use(monkeypatch)
    space, layers = case
    x1, x2 = inputs(space, n1, n2, "float32")
    program = chain(spec_of(x1, x2), layers)
    with jax.disable_jit():
        actual = run(program, x1, x2, PAIRS, backend)
    with jax.enable_x64(True):
        expected = run(program, x1.astype("float64"), x2.astype("float64"), PAIRS)
    for got, wanted in ((actual.nngp, expected.nngp), (actual.ntk, expected.ntk)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.sample(2)
@pytest.mark.parametrize("backend", ["plain_gpu", "plain_tpu"])
@pytest.mark.parametrize("name", CASES)
def test_chain(name, backend, monkeypatch):
    check(CASES[name], backend, monkeypatch)


@pytest.mark.sample(2)
@pytest.mark.parametrize("backend", ["plain_gpu", "plain_tpu"])
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_layers(name, backend, monkeypatch):
    """What a pool reads is 0 at ghosts, what the next of repeated layers reads half a variance."""
    check(REPEATED[name], backend, monkeypatch, 1, 1)


NONLINEARITIES = ACTIVATIONS | {
    "hermite": activations.Hermite(3),
    "exp normalized": activations.ExpNormalized(0.7, 0.2),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nonlinearities(name, monkeypatch):
    dual, normalize = steps.Dual(NONLINEARITIES[name]), steps.Normalize(1e-3, ())  # powers would leave the range
    case = (3, 3), [conv(), dual, normalize, conv(), dual, steps.GlobalPool(MEAN), dense()]
    if name in ("elementwise", "numerical"):
        with pytest.raises(NotImplementedError, match="does not have the dual of Elementwise"):
            check(case, "plain_gpu", monkeypatch)
        return
    check(case, "plain_gpu", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain_gpu", "plain_tpu"])
def test_a_network_at_its_size(backend, monkeypatch):
    check(((32, 32), MYRTLE10), backend, monkeypatch, 1, 1)
