"""Derivatives of the backends: every mode against finite differences, in bounded memory, sharded and inside loops."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import nt_core.evaluation.block as block
import numpy as np
import pytest
from conformance import ABS, CHAINS, MEAN, RELU, SUM, chain, conv, dense, inputs, masked, masks, pool, run, spec_of
from nt_core import Request, Spec, activations, definition, steps
from nt_core.activations.base import activation, static
from nt_core.evaluation import tiles
from nt_core.evaluation.entrywise import Entrywise

pytestmark = pytest.mark.unoptimised

BACKENDS = ["xla", "cpu"]
TESTS = pathlib.Path(__file__).parent
NTK = Request(ntk=True, covariances=False)


def network(n_layers):
    return [conv(), RELU] * n_layers + [steps.GlobalPool(MEAN)]


@pytest.mark.parametrize("implementation, n_layers", [("xla", 2), ("cpu", 1)])
def test_every_mode_agrees_with_finite_differences(implementation, n_layers, x64):
    """With respect to the images and to the variances of weights and biases, of first and of second order."""
    x1, x2 = inputs((6, 6), 2, 2, "float64")

    def total(x1, w_var, b_var):
        layer = steps.Conv(w_var, b_var, 16, (3, 3), (1, 1), "SAME", (1, 1))
        program = chain(spec_of(x1, x2), [layer, RELU] * n_layers + [steps.GlobalPool(MEAN)])
        return jnp.sum(jnp.sin(run(program, x1, x2, NTK, implementation).ntk))

    point = (jnp.asarray(x1), jnp.asarray(1.7), jnp.asarray(0.1))
    random = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), point)

    def moved(step):
        return jax.tree.map(lambda a, d: a + step * d, point, direction)

    @jax.jit
    def derivatives(*point):
        gradient = jax.grad(total, argnums=(0, 1, 2))
        value, tangent = jax.jvp(total, point, direction)
        _, linear = jax.linearize(total, *point)
        _, hessian_vector = jax.jvp(gradient, point, direction)
        return value, tangent, linear(*direction), gradient(*point), hessian_vector

    def dot(a):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, direction)))

    step = 1e-5
    value, tangent, linear, gradient, hessian_vector = derivatives(*point)
    after, before = derivatives(*moved(step)), derivatives(*moved(-step))
    np.testing.assert_allclose(value, total(*point), rtol=1e-12)
    first = (after[0] - before[0]) / (2 * step)
    np.testing.assert_allclose([tangent, linear, dot(gradient)], first, rtol=1e-7)
    second = jax.tree.map(lambda a, b: (a - b) / (2 * step), after[3], before[3])
    for actual, expected in zip(hessian_vector, second, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


POOLED = {
    "strides": ((8, 4), [conv(), RELU, pool(), conv(strides=(2, 2)), RELU, steps.GlobalPool(MEAN)]),
    "overlapping": ((6, 4), [conv(), RELU, pool((3, 3), (2, 2), "SAME"), conv(), ABS, steps.Flatten()]),
    "edges": ((4, 4), [conv(), RELU, pool((3, 2), (1, 2), "SAME", MEAN, True), conv(), RELU, steps.GlobalPool(SUM)]),
    "gather": CHAINS["gather, pool"],
}


def check_gradients(kernel, expected, x1, x2):
    """Compares the gradients of a sum over kernels with differences of what is expected, along one direction."""
    random = np.random.default_rng(1)
    direction = [random.normal(size=x.shape) for x in (x1, x2)]
    weights = random.normal(size=(2, len(x1), len(x2)))

    def total(kernel, x1, x2):
        covariances = kernel(x1, x2)
        return jnp.sum(weights[0] * covariances.nngp) + jnp.sum(weights[1] * covariances.ntk)

    gradients = jax.jit(jax.grad(lambda *x: total(kernel, *x), argnums=(0, 1)))(x1, x2)
    step = 1e-5
    after, before = (total(expected, x1 + h * direction[0], x2 + h * direction[1]) for h in (step, -step))
    actual = sum(np.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(actual, (after - before) / (2 * step), rtol=1e-6)


@pytest.fixture
def pools_on_planes(monkeypatch):
    """Also small images are pooled on offset planes."""
    jax.clear_caches()
    monkeypatch.setattr(block, "_MIN_POSITIONS_FOR_PLANES", 1)
    yield
    jax.clear_caches()


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", POOLED)
def test_gradients_through_pools(name, x64, pools_on_planes):
    space, layers = POOLED[name]
    x1, x2 = inputs(space, 3, 2, "float64")
    program = chain(spec_of(x1, x2), layers)
    check_gradients(
        lambda x1, x2: run(program, x1, x2, NTK, "xla"), lambda *x: definition.propagate(program, x), x1, x2
    )


def test_gradients_with_masks(x64, pools_on_planes):
    (x1, x2), both = inputs((3, 4), 3, 2, "float64"), masks((3, 4), 3, 2)
    program = masked(spec_of(x1, x2), *both)
    check_gradients(
        lambda x1, x2: run(program, x1, x2, NTK, "xla"), lambda *x: definition.propagate(program, x), x1, x2
    )


def test_gradients_of_a_batch_with_itself(x64, pools_on_planes):
    """Against the same derivative from two batches that are equal, but not known to be: without coincident pairs."""
    x1, _ = inputs((6, 4), 3, 1, "float64")
    program = chain(spec_of(x1, x1), POOLED["overlapping"][1])
    weights = 1 - np.eye(3)

    def total(x1, x2):
        return jnp.sum(weights * run(program, x1, x2, NTK, "xla").ntk)

    own = jax.grad(lambda x: total(x, None))(jnp.asarray(x1))
    first, second = jax.grad(total, argnums=(0, 1))(jnp.asarray(x1), jnp.asarray(x1))
    np.testing.assert_allclose(own, first + second, rtol=0, atol=1e-10 * np.abs(own).max())


def test_second_derivatives_where_inputs_coincide(x64):
    """Forward over reverse through a loop over layers, where JAX forgets derivatives that are written by hand."""
    x = np.random.default_rng(0).normal(size=3)
    program = chain(spec_of(x[None], x[None]), [dense(), RELU] * 5 + [dense()])

    def kernels(both):
        kernel = run(program, both[:1], both[1:], NTK, "xla")
        return jnp.stack([kernel.nngp[0, 0], kernel.ntk[0, 0]])

    gradients = jax.jit(jax.jacrev(kernels))
    hessians = jax.jit(jax.hessian(kernels))
    for other in (x, 2 * x, -x, 0 * x):
        assert np.isfinite(hessians(np.stack([x, other]))).all()
    assert np.isfinite(hessians(np.zeros((2, 3)))).all()
    # The tangent kernel has a kink where inputs coincide, the covariance has none.
    for other, which, tolerance in ((x[::-1], slice(None), 1e-7), (x, 0, 1e-4)):
        both, shifts = np.stack([x, other]), 1e-5 * np.eye(6).reshape(6, 2, 3)
        differences = [(gradients(both + h)[which] - gradients(both - h)[which]) / 2e-5 for h in shifts]
        expected = np.stack(differences, -1)
        actual = hessians(both)[which].reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def temporary_bytes(space, n1, n2):
    """Memory that the compiled gradient of a sum of kernels takes, besides its arguments and results."""
    x1, x2 = inputs(space, n1, n2, "float32")
    program = chain(spec_of(x1, x2), network(4))
    gradient = jax.grad(lambda x1, x2: jnp.sum(run(program, x1, x2, NTK, "xla").ntk), argnums=(0, 1))
    return jax.jit(gradient).lower(x1, x2).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_a_gradient_grows_neither_with_pairs_nor_with_offsets(monkeypatch):
    """With samples and with positions it does: one plane of each layer, for the pairs of one block."""
    monkeypatch.setattr(tiles, "_LANES", 16)
    monkeypatch.setattr(tiles, "_IN_CACHE", 1)
    monkeypatch.setattr(tiles, "_COLUMNS", 4)
    jax.clear_caches()
    few, many, large = temporary_bytes((6, 6), 8, 8), temporary_bytes((6, 6), 32, 32), temporary_bytes((12, 12), 8, 8)
    jax.clear_caches()
    assert many < 4.5 * few  # 4 times the samples, 16 times the pairs
    assert large < 4.5 * few  # 4 times the positions, 16 times the pairs of positions


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from conformance import chain, inputs, run, spec_of
from test_core_derivatives import NTK, network

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

x1, x2 = inputs((16, 16), 20, 30, "float32")
program = chain(spec_of(x1, x2), network(21))
jax.block_until_ready(jax.jit(lambda x: x + 1)(x1))
idle = peak()
gradient = jax.jit(jax.grad(lambda x1: jnp.sum(run(program, x1, x2, NTK).ntk)))(x1)
assert jnp.isfinite(gradient).all() and jnp.any(gradient != 0)
print(peak() - idle)
"""


