"""Values of neural_tangents 0.6.5, in float64."""

import collections
import json
import pathlib

import nt_predict
import numpy as np
import pytest

DATA = pathlib.Path(__file__).parent / "data"
CASES = json.loads((DATA / "predict_reference.json").read_text())
VALUES = np.load(DATA / "predict_reference.npz")
TIMES = {"t0": 0.0, "t1": 1.7, "tvec": np.array([0.0, 0.3, 2.0, 50.0]), "inf": None}
Kernels = collections.namedtuple("Kernels", ["nngp", "ntk"])

pytestmark = pytest.mark.usefixtures("x64")


def cases(function):
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in CASES if c["fn"] == function])


def value(case, name):
    return VALUES[f"{case['id']}/{name}"]


def regularisation(case):
    return {name: case[name] for name in ("diag_reg", "diag_reg_absolute_scale")}


def assert_matches(actual, case, name):
    expected = value(case, f"out/{name}")
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8 * np.abs(expected).max(initial=1e-30))


@pytest.mark.sample(8)
@cases("gradient_descent_mse")
@pytest.mark.parametrize("name", TIMES)
def test_gradient_descent_mse(case, name):
    predict_fn = nt_predict.gradient_descent_mse(
        value(case, "k_train_train"),
        value(case, "y_train"),
        case["learning_rate"],
        trace_axes=case["trace_axes"],
        **regularisation(case),
    )
    train, test = predict_fn(
        TIMES[name], value(case, "fx_train_0"), value(case, "fx_test_0"), value(case, "k_test_train")
    )
    assert_matches(train, case, f"{name}_train")
    assert_matches(test, case, f"{name}_test")


@cases("gp_inference")
@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_gp_inference(case, kind):
    train_train = Kernels(value(case, "k_train_train_nngp"), value(case, "k_train_train"))
    test_train = Kernels(value(case, "k_test_train_nngp"), value(case, "k_test_train"))
    test_test = value(case, "k_test_test_nngp")
    predict_fn = nt_predict.gp_inference(train_train, value(case, "y_train"), **regularisation(case))
    mean, covariance = predict_fn(kind, test_train, test_test)
    assert_matches(mean, case, f"{kind}_mean")
    assert_matches(covariance, case, f"{kind}_cov")
    assert_matches(predict_fn(kind, test_train), case, f"{kind}_meanonly")
    np.testing.assert_array_equal(predict_fn(kind, test_train, Kernels(test_test, None)).covariance, covariance)


@cases("max_learning_rate")
def test_max_learning_rate(case):
    kernel = value(case, "k_train_train")
    assert_matches(nt_predict.max_learning_rate(kernel, case["y_train_size"], case["momentum"]), case, "lr")
