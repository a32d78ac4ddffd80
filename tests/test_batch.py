"""`batch`: the same kernels as without, whatever the cells and the devices."""

import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import neural_tangents as nt
import nt_core
import numpy as np
import pytest
from neural_tangents import stax
from nt_core.backends.cpu import native

pytestmark = pytest.mark.unoptimised

# The native engine computes the same bits in every cell.
ROUNDING = 0.0 if native.refusal() is None else 1e-5
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(5, 6)).astype("float32"), RNG.normal(size=(3, 6)).astype("float32")
IMAGES = RNG.normal(size=(5, 4, 4, 2)).astype("float32"), RNG.normal(size=(3, 4, 4, 2)).astype("float32")


def conv():
    return stax.serial(stax.Conv(1, (3, 3), padding="SAME", b_std=0.1), stax.Relu())


def two_inputs():
    return stax.serial(stax.parallel(stax.Dense(1), stax.Dense(1)), stax.FanInSum(), stax.Relu(), stax.Dense(1))


FCN = stax.serial(stax.Dense(1, 1.3, 0.1), stax.Relu(), stax.Dense(1))
POOLED = stax.serial(conv(), stax.AvgPool((2, 2)), conv(), stax.GlobalAvgPool(), stax.Dense(1))
FLAT = stax.serial(conv(), stax.Flatten(), stax.Dense(1))
POSITIONS = conv()  # an odd number of convolutions: stored last axis first
DROPOUT = stax.serial(stax.Dense(1), stax.Relu(), stax.Dropout(0.5, mode="train"), stax.Dense(1))