def test_gradients_of_matrices_keep_inputs_alone():
    """Not the differences of all pairs of them, for which there is a branch of the program."""
    x1, x2 = (np.random.default_rng(seed).normal(size=(128, 512)).astype("float32") for seed in (1, 2))
    program = chain(Spec(x1.shape, x2.shape, batch_axis=0, channel_axis=1), [dense(), RELU, dense()])

    def gradient(x1, x2):
        return jax.grad(lambda x1: jnp.sum(run(program, x1, x2, NTK, "xla").ntk))(x1)

    memory = jax.jit(gradient).lower(x1, x2).compile().memory_analysis().temp_size_in_bytes
    assert memory < 20 * x1.nbytes  # differences are 128 times as large


ACTIVATIONS = {
    "relu": activations.ABRelu(0.2, 1.0),
    "gelu": activations.Gelu(),
    "erf": activations.Erf(0.8, 1.2, 0.1),
    "numerical": activations.ElementwiseNumerical(jnp.tanh, None, 2),
    "elementwise": activations.Elementwise(lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2),
}


# Second derivatives of tables take half a minute to compile.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "numerical" else n for n in ACTIVATIONS]
)
def test_forward_derivatives_of_nonlinearities(name, x64):
    """Those that are found with the values are those of the values, of first and of second order."""
    activation = ACTIVATIONS[name]
    point = (activation, jnp.array([[0.7], [1.3]]), jnp.array([[1.1, 0.4, 2.0]]), jnp.full((2, 3), 0.3))
    numbers = [i for i, leaf in enumerate(jax.tree.leaves(point)) if jnp.issubdtype(jnp.result_type(leaf), float)]
    leaves, structure = jax.tree.flatten(point)

    def derivatives(wrap):
        def total(changing):
            changed = list(leaves)
            for i, leaf in zip(numbers, changing, strict=True):
                changed[i] = leaf
            activation, *arguments = structure.unflatten(changed)
            value, factor = wrap(activation).dual(*arguments)
            return jnp.sum(jnp.sin(value) + jnp.cos(2 * factor))

        at = [jnp.asarray(leaves[i], float) for i in numbers]
        direction = [jnp.cos(1 + jnp.arange(a.size, dtype=float)).reshape(a.shape) for a in at]
        return jax.jit(lambda at: jax.jvp(jax.grad(total), (at,), (direction,)))(at)

    found, expected = derivatives(Entrywise), derivatives(lambda activation: activation)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@activation
