"""jit, vmap and grad of predictions; what is kept between calls."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_predict import gp_inference, gradient_descent_mse, gradient_descent_mse_ensemble, max_learning_rate
from nt_predict._spectral import few_times

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.unoptimised]

Kernels = collections.namedtuple("Kernels", ["nngp", "ntk"])
RNG = np.random.default_rng(0)
X_TRAIN, X_TEST, Y = RNG.normal(size=(5, 8)), RNG.normal(size=(3, 8)), RNG.normal(size=(5, 2))
TIMES = [None, 0.7, np.inf]


def kernel_fn(x1, x2, get, scale=1.0):
    x2 = x1 if x2 is None else x2
    product = scale * jnp.matmul(x1, x2.T)
    kernels = Kernels(jnp.exp(product / 8), jnp.exp(product / 8) + product)
    return getattr(kernels, get) if isinstance(get, str) else kernels


def ensemble(x_train=X_TRAIN, **kwargs):
    return gradient_descent_mse_ensemble(kernel_fn, x_train, Y, **kwargs)


def descent(t, x_test):
    return gradient_descent_mse(kernel_fn(X_TRAIN, None, "ntk"), Y)(t, 0.0, 0.0, kernel_fn(x_test, X_TRAIN, "ntk"))


def assert_equal_trees(first, second, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **({"rtol": 1e-10, "atol": 1e-12} | tolerance)), first, second)


# Predictors that are made once and called in different places


def predictors():
    both = kernel_fn(X_TRAIN, None, ("nngp", "ntk"))

    def inference(predict_fn, t, x):
        return predict_fn(None, kernel_fn(x, X_TRAIN, ("nngp", "ntk")), kernel_fn(x, None, ("nngp", "ntk")))

    return {
        "ensemble": (ensemble, lambda predict_fn, t, x: predict_fn(t, x, None, True)),
        "ensemble_train": (ensemble, lambda predict_fn, t, x: predict_fn(t, None, None, True)),
        "descent": (
            lambda: gradient_descent_mse(both.ntk, Y),
            lambda predict_fn, t, x: predict_fn(t, 0.0, 0.0, kernel_fn(x, X_TRAIN, "ntk")),
        ),
        "inference": (lambda: gp_inference(both, Y), inference),
    }


@pytest.mark.sample(4)
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", predictors())
def test_first_call_may_be_eager_or_traced(name, t):
    make, predict = predictors()[name]
    expected = predict(make(), t, X_TEST)

    predict_fn = make()
    call = partial(predict, predict_fn, t)
    batch = np.stack([X_TEST, 2 * X_TEST])
    assert_equal_trees(jax.jit(call)(X_TEST), expected)
    assert_equal_trees(call(X_TEST), expected)  # no tracer is left over
    assert_equal_trees(jax.jit(call)(X_TEST), expected)

    predict_fn = make()
    mapped = jax.vmap(partial(predict, predict_fn, t))(batch)
    assert_equal_trees(jax.tree.map(lambda leaf: leaf[0], mapped), expected)
    assert_equal_trees(predict(predict_fn, t, X_TEST), expected)

    predict_fn = make()
    gradient = jax.grad(lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(predict(predict_fn, t, x))))(X_TEST)
    assert np.isfinite(gradient).all()
    assert_equal_trees(predict(predict_fn, t, X_TEST), expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", predictors())
def test_first_call_traced_in_single_precision(name):
    """There, known matrices are decomposed in double precision all the same."""
    with jax.enable_x64(False):
        make, predict = predictors()[name]
        predict_fn = make()
        traced = jax.jit(partial(predict, predict_fn, 0.7))(X_TEST)
        assert {leaf.dtype for leaf in jax.tree.leaves(traced)} == {np.dtype("float32")}
        assert_equal_trees(predict(predict_fn, 0.7, X_TEST), traced, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", predictors())
def test_predictor_made_and_used_inside_jit(name):
    make, predict = predictors()[name]
    expected = predict(make(), 0.7, X_TEST)
    kept = []

    @jax.jit
    def inside(x):
        predict_fn = make()
        kept.append(predict_fn)
        return predict(predict_fn, 0.7, x)

    assert_equal_trees(inside(X_TEST), expected)
    assert_equal_trees(predict(kept[0], 0.7, X_TEST), expected)  # and used again outside


def test_traced_training_set_is_not_kept():
    """The predictor is made outside of the inner jit, from values that the outer one traces."""

    @jax.jit
    def outer(x_train):
        predict_fn = ensemble(x_train)
        first = jax.jit(lambda x: predict_fn(0.7, x, "ntk", True))(X_TEST)
        return first, predict_fn(0.7, X_TEST, "ntk", True)

    expected = ensemble()(0.7, X_TEST, "ntk", True)
    for actual in outer(X_TRAIN):
        assert_equal_trees(actual, expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("compute_cov", [False, True])
def test_whole_prediction_under_jit_and_vmap(t, compute_cov):
    def predict(x_train, x_test):
        return ensemble(x_train)(t, x_test, None, compute_cov)

    expected = predict(X_TRAIN, X_TEST)
    assert_equal_trees(jax.jit(predict)(X_TRAIN, X_TEST), expected, rtol=1e-8, atol=1e-10)
    batches = np.stack([X_TRAIN, 2 * X_TRAIN]), np.stack([X_TEST, 2 * X_TEST])
    for transform in (jax.vmap, lambda f: jax.jit(jax.vmap(f)), lambda f: jax.vmap(jax.jit(f))):
        mapped = transform(predict)(*batches)
        for index in range(2):
            one = predict(*(batch[index] for batch in batches))
            assert_equal_trees(jax.tree.map(lambda leaf, index=index: leaf[index], mapped), one, rtol=1e-8, atol=1e-10)


def test_time_may_be_traced():
    predict_fn = ensemble()
    times = jnp.array([0.0, 0.7, 5.0])
    expected = predict_fn(times, X_TEST, "ntk", True)
    assert_equal_trees(jax.jit(lambda t: predict_fn(t, X_TEST, "ntk", True))(times), expected)
    assert_equal_trees(jax.vmap(lambda t: predict_fn(t, X_TEST, "ntk", True))(times), expected)


def test_results_are_pytrees_of_one_structure():
    predict_fn = ensemble()
    structures = {jax.tree.structure(jax.jit(lambda t: predict_fn(t, X_TEST, None, True))(t)) for t in (0.1, 0.2)}
    assert structures == {jax.tree.structure(ensemble()(None, X_TEST, ("nngp", "ntk"), True))}


# Gradients


def numerical_gradient(function, x, step=1e-6):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


@pytest.mark.sample(2)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("t", TIMES)
def test_gradient_through_the_train_train_kernel(t, transform):
    """With respect to the training inputs, as in the distillation of data sets."""

    def loss(x_train):
        predictions = ensemble(x_train, diag_reg=1e-2)(t, X_TEST, None, True)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(predictions))

    # Centred differences of a function of large values; the step of each of the two is 1e-6.
    np.testing.assert_allclose(
        transform(jax.grad(loss))(X_TRAIN), numerical_gradient(jax.jit(loss), X_TRAIN), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("t", [0.7, np.inf])
def test_gradient_of_training_set_predictions(t):
    def loss(x_train):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(ensemble(x_train)(t, None, None, True)))

    np.testing.assert_allclose(jax.grad(loss)(X_TRAIN), numerical_gradient(jax.jit(loss), X_TRAIN), atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
def test_gradient_at_equal_eigenvalues(t):
    """The derivative of eigenvectors does not exist here; that of predictions does."""
    direction = RNG.normal(size=(5, 5))
    direction = direction + direction.T
    test_train = RNG.normal(size=(3, 5))

    def predict(step):
        kernel = 2 * jnp.eye(5) + step * jnp.asarray(direction)
        train, test = gradient_descent_mse(kernel, Y)(t, 0.0, 0.0, test_train)
        return (test**2).sum() + (train**2).sum()

    step = 1e-5
    expected = (predict(step) - predict(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(predict)(0.0), expected, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(predict))(0.0), expected, rtol=1e-8)


@pytest.mark.parametrize("t", [None, 0.7])
def test_gradient_with_respect_to_hyperparameters(t):
    def loss(parameters):
        learning_rate, diag_reg, scale = parameters
        predict_fn = gradient_descent_mse_ensemble(
            partial(kernel_fn, scale=scale), X_TRAIN, Y, learning_rate, diag_reg=diag_reg
        )
        return (predict_fn(t, X_TEST, "ntk") ** 2).sum()

    parameters = np.array([1.3, 0.05, 0.8])
    expected = numerical_gradient(loss, parameters)
    for transform in (lambda f: f, jax.jit):
        np.testing.assert_allclose(transform(jax.grad(loss))(parameters), expected, rtol=1e-6, atol=1e-8)


def test_gradient_with_respect_to_time_is_the_flow():
    predict_fn = gradient_descent_mse(kernel_fn(X_TRAIN, None, "ntk"), Y, learning_rate=0.4)
    test_train = kernel_fn(X_TEST, X_TRAIN, "ntk")
    for t in (0.0, 0.7, 20.0):
        train, _ = predict_fn(t, 0.0, 0.0, test_train)
        velocity = jax.jacfwd(lambda t: predict_fn(t, 0.0, 0.0, test_train))(t)
        for rate, kernel in zip(velocity, (kernel_fn(X_TRAIN, None, "ntk"), test_train), strict=True):
            np.testing.assert_allclose(rate, 0.4 * kernel @ (Y - train) / Y.size, atol=1e-11)


def test_second_derivative_at_infinite_time():
    def loss(scale):
        kernel = kernel_fn(scale * X_TRAIN, None, "ntk")
        return gradient_descent_mse(kernel, Y)(None, None, 0.0, kernel_fn(X_TEST, scale * X_TRAIN, "ntk")).sum()

    step = 1e-5
    expected = (jax.grad(loss)(1 + step) - jax.grad(loss)(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(jax.grad(loss))(1.0), expected, rtol=1e-7)


def test_max_learning_rate():
    kernel = kernel_fn(X_TRAIN, None, "ntk")
    np.testing.assert_allclose(jax.jit(max_learning_rate)(kernel), max_learning_rate(kernel), rtol=1e-12)
    assert np.isfinite(jax.grad(max_learning_rate)(kernel)).all()


# What is computed, and how often


def test_known_matrices_are_factored_once(monkeypatch):
    calls = collections.Counter()

    def counting(name, function):
        def wrapped(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return wrapped

    for name in ("eigh", "cholesky"):
        monkeypatch.setattr(jnp.linalg, name, counting(name, getattr(jnp.linalg, name)))
    predict_fn = ensemble()
    for t in (None, 0.7, np.ones(3), np.inf, None):
        predict_fn(t, X_TEST, None, True)
        jax.jit(lambda x, t=t: predict_fn(t, x, None, True))(X_TEST)
    assert calls == {"eigh": 2, "cholesky": 2}  # NNGP and NTK


def operations(jaxpr, enter_branches):
    """Returns the names of all operations of a jaxpr, nested ones included."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        if equation.primitive.name != "cond" or enter_branches:
            for leaf in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                names += operations(leaf, enter_branches) if hasattr(leaf, "eqns") else []
    return names