def assert_same(actual, expected, rtol=ROUNDING):
    """The same structure, static fields included, and the same values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e)
        assert np.asarray(a).dtype == np.asarray(e).dtype
        np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-2 * rtol)


def assert_symmetric(kernel):
    pairs = [axis + half for axis in range(0, kernel.ndim, 2) for half in (1, 0)]
    np.testing.assert_array_equal(kernel, np.transpose(kernel, pairs))


def tree(a, b):
    return [a, b]


# Networks


@pytest.mark.parametrize("network", [FCN, POOLED, FLAT, POSITIONS], ids=["fcn", "pooled", "flat", "positions"])
@pytest.mark.parametrize("with_second", [False, True])
def test_whole_kernels(network, with_second):
    """With the native engine bit for bit, and sizes that divide nothing."""
    kernel_fn = network[2]
    x1, x2 = VECTORS if network is FCN else IMAGES
    x2 = x2 if with_second else None
    whole, cells = kernel_fn(x1, x2), nt.batch(kernel_fn, 2)(x1, x2)
    assert_same(cells, whole)
    if not with_second:
        assert_symmetric(cells.ntk)


@pytest.mark.parametrize(
    "get", ["NNGP", "cov1", "cov2", "shape2", ("ntk", "cov1"), ["ntk"], ("mask1", "x1_is_x2", "nngp")]
)
@pytest.mark.parametrize("x2", [None, VECTORS[1]], ids=["alone", "two"])
def test_get_in_every_form(get, x2):
    assert_same(nt.batch(FCN[2], 2)(VECTORS[0], x2, get), FCN[2](VECTORS[0], x2, get))


def test_what_cannot_be_asked_for():
    with pytest.raises(KeyError, match="asks for cov3"):
        nt.batch(FCN[2], 2)(VECTORS[0], None, "cov3")


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 100])
def test_any_size_of_cells(batch_size):
    kernel_fn = nt.batch(FCN[2], batch_size)
    for x2 in (None, VECTORS[1], VECTORS[0] + 1):
        assert_same(kernel_fn(VECTORS[0], x2, "ntk"), FCN[2](VECTORS[0], x2, "ntk"))


@pytest.mark.filterwarnings("ignore:FanIn")
@pytest.mark.parametrize("x2", [None, tree(VECTORS[1], VECTORS[1] ** 2)], ids=["alone", "two"])
def test_trees_of_inputs_and_of_kernels(x2):
    x1 = tree(VECTORS[0], VECTORS[0] ** 2)
    kernel_fn = two_inputs()[2]
    assert_same(nt.batch(kernel_fn, 2)(x1, x2), kernel_fn(x1, x2), rtol=1e-5)
    branches = stax.parallel(stax.Dense(1), FCN)[2]
    assert_same(nt.batch(branches, 2)(x1, x2, ("nngp", "ntk")), branches(x1, x2, ("nngp", "ntk")), rtol=1e-5)


@pytest.mark.parametrize("x2", [None, IMAGES[1]], ids=["alone", "two"])
def test_fault_10_masks_with_all_fields(x2):
    """Masks, `get=None` and x2 fail in the archived library."""
    x1, x2 = (None if x is None else np.where(RNG.random(x.shape[:-1] + (1,)) < 0.2, 9.0, x) for x in (IMAGES[0], x2))
    kernel_fn = POOLED[2]
    whole, cells = (f(x1, x2, mask_constant=9.0) for f in (kernel_fn, nt.batch(kernel_fn, 2)))
    assert_same(cells, whole, rtol=1e-5)
    positions = POSITIONS[2]
    assert_same(nt.batch(positions, 2)(x1, x2, mask_constant=9.0), positions(x1, x2, mask_constant=9.0), rtol=1e-5)


def test_fault_10_more_devices_than_common_divisors():
    """5 and 3 have none; the archived library computes nothing, in silence. See also the test of devices."""
    assert_same(nt.batch(FCN[2], 4, device_count=-1)(*VECTORS, "nngp"), FCN[2](*VECTORS, "nngp"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_fault_10_results_do_not_depend_on_the_cells_with_dropout(batch_size):
    """Dropout is the same for a sample and itself only: not for equal samples, wherever their cells are."""
    x = np.concatenate([VECTORS[0][:3], VECTORS[0][:3]])
    for x1, x2 in ((x, None), (x, x.copy()), (x, x[:3])):
        assert_same(nt.batch(DROPOUT[2], batch_size)(x1, x2), DROPOUT[2](x1, x2), rtol=1e-6)


def test_fault_9_layers_that_keep_samples_apart():
    """Two layers that keep samples apart do so together; the archived library wants all pairs, and refuses."""

    @stax.layer
    def Apart():
        @stax.requires(diagonal_batch=True, batch_axis=0, channel_axis=-1)
        def kernel_fn(k, **kwargs):
            return k * 2.0

        return lambda rng, shape: (shape, ()), lambda params, x, **kwargs: 2.0 * x, kernel_fn

    kernel_fn = stax.serial(Apart(), Apart())[2]
    whole = kernel_fn(*VECTORS)
    assert whole.diagonal_batch
    assert_same(nt.batch(kernel_fn, 2)(*VECTORS), whole, rtol=1e-6)


@pytest.mark.parametrize("x2", [None, IMAGES[1]], ids=["alone", "two"])
def test_kernels_as_inputs(x2):
    first, second = conv()[2], stax.serial(conv(), stax.GlobalAvgPool())[2]
    kernel = first(IMAGES[0], x2)
    assert_same(nt.batch(second, 2)(kernel, None, ("ntk", "cov1")), second(kernel, None, ("ntk", "cov1")))
    everything, whole = nt.batch(second, 2)(kernel), second(kernel)
    assert_same(everything, whole)


def test_kernels_with_dropout_know_their_samples():
    kernel = stax.Dense(1)[2](VECTORS[0], None)
    tail = stax.serial(stax.Relu(), stax.Dropout(0.5, mode="train"), stax.Dense(1))[2]
    assert_same(nt.batch(tail, 2)(kernel, None, "nngp"), tail(kernel, None, "nngp"), rtol=1e-6)


def test_batch_axes_elsewhere():
    kernel_fn = stax.Dense(1, batch_axis=1, channel_axis=0)[2]
    x1, x2 = (x.T for x in VECTORS)
    with pytest.warns(UserWarning, match="batch_axis=1"):
        whole = kernel_fn(x1, x2)
    with pytest.warns(UserWarning, match="batch_axis=1"):
        cells = nt.batch(kernel_fn, 2)(x1, x2)
    assert_same(cells, whole)


def test_derivatives_and_jit():
    kernel_fn = nt.batch(FCN[2], 2)

    @jax.jit
    def both(x1, x2):
        return jax.value_and_grad(lambda x: jnp.sum(kernel_fn(x, None, "ntk")) + jnp.sum(kernel_fn(x, x2).cov1))(x1)

    expected = jax.value_and_grad(lambda x: jnp.sum(FCN[2](x, None, "ntk")) + jnp.sum(FCN[2](x, VECTORS[1]).cov1))
    for a, e in zip(both(*VECTORS), expected(VECTORS[0]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5)
    jitted = jax.jit(kernel_fn, static_argnames="get")
    assert_symmetric(jitted(VECTORS[0], None, get="ntk"))
    closed_over = jax.jit(lambda: kernel_fn(*VECTORS, "ntk"))()
    assert_same(closed_over, FCN[2](*VECTORS, "ntk"))


def test_predictions_with_a_batched_kernel():
    y = np.ones((5, 1), "float32")
    for kernel_fn in (FCN[2], nt.batch(FCN[2], 2)):
        predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, VECTORS[0], y, diag_reg=1e-3)
        mean = predict_fn(x_test=VECTORS[1], get="ntk")
        if kernel_fn is FCN[2]:
            expected = mean
    np.testing.assert_array_equal(mean, expected)


# Finite networks


def mlp(params, x, rng=None, scale=None, **kwargs):
    w, v = params
    hidden = jnp.tanh(x @ w)
    if rng is not None:
        hidden = hidden * jax.random.bernoulli(rng, 0.5, hidden.shape)
    return (hidden @ v) * (1.0 if scale is None else scale[:, None])


PARAMS = (RNG.normal(size=(6, 4)).astype("float32"), RNG.normal(size=(4, 3)).astype("float32"))


@pytest.mark.sample(3)
@pytest.mark.parametrize("x2", [None, VECTORS[1]], ids=["alone", "two"])
@pytest.mark.parametrize(
    "options", [{}, {"trace_axes": ()}, {"trace_axes": (), "diagonal_axes": (-1,)}, {"vmap_axes": 0}]
)
def test_empirical_kernels(x2, options):
    kernel_fn = nt.empirical_kernel_fn(mlp, **options)
    whole = kernel_fn(VECTORS[0], x2, None, PARAMS)
    cells = nt.batch(kernel_fn, 2)
    assert_same(cells(VECTORS[0], x2, None, PARAMS), whole, rtol=1e-5)
    assert_same(cells(VECTORS[0], x2, get="ntk", params=PARAMS), whole.ntk, rtol=1e-5)
    if x2 is None and options.get("trace_axes") == () and "diagonal_axes" not in options:
        assert_symmetric(cells(VECTORS[0], None, "ntk", PARAMS))


def test_functions_of_their_own_arguments():
    """`empirical_ntk_fn` has parameters where networks have `get`; outputs may be any tree."""

    def outputs(params, x):
        return {"a": mlp(params, x["x"]), "b": (x["c"] * mlp(params, x["x"]),)}

    x1, x2 = ({"x": x, "c": jnp.array(2.0)} for x in VECTORS)
    for kernel_fn in (nt.empirical_ntk_fn(outputs), nt.empirical_nngp_fn(outputs)):
        assert_same(nt.batch(kernel_fn, 2)(x1, x2, PARAMS), kernel_fn(x1, x2, PARAMS), rtol=1e-5)


def test_arrays_among_the_keywords_are_cut_in_two():
    kernel_fn = nt.empirical_kernel_fn(mlp)
    scale = np.arange(5.0, dtype="float32"), np.arange(3.0, dtype="float32")
    cells = nt.batch(kernel_fn, 2)
    assert_same(cells(*VECTORS, None, PARAMS, scale=scale), kernel_fn(*VECTORS, None, PARAMS, scale=scale), rtol=1e-5)
    alone = kernel_fn(VECTORS[0], None, None, PARAMS, scale=scale[0])
    assert_same(cells(VECTORS[0], None, None, PARAMS, scale=(scale[0], None)), alone, rtol=1e-5)
    with pytest.raises(ValueError, match="the array `scale` must be given as a tuple of two"):
        cells(*VECTORS, None, PARAMS, scale=scale[0])


@pytest.mark.parametrize("seconds", ["none", "equal"])
def test_random_numbers_follow_the_samples(seconds):
    """Each block of samples has one key, wherever it is: the kernel is that of one function, so it has its rank."""
    x2 = None if seconds == "none" else VECTORS[0].copy()
    kernel_fn = nt.batch(nt.empirical_nngp_fn(lambda p, x, rng: mlp(p, x, rng)), 2)
    kernel = np.asarray(kernel_fn(VECTORS[0], x2, PARAMS, rng=jax.random.key(0)), "float64")
    np.testing.assert_allclose(kernel, kernel.T, rtol=1e-6)
    eigenvalues = np.linalg.eigvalsh(kernel)
    assert eigenvalues[0] > -1e-6 and eigenvalues[1] < 1e-5  # three outputs
    other = kernel_fn(VECTORS[0], x2, PARAMS, rng=jax.random.key(1))
    assert np.abs(kernel - other).max() > 1e-2


def test_monte_carlo_estimates():
    init_fn, apply_fn, _ = stax.serial(stax.Dense(16), stax.Relu(), stax.Dense(3))
    kernel_fn = nt.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), 2, vmap_axes=0)
    cells = nt.batch(kernel_fn, 2)
    assert_same(cells(*VECTORS), kernel_fn(*VECTORS), rtol=1e-5)
    estimates = nt.batch(nt.monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), [1, 2], vmap_axes=0), 2)
    assert_same(list(estimates(*VECTORS, "ntk"))[-1], kernel_fn(*VECTORS, "ntk"), rtol=1e-5)


# Functions of the user


def test_plain_functions():
    """Nothing is assumed of a function but the first two axes; and only what is two-dimensional is mirrored."""
    shapes = []

    def gram(x1, x2):
        x2 = x1 if x2 is None else x2
        shapes.append((len(x1), len(x2)))
        return {"gram": x1 @ x2.T, "outer": jnp.einsum("ia,jb->ijab", x1, x2)}

    x = VECTORS[0]
    assert_same(nt.batch(lambda a, b: gram(a, b)["gram"], 2)(x, None), jnp.asarray(x @ x.T), rtol=1e-5)
    assert set(shapes) == {(2, 2)}
    cells = nt.batch(gram, 2)(x, None)
    assert_same(cells, jax.tree.map(jnp.asarray, gram(x, None)), rtol=1e-5)
    assert_same(nt.batch(jax.jit(gram), 3)(x, VECTORS[1]), jax.jit(gram)(x, VECTORS[1]), rtol=1e-5)


def test_functions_that_cannot_be_cut():
    with pytest.raises(ValueError, match="must have these as its first axes, but `nngp` has shape"):
        nt.batch(lambda x1, x2: (x1 @ x2.T).sum(1), 2)(*VECTORS)
    with pytest.raises(TypeError, match="takes two batches as its first arguments"):
        nt.batch(lambda x1, *rest: x1, 2)(*VECTORS)
    total = nt.batch(lambda x1, x2: (x1 @ x2.T).sum())  # one cell will do
    np.testing.assert_allclose(total(*VECTORS), (VECTORS[0] @ VECTORS[1].T).sum(), rtol=1e-5)


def test_samples_that_do_not_fit():
    with pytest.raises(ValueError, match=r"same size along their first axis, got sizes \[3, 5\]"):
        nt.batch(two_inputs()[2], 2)(list(VECTORS), None)


def test_covariances_across_cells_are_refused():
    with pytest.raises(NotImplementedError, match="cov1 goes across cells"):
        nt.batch(FCN[2], 2)(VECTORS[0], None, "cov1", diagonal_batch=False)
    kernel = FCN[2](VECTORS[0], None, diagonal_batch=False)
    with pytest.raises(NotImplementedError, match="go across cells"):
        nt.batch(stax.Relu()[2], 2)(kernel)
    ntk = nt.batch(FCN[2], 2)(VECTORS[0], None, "ntk", diagonal_batch=False)
    assert_same(ntk, FCN[2](VECTORS[0], None, "ntk"))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`batch_size` must be positive, or 0"):
        nt.batch(FCN[2], -1)
    with pytest.raises(ValueError, match=r"`device_count` must be -1 .*; got 1000"):
        nt.batch(FCN[2], 2, 1000)


def test_empty_batches():
    assert nt.batch(FCN[2], 2)(VECTORS[0][:0], VECTORS[1], "ntk").shape == (0, 3)


# Where and when


def test_memory_decides_where_no_size_is_given(monkeypatch):
    sizes = []

    def kernel_fn(x1, x2):
        x2 = x1 if x2 is None else x2
        sizes.append(len(x1))
        return jnp.sum(jnp.einsum("ia,jb->ijab", x1, x2) ** 2, (2, 3))

    expected = kernel_fn(VECTORS[0], None)
    monkeypatch.setattr(sys.modules["nt_core.cell_programs"], "_BYTES", 4 * 4 * 36 * 9)  # a few cells of 3 x 3
    sizes.clear()
    np.testing.assert_allclose(nt.batch(kernel_fn)(VECTORS[0], None), expected, rtol=1e-5)
    assert min(sizes) == 3 and 5 in sizes


def test_results_stay_in_the_memory_of_the_cpu():
    kernel = nt.batch(FCN[2], 2, store_on_device=False)(*VECTORS)
    assert kernel.ntk.devices() == {jax.devices("cpu")[0]}
    assert_same(kernel, FCN[2](*VECTORS))


def test_explain_says_cells_and_devices():
    """In the plan for all samples."""
    plan = nt_core.explain(nt.batch(FCN[2], 2, 1), (5, 6), implementation="xla")
    assert "cell by cell it is 6 cells of 2 x 2 samples on 1 device\n" in plan
    plan = nt_core.explain(nt.batch(two_inputs()[2], 0, 1), [(5, 6), (5, 6)], [(3, 6), (3, 6)], "ntk", "xla")
    assert "1 cells of 5 x 3 samples on 1 device, or more and smaller ones if these do not fit" in plan


@pytest.mark.parametrize("progress", [True, False])
def test_progress(monkeypatch, progress):
    """A bar appears on a terminal, when a second is over, and counts the cells."""
    shown = []

    class Bar:
        def __init__(self, initial, total, **kwargs):
            shown.extend([("of", total), ("done", initial)])

        def update(self):
            shown.append("one")

        def close(self):
            shown.append("closed")

    clock = iter(np.arange(0, 100, 0.4))
    monkeypatch.setattr(sys.modules["nt_core.progress"], "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    nt.batch(FCN[2], 2, progress=progress)(VECTORS[0], None, "nngp")
    assert shown == ([("of", 6), ("done", 2), "one", "one", "one", "one", "closed"] if progress else [])


DEVICES = """
import sys
import jax, numpy as np
import neural_tangents as nt
from neural_tangents import stax
assert jax.local_device_count() == 8
network = stax.serial(stax.Conv(1, (3, 3), padding="SAME"), stax.Relu(), stax.GlobalAvgPool(), stax.Dense(1))[2]
x = np.random.default_rng(0).normal(size=(9, 4, 4, 2)).astype("float32")
used, device_get = [], jax.device_get
jax.device_get = lambda out: used.append({len(a.sharding.device_set) for a in jax.tree.leaves(out)}) or device_get(out)
for x1, x2 in ((x, None), (x, x[:7]), (x[:1], x)):
    whole = network(x1, x2)
    for size, devices, expected in ((0, -1, 8), (2, -1, 8), (1, 3, 3), (3, 0, 1)):
        used.clear()
        cells = nt.batch(network, size, devices)(x1, x2)
        n_cells = -(-9 // max(size, 1)) if len(x1) == 1 else 9
        assert set().union(*used) == {min(expected, n_cells)}, (size, devices, used)
        for a, e in zip(jax.tree.leaves(cells), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, e, rtol=ROUNDING)
    print(cells.ntk + whole.ntk is not None)  # what was computed on other devices goes with what was not
params = np.ones((3, 2), "float32")
linear = nt.empirical_kernel_fn(lambda p, x, rng: x @ p)
x = np.arange(15.0, dtype="float32").reshape(5, 3)
cells = nt.batch(linear, 2)(x, None, None, jax.device_put(params), rng=jax.random.key(0))
np.testing.assert_allclose(cells.nngp, (x @ params) @ (x @ params).T / 2, rtol=1e-5)
inside = jax.jit(lambda x: nt.batch(network, 2, 4)(x, None, "ntk"))(np.ones((5, 4, 4, 2), "float32"))
np.testing.assert_allclose(inside, network(np.ones((5, 4, 4, 2), "float32"), None, "ntk"), rtol=ROUNDING)
"""


def test_devices():
    """Cells are spread over devices, whatever the sizes, and their results are the same bit for bit."""
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", f"ROUNDING = {ROUNDING}{DEVICES}"], check=True, env={**os.environ, "XLA_FLAGS": flags}
    )


@pytest.mark.parametrize("n_processes", [1, 2])
def test_mesh(n_processes):
    """Devices of one process and of two compute rows each, and keep them; a solver takes what they keep."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = pathlib.Path(__file__).parent / "mesh_process.py"
    processes = [
        subprocess.Popen([sys.executable, script, str(i), str(n_processes), str(port)]) for i in range(n_processes)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * n_processes


def test_mesh_says_what_it_cannot_do():
    mesh = jax.make_mesh((1,), ("samples",))
    with pytest.raises(ValueError, match="by name"):
        nt.batch(FCN[2], 2, mesh=mesh)(VECTORS[0])
    with pytest.raises(TypeError, match="not a Kernel"):
        nt.batch(FCN[2], 2, mesh=mesh)(FCN[2](VECTORS[0]), None, "ntk")
    with pytest.raises(ValueError, match="has 0 samples"):
        nt.batch(FCN[2], 2, mesh=mesh)(VECTORS[0][:0], VECTORS[0], "ntk")
    with pytest.raises(ValueError, match="x2 must have samples"):
        nt.batch(FCN[2], 2, mesh=mesh)(VECTORS[0], VECTORS[0][:0], "ntk")
