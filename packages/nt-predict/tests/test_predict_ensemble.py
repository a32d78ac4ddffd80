"""How `gradient_descent_mse_ensemble` calls a kernel function, and what it returns."""

import collections

import jax
import numpy as np
import pytest
from nt_predict import Gaussian, gp_inference, gradient_descent_mse_ensemble

pytestmark = pytest.mark.usefixtures("x64")

Kernels = collections.namedtuple("Kernels", ["nngp", "ntk"])
RNG = np.random.default_rng(0)
X_TRAIN, X_TEST, Y = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 6)), RNG.normal(size=(4, 2))
NAMES = {id(X_TRAIN): "train", id(X_TEST): "test", id(None): None}
Call = collections.namedtuple("Call", ["x1", "x2", "get", "keywords"])


class Recorder:
    """A kernel function that remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x1, x2, get, **keywords):
        self.calls.append(Call(NAMES[id(x1)], NAMES[id(x2)], get, keywords))
        nngp = np.exp(x1 @ (x1 if x2 is None else x2).T / 6)
        kernels = Kernels(nngp, 2 * nngp**2)
        return getattr(kernels, get) if isinstance(get, str) else kernels

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def both(points, x2, **keywords):
    return Call(points, x2, ("nngp", "ntk"), keywords)


# Which kernels are computed


def test_train_train_kernels_are_computed_when_needed_and_once():
    kernel_fn = Recorder()
    predict_fn = gradient_descent_mse_ensemble(kernel_fn, X_TRAIN, Y)
    assert kernel_fn.take() == []
    predict_fn(1.0, X_TEST, "ntk")
    assert kernel_fn.take() == [Call("train", None, "ntk", {}), Call("test", "train", "ntk", {})]
    predict_fn(None, X_TEST, "ntk", compute_cov=True)  # starts with the covariance of the NNGP
    assert kernel_fn.take() == [
        Call("train", None, "nngp", {}),
        both("test", "train"),
        Call("test", None, "nngp", {}),
    ]
    predict_fn(np.ones(3), None, None, compute_cov=True)
    assert kernel_fn.take() == []
    predict_fn(None, X_TEST)
    assert kernel_fn.take() == [both("test", "train")]


def test_both_kernels_are_computed_together():
    kernel_fn = Recorder()
    predict_fn = gradient_descent_mse_ensemble(kernel_fn, X_TRAIN, Y)
    predict_fn(None, X_TEST, None, compute_cov=True)
    assert kernel_fn.take() == [both("train", None), both("test", "train"), Call("test", None, "nngp", {})]


def test_kernels_may_carry_more_than_what_was_asked_for():
    """As the Kernel of an infinite network, or the named tuple of an empirical one."""
    Kernel = collections.namedtuple("Kernel", ["cov1", "ntk", "nngp"])
    record = Recorder()

    def kernel_fn(x1, x2, get):
        kernels = record(x1, x2, ("nngp", "ntk"))
        return getattr(kernels, get) if isinstance(get, str) else Kernel(None, kernels.ntk, kernels.nngp)

    for get in (None, "ntk"):
        actual = gradient_descent_mse_ensemble(kernel_fn, X_TRAIN, Y)(1.0, X_TEST, get, True)
        expected = gradient_descent_mse_ensemble(Recorder(), X_TRAIN, Y)(1.0, X_TEST, get, True)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


# What is returned


def test_form_of_the_result():
    predict_fn = gradient_descent_mse_ensemble(Recorder(), X_TRAIN, Y)
    assert predict_fn(1.0, X_TEST, "ntk").shape == (3, 2)
    assert isinstance(predict_fn(1.0, X_TEST, "NTK", True), Gaussian)
    for get, fields in ((None, ("nngp", "ntk")), (("ntk",), ("ntk",)), (["NTK", "nngp"], ("ntk", "nngp"))):
        means = predict_fn(1.0, X_TEST, get)
        assert type(means).__name__ == "Gaussians"
        assert means._fields == fields
        gaussians = predict_fn(1.0, X_TEST, get, True)
        assert gaussians._fields == fields
        for name in fields:
            np.testing.assert_array_equal(getattr(gaussians, name).mean, getattr(means, name))
            assert getattr(gaussians, name).covariance.shape == (3, 3)
            one = predict_fn(1.0, X_TEST, name, True)
            np.testing.assert_allclose(one.mean, getattr(means, name), atol=1e-14)


def test_form_of_the_result_of_inference():
    kernel_fn, names = Recorder(), ("nngp", "ntk")
    train, test_train, test = (
        kernel_fn(X_TRAIN, None, names),
        kernel_fn(X_TEST, X_TRAIN, names),
        kernel_fn(X_TEST, None, names),
    )
    predict_fn = gp_inference(train, Y)
    assert predict_fn("ntk", test_train).shape == (3, 2)
    assert isinstance(predict_fn("nngp", test_train, test), Gaussian)
    three = predict_fn(("ntkgp", "NTK", "nngp"), test_train, test)
    assert three._fields == ("ntkgp", "ntk", "nngp")
    for name in three._fields:
        jax.tree.map(np.testing.assert_array_equal, getattr(three, name), predict_fn(name, test_train, test))
    # Test-test kernels may be the NNGP alone.
    jax.tree.map(np.testing.assert_array_equal, predict_fn("ntk", test_train, test.nngp), three.ntk)
    # An array serves for every prediction.
    of_array = gp_inference(train.nngp, Y)(None, test_train.nngp)
    np.testing.assert_array_equal(of_array.nngp, three.nngp.mean)
    np.testing.assert_array_equal(of_array.ntk, of_array.nngp)


@pytest.mark.parametrize("k_test_test", [True, np.eye(4)])
def test_inference_on_the_training_set_is_certain(k_test_test):
    train = Recorder()(X_TRAIN, None, ("nngp", "ntk"))
    predict_fn = gp_inference(train, Y, diag_reg=0.1)
    for name in ("nngp", "ntk", "ntkgp"):
        np.testing.assert_array_equal(predict_fn(name), Y)
        for certain in (predict_fn(name, None, k_test_test), predict_fn((name,), None, k_test_test)[0]):
            np.testing.assert_array_equal(certain.mean, Y)
            np.testing.assert_array_equal(certain.covariance, np.zeros((4, 4)))


# Keywords

A, B = np.arange(4), np.arange(3)


def keywords_of_calls(train, test):
    """Returns the keyword `k` in the train-train, test-train and test-test calls, "absent" where it is not passed."""
    kernel_fn = Recorder()
    predict_fn = gradient_descent_mse_ensemble(kernel_fn, X_TRAIN, Y, **train)
    predict_fn(1.0, X_TEST, "ntk", compute_cov=True, **test)
    return [call.keywords.get("k", "absent") for call in kernel_fn.take()]


@pytest.mark.parametrize(
    "train, test, expected",
    [
        ({}, {}, ["absent", "absent", "absent"]),
        # Values that are the same for all points, or that the test points inherit.
        ({"k": 3.0}, {}, [3.0, 3.0, 3.0]),
        ({"k": 3.0}, {"k": 3.0}, [3.0, 3.0, 3.0]),
        ({"k": A}, {}, [A, A, A]),
        ({"k": A}, {"k": A}, [A, A, A]),
        ({"k": A}, {"k": A.copy()}, [A, A, A]),
        ({"k": [{"w": A}, ()]}, {"k": [{"w": A.copy()}, ()]}, [[{"w": A}, ()]] * 3),
        # Arrays that belong to the points.
        ({"k": A}, {"k": B}, [A, (B, A), B]),
        ({"k": (A, A)}, {"k": (B, B)}, [(A, A), (B, A), (B, B)]),
        ({"k": (A, None)}, {"k": (B, None)}, [(A, None), (B, A), (B, None)]),
        ({"k": A}, {"k": (B, B)}, [A, (B, A), (B, B)]),
        # Given for the test points only.
        ({}, {"k": 3.0}, ["absent", 3.0, 3.0]),
        ({}, {"k": B}, ["absent", (B, None), B]),
        ({}, {"k": (B, B)}, ["absent", (B, None), (B, B)]),
        ({"k": None}, {"k": B}, [None, (B, None), B]),
    ],
)
def test_keywords(train, test, expected):
    actual = keywords_of_calls(train, test)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for first, second in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert first is second or np.array_equal(first, second)


@pytest.mark.parametrize(
    "train, test",
    [
        (3.0, 4.0),
        (3.0, None),
        ("a", "b"),
        (A, 3.0),
        (3.0, B),
        ([A], [B]),
        ({"w": A}, {"w": A + 1}),
        ((A, A, A), (B, B, B)),
    ],
)
def test_other_keywords_must_be_the_same(train, test):
    with pytest.raises(ValueError, match="keyword `k` of `kernel_fn` must be the same"):
        keywords_of_calls({"k": train}, {"k": test})


def test_keywords_may_be_keys():
    keys = jax.random.key(0), jax.random.key(1)
    _, (first, second), test = keywords_of_calls({"k": keys[0]}, {"k": keys[1]})
    assert (first, second, test) == (keys[1], keys[0], keys[1])
    assert keywords_of_calls({"k": keys[0]}, {"k": jax.random.key(0)})[1] == keys[0]


def test_keywords_may_be_traced():
    @jax.jit
    def predict(train, test):
        actual = keywords_of_calls({"k": train}, {"k": test})
        assert (actual[0] is train, actual[1][0] is test, actual[1][1] is train, actual[2] is test) == (True,) * 4
        assert keywords_of_calls({"k": train}, {"k": train})[1] is train
        return 0

    predict(A, B)


def test_keywords_of_the_test_points_do_not_matter_to_the_training_points():
    kernel_fn = Recorder()
    predict_fn = gradient_descent_mse_ensemble(kernel_fn, X_TRAIN, Y, k=A)
    predict_fn(1.0, None, None, True, k=B)
    assert kernel_fn.take() == [both("train", None, k=A)]