def test_traced_solve_needs_eigenvalues_only_if_cholesky_fails():
    def solve(kernel):
        return gp_inference(kernel, Y)("nngp", kernel_fn(X_TEST, X_TRAIN, "nngp"))

    jaxpr = jax.make_jaxpr(solve)(kernel_fn(X_TRAIN, None, "nngp"))
    always, at_most = (operations(jaxpr, enter_branches) for enter_branches in (False, True))
    assert always.count("cholesky") == 1
    assert "eigh" in at_most
    assert "eigh" not in always


def test_many_times_are_the_single_ones(monkeypatch):
    used = []

    def few(*args):
        result = few_times(*args)
        used.append(len(result[0]))
        return result

    monkeypatch.setattr("nt_predict._factored.few_times", few)
    times = jnp.array([0.0, *np.geomspace(1e-3, 1e6, 40), np.inf])
    for x_test in (X_TEST, X_TRAIN[:1]):
        predict_fn = ensemble()
        together = predict_fn(times, x_test, None, True)
        for i, t in enumerate(times):
            alone = predict_fn(t, x_test, None, True)
            assert_equal_trees(jax.tree.map(lambda part, i=i: part[i], together), alone, rtol=0, atol=1e-12)
        used.clear()
        in_jit = jax.jit(lambda x, predict_fn=predict_fn: predict_fn(times, x, None, True))(x_test)
        assert len(used) == 2 and max(used) < len(times)  # of the NNGP and the NTK
        assert_equal_trees(together, in_jit, rtol=0, atol=1e-12)
        traced_times = jax.jit(lambda t, x, predict_fn=predict_fn: predict_fn(t, x, None, True))(times, x_test)
        assert_equal_trees(together, traced_times, rtol=0, atol=1e-12)
    assert ensemble()(jnp.zeros(0), X_TEST, "ntk", True).covariance.shape == (0, 3, 3)
