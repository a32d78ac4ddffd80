"""Monte Carlo estimates: what is averaged, and that it converges to infinite networks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import assert_close
from nt_core import batch
from nt_empirical import empirical_kernel_fn, monte_carlo_kernel_fn
from nt_empirical._monte_carlo import Moments, _chunks, _estimate, _networks_at_once, merged

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(0)
X1, X2 = RNG.normal(size=(5, 4)).astype("float32"), RNG.normal(size=(3, 4)).astype("float32")
KEY = jax.random.key(0)
WIDTH = 64


def init_fn(rng, input_shape):
    """relu(x W / sqrt(inputs)) V sqrt(2 / width), with standard normal parameters."""
    key1, key2 = jax.random.split(rng)
    params = jax.random.normal(key1, (input_shape[-1], WIDTH)), jax.random.normal(key2, (WIDTH, 8))
    return (*input_shape[:-1], 8), params


def apply_fn(params, x, **kwargs):
    w, v = params
    return jax.nn.relu(x @ w / np.sqrt(x.shape[-1])) @ v * np.sqrt(2 / WIDTH)


def relu_kernels(x1, x2):
    """Kernels of the infinite network: Cho and Saul (2009), and their derivative."""
    x1, x2 = (np.asarray(x, "float64") / np.sqrt(x.shape[-1]) for x in (x1, x2))
    norms = np.linalg.norm(x1, axis=1)[:, None] * np.linalg.norm(x2, axis=1)
    theta = np.arccos(np.clip(x1 @ x2.T / norms, -1, 1))
    nngp = norms * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / np.pi
    return {"nngp": nngp, "ntk": nngp + x1 @ x2.T * (1 - theta / np.pi)}


def samples(kernel_fn_of, n, *arguments, **kwargs):
    """Returns the kernels of the single networks, from estimates after every one of them."""
    means = np.stack([np.asarray(k, "float64") for k in kernel_fn_of(range(1, n + 1))(*arguments, **kwargs)])
    sums = means * np.arange(1, n + 1).reshape(-1, *[1] * (means.ndim - 1))
    return np.diff(sums, axis=0, prepend=0)


def assert_mean(kernels, expected, sigmas=5):
    """The mean of independent kernels is within so many standard errors of what is expected."""
    error = np.std(kernels, axis=0, ddof=1) / np.sqrt(len(kernels))
    assert np.max(np.abs(np.mean(kernels, axis=0) - expected) / error) < sigmas


# Values


@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize("vmap_axes", [None, 0])
def test_estimates_converge_to_the_infinite_network(get, vmap_axes):
    kernels = samples(lambda n: monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n, vmap_axes=vmap_axes), 400, X1, X2, get)
    assert_mean(kernels, relu_kernels(X1, X2)[get])


def test_an_estimate_is_the_mean_of_empirical_kernels_with_documented_keys():
    """key, split = split(key); init, dropout = split(split), for each network."""

    def noisy(params, x, *, rng, scale):
        return scale * apply_fn(params, x) + jax.random.normal(rng, (len(x), 8))

    key, kernels = KEY, []
    for _ in range(3):
        key, split = jax.random.split(key)
        init_key, dropout_key = jax.random.split(split)
        _, params = init_fn(init_key, X1.shape)
        kernels.append(empirical_kernel_fn(noisy)(X1, X2, None, params, rng=dropout_key, scale=(2.0, 3.0)))
    actual = monte_carlo_kernel_fn(init_fn, noisy, KEY, 3)(X1, X2, scale=(2.0, 3.0))
    assert type(actual) is type(kernels[0])
    jax.tree.map(lambda a, *k: assert_close(a, np.mean(k, axis=0), 1e-6), actual, *kernels)


def test_several_numbers_give_a_generator_of_estimates_on_the_way():
    estimates = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, iter([5, 2, 5, np.int64(3)]))(X1, X2, ("ntk",))
    assert isinstance(estimates, types.GeneratorType)
    estimates = list(estimates)
    assert len(estimates) == 3
    for n, estimate in zip((2, 3, 5), estimates, strict=True):
        alone = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n)(X1, X2, ("ntk",))
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), estimate, alone)
    (only,) = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, [4])(X1, None, "nngp")
    np.testing.assert_array_equal(only, monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 4)(X1, None, "nngp"))


def test_get():
    kernel_fn = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2)
    both = kernel_fn(X1, X2)
    assert both._fields == ("nngp", "ntk")
    assert_close(kernel_fn(X1, X2, "NTK"), both.ntk, 1e-6)
    assert kernel_fn(X1, X2, ["ntk", "nngp"])._fields == ("ntk", "nngp")
    with pytest.raises(KeyError, match="cov1"):
        monte_carlo_kernel_fn(init_fn, apply_fn, KEY, [2])(X1, X2, "cov1")  # at once, not when iterated over


def test_trees_of_inputs_and_outputs():
    """A network of two inputs: `init_fn` gets their shapes in the same containers."""

    def init_two(rng, shapes):
        assert isinstance(shapes, list)
        assert shapes[1] == (X1.shape,)
        return None, init_fn(rng, shapes[0])[1]

    def apply_two(params, x, **kwargs):
        return {"sum": apply_fn(params, x[0] + x[1][0]), "first": (apply_fn(params, x[0]),)}

    def inputs(x):
        return [x, (2 * x,)]

    for batch_size in (0, 2):
        kernel_fn = monte_carlo_kernel_fn(init_two, apply_two, KEY, 2, batch_size)
        actual, alone = kernel_fn(inputs(X1), inputs(X2)), kernel_fn(inputs(X1))
        expected = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2)(X1, X2)
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), actual["first"][0], expected)
        jax.tree.map(lambda a, e: assert_close(a, 9 * e, 1e-6), actual["sum"].nngp, expected.nngp)
        jax.tree.map(lambda k: np.testing.assert_array_equal(k, k.T), alone)


def test_estimates_under_jit():
    kernel_fn = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2)
    jitted = jax.jit(kernel_fn, static_argnames="get")(X1, X2, get="ntk")
    assert_close(jitted, kernel_fn(X1, X2, "ntk"), 1e-6)


def test_flags_stay_what_they_are():
    def flagged(params, x, *, rng, train, name, mask_constant):
        assert train is True
        assert name == "a"
        assert isinstance(mask_constant, float)
        return apply_fn(params, x)

    kernel_fn = monte_carlo_kernel_fn(init_fn, flagged, KEY, 2)
    for mask_constant in (np.nan, 1.5):
        actual = kernel_fn(X1, X2, "nngp", train=True, name="a", mask_constant=mask_constant)
        assert_close(actual, monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2)(X1, X2, "nngp"), 1e-6)


def test_half_precision_is_summed_in_single():
    """In bfloat16 a sum of ones stops at 256."""

    def constant(params, x, **kwargs):
        return jnp.ones((len(x), 2), "bfloat16")

    kernel = monte_carlo_kernel_fn(lambda rng, shape: (shape, ()), constant, KEY, 300)(X1, None, "nngp")
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(kernel.astype("float32"), np.ones((5, 5)))


# Many at once


def test_numbers_at_once():
    """One size of the chunks, few networks in vain, and chunks end where estimates are wanted."""
    assert 997 <= _networks_at_once([997], 64, 1) * 20 <= 1000
    assert _networks_at_once([10, 100, 1000], 1000, 1) >= 10
    assert _networks_at_once([1, 2, 3, 4], 64, 1) == 1
    assert _networks_at_once([1000], 64, 4) % 4 == 0
    for counts in ([2, 3, 5], [10, 100, 1000], [997]):
        for size in (1, 4, 50):
            chunks = _chunks(counts, size)
            assert [n for start, stop in chunks for n in range(start, stop)] == list(range(counts[-1]))
            assert max(stop - start for start, stop in chunks) <= size
            assert {stop for _, stop in chunks} >= set(counts)


def test_standard_errors(monkeypatch):
    """As by hand, of networks that are computed one by one, three at once, and in blocks; of named kernels."""
    kernels = samples(lambda n: monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n), 7, X1, None, "ntk")
    monkeypatch.setattr("nt_empirical._monte_carlo._networks_at_once", lambda *_: 3)
    kernel_fn = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, [2, 7], standard_errors=True)
    for fn in (kernel_fn, batch(kernel_fn, 3)):
        for n, estimate in zip((2, 7), fn(X1, None, ("ntk",)), strict=True):
            assert estimate.value._fields == estimate.standard_error._fields == ("ntk",)
            assert_close(estimate.value.ntk, np.mean(kernels[:n], axis=0), 1e-5)
            assert_close(estimate.standard_error.ntk, np.std(kernels[:n], axis=0, ddof=1) / np.sqrt(n), 1e-5)


def test_other_generators_draw_each_network_from_its_key():
    """Under `jax.vmap` they draw from the first of several keys."""
    key, kernels = jax.random.key(0, impl="unsafe_rbg"), []
    next_key = key
    for _ in range(3):
        next_key, split = jax.random.split(next_key)
        _, params = init_fn(jax.random.split(split)[0], X1.shape)
        kernels.append(empirical_kernel_fn(apply_fn)(X1, X2, "nngp", params))
    assert_close(monte_carlo_kernel_fn(init_fn, apply_fn, key, 3)(X1, X2, "nngp"), np.mean(kernels, axis=0), 1e-6)


def test_what_does_not_fit_at_once_is_computed_one_by_one(monkeypatch):
    """A bar counts what is computed at once."""
    bars = []

    def with_progress(items, *arguments):
        bars.append((len(items), *arguments))
        return items

    monkeypatch.setattr("nt_empirical._monte_carlo.with_progress", with_progress)
    expected = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 3, progress=False)(X1, X2, "ntk")
    monkeypatch.setattr("nt_empirical._monte_carlo._memory", lambda: 1)
    assert_close(monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 3)(X1, X2, "ntk"), expected, 1e-6)
    assert bars == [(1, False, "networks", "chunk"), (3, True, "networks", "chunk")]


# Blocks


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("batch_size", "device_count", "store_on_device"),
    [(1, -1, True), (2, 0, True), (3, 1, False), (100, -1, False), (0, 1, False)],
)
def test_blocks_do_not_change_the_estimate(batch_size, device_count, store_on_device):
    """Blocks need not divide the batches."""
    blocks = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2, batch_size, device_count, store_on_device)
    whole = monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 2)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), blocks(X1, X2), whole(X1, X2))
    symmetric = blocks(X1)
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), symmetric, whole(X1))
    jax.tree.map(lambda k: np.testing.assert_array_equal(k, k.T), symmetric)


def test_blocks_of_outputs_with_positions():
    def positions(params, x, **kwargs):
        return apply_fn(params, x.reshape(-1, 4)).reshape(len(x), 2, 2, 2)

    x1, x2 = (np.stack([x, -x], axis=1) for x in (X1, X2))
    axes = {"trace_axes": (-1,), "diagonal_axes": (-2,)}
    whole = monte_carlo_kernel_fn(init_fn, lambda p, x, **kw: positions(p, x[:, 0]), KEY, 2, **axes)
    blocks = monte_carlo_kernel_fn(init_fn, lambda p, x, **kw: positions(p, x[:, 0]), KEY, 2, 2, **axes)
    for second in (x2, None):
        actual = blocks(x1, second)
        assert actual.ntk.shape == (5, 5 if second is None else 3, 2, 2, 2)
        jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), actual, whole(x1, second))
    np.testing.assert_array_equal(actual.ntk, actual.ntk.transpose(1, 0, 3, 2, 4))


def test_keywords_are_cut_with_the_samples():
    def weighted(params, x, *, weights, offset, **kwargs):
        return apply_fn(params, x) * jnp.expand_dims(weights, 1) + offset

    keywords = {"weights": (np.arange(5.0, dtype="float32"), np.arange(3.0, dtype="float32")), "offset": jnp.array(0.5)}
    blocks, whole = (monte_carlo_kernel_fn(init_fn, weighted, KEY, 2, size) for size in (2, 0))
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-6), blocks(X1, X2, **keywords), whole(X1, X2, **keywords))


# Dropout

KEEP = 0.5


def dropout(params, x, *, rng, **kwargs):
    """A linear network with dropout of inputs, each sample with a mask of its own."""
    return jnp.where(jax.random.bernoulli(rng, KEEP, x.shape), x / KEEP, 0) @ params


def init_linear(rng, shape):
    return (*shape[:-1], 8), jax.random.normal(rng, (shape[-1], 8))


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch_size", [0, 1, 2])
def test_dropout_is_the_same_for_a_sample_and_itself_only(batch_size):
    """E[x m m' x'] / keep^2 is |x|^2 / keep for a sample with itself, and x x' for two, even if they are equal.

    Samples 0 and 3 are, and with blocks they come from blocks that are equal.
    """
    x = np.concatenate([X1[:3], X1[:3]])
    expected = (x @ x.T).astype("float64")
    np.fill_diagonal(expected, np.sum(x.astype("float64") ** 2, axis=1) / KEEP)
    for second in (None, x.copy()):
        kernels = samples(
            lambda n: monte_carlo_kernel_fn(init_linear, dropout, KEY, n, batch_size), 600, x, second, "ntk"
        )
        assert_mean(kernels, expected)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch_size", [0, 1, 2])
def test_dropout_is_independent_for_different_inputs(batch_size):
    """Training and test inputs that share samples are two draws, whatever the blocks."""
    x2 = X1[:4]
    kernels = samples(lambda n: monte_carlo_kernel_fn(init_linear, dropout, KEY, n, batch_size), 600, X1, x2, "ntk")
    assert_mean(kernels, X1.astype("float64") @ x2.T)


# What is refused


def test_numbers_of_samples_are_checked():
    for n_samples in (0, -1, [1, 0], [1.5], [], ["a"]):
        with pytest.raises(ValueError, match="`n_samples` must consist of positive integers"):
            monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n_samples)
    for n_samples in (1, [1, 5]):
        with pytest.raises(ValueError, match="Standard errors need at least 2 networks"):
            monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n_samples, standard_errors=True)
    for n_samples in (1.5, None):
        with pytest.raises(TypeError, match="`n_samples` must be a positive integer or an iterable"):
            monte_carlo_kernel_fn(init_fn, apply_fn, KEY, n_samples)


def test_devices_and_implementations_are_checked():
    with pytest.raises(ValueError, match=r"`device_count` must be -1 .* got 99"):
        monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 1, device_count=99)
    with pytest.raises(ValueError, match="7 is not a valid NtkImplementation"):
        monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 1, implementation=7)
    with pytest.raises(ValueError, match="`batch_size` must be positive, or 0"):
        monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 1, batch_size=-1)


def test_keys_are_not_keywords():
    with pytest.raises(TypeError, match="drawn for each network from the `key`"):
        monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 1)(X1, rng=KEY)


def test_what_cannot_be_cut_into_blocks():
    def blocks(**options):
        return monte_carlo_kernel_fn(init_fn, apply_fn, KEY, 1, batch_size=2, **options)

    for axes in ({"trace_axes": (0,)}, {"diagonal_axes": -2}):
        with pytest.raises(ValueError, match=r"must have these as its first axes|the first axis of the outputs"):
            blocks(**axes)(X1, X1)
    kernel_fn = monte_carlo_kernel_fn(
        init_fn, lambda p, x, **kwargs: apply_fn(p, x).T, KEY, 1, 2, trace_axes=0, vmap_axes=(0, 1, None)
    )
    with pytest.raises(ValueError, match="samples are along the first axis of all inputs and outputs"):
        kernel_fn(X1, X2)
    with pytest.raises(ValueError, match="the array `weights` must be given as a tuple of two arrays"):
        blocks()(X1, X2, weights=np.ones(5))
    with pytest.raises(ValueError, match=r"same size along their first axis, got sizes \[4, 5\]"):
        blocks()(X1, X2, weights=(np.ones(4), np.ones(3)))


def test_standard_errors_of_more_networks_than_integers_have_room_for_pairs():
    n = 80_000
    moments = Moments(jnp.int32(n), jnp.zeros(2), jnp.array([4.0 * n, n]))
    _, errors = _estimate(moments, jax.ShapeDtypeStruct((2,), jnp.float32))
    np.testing.assert_allclose(errors, np.sqrt([4 / n, 1 / n]), rtol=1e-4)
    both = merged(moments, moments)
    assert both.n == 2 * n
    np.testing.assert_allclose(both.squares, 2 * moments.squares)


def test_numbers_from_an_iterator_in_cells():
    kernel_fn = monte_carlo_kernel_fn(init_fn, apply_fn, jax.random.key(0), n_samples=(n for n in (2, 4)))
    assert len(list(batch(kernel_fn, 1)(np.ones((2, 3)), None, "nngp"))) == 2