class Powers(activations.Activation):
    """From outside of the package: with a function of its own, which needs an axis, and a factor without axes."""

    fn: Callable[..., Any] = static()
    a: float

    def variance(self, var):
        return self.a**2 * self.fn(var)

    def dual(self, var1, var2, deficit):
        return self.a**2 * self.fn(deficit), jnp.asarray(self.a**2, deficit.dtype)


@activation
class Other(activations.Activation):
    """Holds another activation."""

    inner: activations.Activation

    def variance(self, var):
        return self.inner.variance(var)

    def dual(self, var1, var2, deficit):
        return self.inner.dual(var1, var2, deficit)


CAPTURING = {
    "numerical": lambda s, n: activations.ElementwiseNumerical(lambda x: jnp.tanh(s * x) ** n, None, 2),
    "from outside": lambda s, n: Powers(lambda var: (s * var) ** n, 0.7),
    "within another": lambda s, n: Other(Powers(lambda var: (s * var) ** n, 0.7)),
    "mapped": lambda s, n: Powers(jax.vmap(lambda var: var**2 + 0 * s * n), s),
}


@pytest.mark.parametrize("name", CAPTURING)
def test_what_functions_capture(name, x64):
    """Numbers that are learnt, or known to JAX alone, also in activations from elsewhere."""
    x1, x2 = (np.random.default_rng(seed).normal(size=(2, 3)) for seed in (1, 2))

    def total(x1, s, n):
        layers = [dense(), steps.Dual(CAPTURING[name](s, n)), dense()]
        program = chain(Spec((2, 3), (2, 3), batch_axis=0, channel_axis=1), layers)
        return jnp.sum(run(program, x1, x2, NTK, "xla").ntk)

    @jax.jit
    def derivatives(n):
        return jax.grad(total, argnums=(0, 1))(jnp.asarray(x1), 0.8, n)

    of_x1, of_s = derivatives(2)
    shift = 1e-6 * np.ones_like(x1)
    along = (total(x1 + shift, 0.8, 2) - total(x1 - shift, 0.8, 2)) / 2e-6
    np.testing.assert_allclose(jnp.sum(of_x1), along, rtol=1e-6)
    np.testing.assert_allclose(of_s, (total(x1, 0.8 + 1e-6, 2) - total(x1, 0.8 - 1e-6, 2)) / 2e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", BACKENDS)
def test_peak_memory_of_a_gradient(implementation):
    """What lies within 21 layers of 600 pairs of images on 256 planes would take tens of gigabytes."""
    assert int(in_process(PEAK, NT_IMPLEMENTATION=implementation)) < 0.6e9


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from conformance import chain, inputs, run, spec_of
from test_core_derivatives import NTK, network

assert len(jax.devices()) == 4
x1, x2 = map(jnp.asarray, inputs((6, 6), int(sys.argv[2]), 3, "float32"))

def kernel(x1, x2):
    return run(chain(spec_of(x1, x2), network(int(sys.argv[1]))), x1, x2, NTK).ntk

sharded = jax.shard_map(kernel, mesh=Mesh(jax.devices(), "rows"), in_specs=(P("rows"), P()), out_specs=P("rows"))

def with_gradients(kernel):
    def loss(x1, x2):
        k = kernel(x1, x2)
        return jnp.sum(jnp.sin(k)), k

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x1, x2)

