"""The plans of the Mosaic backends and how they are evaluated, in plain JAX: what does not depend on Pallas.

Where test_core_mosaic.py has the smallest images there are, these are as large as it takes: planes of several pieces,
layers that are repeated before a pool.
"""

import jax
import jax.numpy as jnp
import numpy as np
import plain_machine
import pytest
from conformance import CHAINS, MEAN, RELU, chain, conv, dense, inputs, pool, run, spec_of
from nt_core import Request, activations, steps
from nt_core.activations.bounds import QUADRATURES, quadrature
from nt_core.backends.mosaic.duals import inlined
from nt_core.backends.mosaic.terms import Terms
from test_core_activations import ACTIVATIONS
from test_core_mosaic import MORE, REFUSED, SELU, TANH

pytestmark = pytest.mark.unoptimised

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
    "sums, in pieces, before a pool": ((12, 10), [*[conv(), TANH] * 3, pool(), conv(), SELU, steps.Flatten()]),
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
    "odd": activations.ElementwiseNumerical(jnp.tanh, None, 125),
    "even but for the linear term": activations.ElementwiseNumerical(jax.nn.silu, None, 50),
    "all orders": activations.ElementwiseNumerical(lambda x: jnp.sin(x + 0.3), None, 20),
    "with a rest": activations.ElementwiseNumerical(jax.nn.selu, None, 30),
    "clip": activations.Clip(1.0, -1.0, 1.0, 0.0),
    "clip, from 0": activations.Clip(0.7, 0.0, 0.5, 0.2),
    "clip gate": activations.ClipGate(1 / 6, 3.0, 0.5),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", NONLINEARITIES)
def test_nonlinearities(name, monkeypatch):
    dual, normalize = steps.Dual(NONLINEARITIES[name]), steps.Normalize(1e-3, ())  # powers would leave the range
    case = (3, 3), [conv(), dual, normalize, conv(), dual, steps.GlobalPool(MEAN), dense()]
    if name == "elementwise":
        with pytest.raises(NotImplementedError, match="does not have the dual of Elementwise"):
            check(case, "plain_gpu", monkeypatch)
        return
    check(case, "plain_gpu", monkeypatch)


SUMS = {name: dual for name, dual in NONLINEARITIES.items() if isinstance(dual, activations.ElementwiseNumerical)}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SUMS)
def test_sums_over_terms(name):
    """At any variance, of black pixels too, and in float32 as the definition in float64."""
    terms = Terms(SUMS[name])
    scales = np.array([1e-7, 1e-4, 0.1, 1.0, 3.0])[:, None]
    correlations = np.array([-1.0, -0.9, -0.2, 0.0, 0.3, 0.8, 0.999, 1.0])
    var1, var2 = scales * np.ones(8), scales * np.array([1.3] * 7 + [1.0])
    given = [x.astype("float32") for x in (var1, var2, (var1 + var2) / 2 - correlations * np.sqrt(var1 * var2))]

    @jax.jit
    def dual(var1, var2, deficit):
        first, second = terms.numbers(var1), terms.numbers(var2)
        (turns,) = terms.turns(jnp.stack([var1, var2])[None])
        return terms.dual(turns, lambda k: (first[k], second[k]), var1, var2, deficit)

    for *arguments, scale in zip(*given, scales[:, 0], strict=True):  # at other variances other terms count
        actual = map(np.asarray, dual(*arguments))
        with jax.enable_x64(True):
            wide = [jnp.asarray(x, "float64") for x in arguments]
            expected, mean_square = SUMS[name].dual(*wide), SUMS[name].variance(wide[1])
        for got, wanted, size in zip(actual, expected, (mean_square, expected[1]), strict=True):
            # Rounding of the deficit turns parallel inputs: with a kink, the factor changes by the root of it.
            unsure = np.where(np.abs(correlations) == 1, 3e-5, 3e-6) * np.abs(size).max()
            np.testing.assert_array_less(np.abs(got - np.asarray(wanted)), unsure + 1e-30, err_msg=f"variances {scale}")
    zero = np.zeros(8, "float32")
    deficit, factor = dual(zero, zero, zero)
    np.testing.assert_allclose(deficit, 0, atol=1e-30)
    slope1, slope2 = (jax.grad(SUMS[name].fn)(x) for x in (-1e-6, 1e-6))
    np.testing.assert_allclose(factor, ((slope1 + slope2) / 2) ** 2, rtol=2**-12)  # where the table begins


@pytest.mark.parametrize("name", ["clip", "clip, from 0", "clip gate"])
def test_clip_without_error_functions(name):
    """In the operations that lower, as in those of XLA."""
    clip, nodes = NONLINEARITIES[name], {count: quadrature(count, "float32") for count in QUADRATURES}
    correlations = np.array([-1.0, -0.9, -0.2, 0.0, 0.3, 0.8, 0.999, 1.0])
    var1, var2 = np.array([[0.01], [1.0], [4.0]]) * np.ones(8), np.array([[0.013], [1.0], [0.5]]) * np.ones(8)
    given = [x.astype("float32") for x in (var1, var2, (var1 + var2) / 2 - correlations * np.sqrt(var1 * var2))]
    actual = jax.jit(lambda *given: inlined(clip.dual, *given, node=lambda n, k: [x[k] for x in nodes[n]]))(*given)
    expected = jax.jit(clip.dual)(*given)
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=2e-6)


def test_ghosts_have_no_covariance():
    """All numbers of a ghost are 0."""
    dual, ghost = NONLINEARITIES["with a rest"], jnp.zeros(1)
    terms = Terms(dual)
    var = jnp.ones(1)
    other = terms.numbers(var)
    deficit, factor = terms.dual(terms.turns(var[None])[0], lambda k: (ghost, other[k]), ghost, var, 0.5 * var)
    np.testing.assert_allclose(deficit, dual.variance(var) / 2, rtol=4e-6)
    np.testing.assert_allclose(factor, 0, atol=1e-7)


def test_functions_of_traced_values_are_refused(monkeypatch):
    plain_machine.use(monkeypatch)
    x, _ = inputs((3, 3), 1, 1, "float32")

    def kernel(slope):
        dual = steps.Dual(activations.ElementwiseNumerical(lambda x: jnp.tanh(slope * x), None, 10))
        program = chain(spec_of(x, x), [conv(), dual, steps.GlobalPool(MEAN)])
        return run(program, x, x, PAIRS, "plain_gpu").nngp

    with pytest.raises(NotImplementedError, match="depends on values that are traced"):
        jax.jit(kernel)(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain_gpu", "plain_tpu"])
def test_a_network_at_its_size(backend, monkeypatch):
    check(((32, 32), MYRTLE10), backend, monkeypatch, 1, 1)
