"""The nonlinearities of the native engine by themselves, against closed forms in 50 digits over the whole range."""

import mpmath as mp
import numpy as np
import pytest
from closed_forms import CLOSED_FORMS, any_ratio, check_backward_error, equal, exact_dual, nearly_equal, samples
from nt_core import _native
from nt_core.backends.cpu.duals import encode_activation

LEVELS = ["baseline", "avx2", "avx512"]  # those that the machine does not have are the best one that it has


@pytest.fixture(params=LEVELS)
def level(request):
    _native.choose_level(request.param)
    yield
    _native.choose_level("")


def native_dual(name, arguments, dtype):
    """Returns the variance, the deficit and the factor after an activation."""
    number, coefficients = encode_activation(CLOSED_FORMS[name][0])
    return _native.dual(number, np.array(coefficients, dtype), *(np.asarray(x, dtype) for x in arguments))


each_closed_form = pytest.mark.parametrize("name", CLOSED_FORMS)


@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal])
def test_nearly_equal_inputs_keep_the_relative_accuracy_of_the_deficit(name, variance_ratio, dtype, level):
    _, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(100, dtype, max_variance, variance_ratio, [1])
    _, deficit, _ = native_dual(name, arguments, dtype)
    exact = [exact_dual(form, *row)[0] for row in zip(*arguments, strict=True)]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(deficit, exact, strict=True)]
    assert max(errors) < 8 * np.finfo(dtype).eps


@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal, any_ratio])
def test_dual_is_exact_for_inputs_changed_in_the_last_places(name, variance_ratio, dtype):
    """No formula can do better, but for a rounding error in proportion to the result's own variance or slope."""
    _, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(40, dtype, max_variance, variance_ratio, [1, -1], seed=1)
    results = [np.asarray(x, np.float64) for x in native_dual(name, arguments, dtype)[1:]]
    check_backward_error(form, arguments, results, float(np.finfo(dtype).eps))


@each_closed_form
def test_variance_is_accurate(name, dtype, level):
    _, form, max_variance = CLOSED_FORMS[name]
    var = (max_variance * 10 ** np.random.default_rng(2).uniform(-12, 0, 100)).astype(dtype)
    variance, _, _ = native_dual(name, (var, var, np.zeros_like(var)), dtype)
    with mp.workdps(50):
        exact = [form(x, x, x)[0] for x in map(mp.mpf, map(float, var))]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(variance, exact, strict=True)]
    assert max(errors) < 4 * np.finfo(dtype).eps


@each_closed_form
def test_equal_inputs_have_exactly_no_deficit(name, dtype, level):
    var = np.array([0.0, 1e-12, 0.1, 1.0, 3.7], dtype)
    np.testing.assert_array_equal(native_dual(name, (var, var, np.zeros_like(var)), dtype)[1], 0)


@each_closed_form
def test_nan_stays_nan(name, dtype, level):
    one, bad = np.ones(1, dtype), np.full(1, np.nan, dtype)
    for arguments in ((bad, one, bad), (one, bad, bad)):
        assert np.isnan(native_dual(name, arguments, dtype)[1])