for a, b in zip(jax.tree.leaves(with_gradients(sharded)), jax.tree.leaves(with_gradients(kernel)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
print("equal")
"""


@pytest.mark.parametrize("implementation, n_layers, rows", [("xla", "3", "8"), ("xla", "2", "4"), ("cpu", "2", "8")])
def test_shard_map(implementation, n_layers, rows):
    """Rows of a block on four devices, and the gradients through them, equal those on one."""
    flags = "--xla_force_host_platform_device_count=4"
    assert in_process(SHARDED, n_layers, rows, NT_IMPLEMENTATION=implementation, XLA_FLAGS=flags).strip() == "equal"


@pytest.mark.parametrize("implementation", BACKENDS)
def test_inside_a_loop_and_vmap(implementation):
    x1, x2 = inputs((6, 6), 2, 3, "float32")
    program = chain(spec_of(x1, x2), network(2))
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def kernel(scale):
        return run(program, scale * x1, x2, NTK, implementation).ntk

    @jax.jit
    def forward(scale):
        return jax.jvp(kernel, (scale,), (jnp.ones_like(scale),))

    def reverse(scale):
        return jax.grad(lambda s: (jnp.sum(kernel(s)), kernel(s)), has_aux=True)(scale)

    expected, slopes = map(np.stack, zip(*map(forward, scales), strict=True))
    for over in (lambda f: jax.lax.map(f, scales), lambda f: jax.vmap(f)(scales)):
        gradients, values = jax.jit(over, static_argnums=0)(reverse)
        np.testing.assert_allclose(values, expected, rtol=2e-6)
        np.testing.assert_allclose(gradients, slopes.sum((1, 2)), rtol=1e-5)


def in_process(code, *args, **environment):
    """Runs code in a fresh process and returns what it prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=TESTS, env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
