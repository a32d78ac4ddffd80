"""Duals of activations in closed form, in 50 digits, and the arguments at which implementations are judged by them."""

import mpmath as mp
import numpy as np
from nt_core.activations import ABRelu, Erf, Exp, Gelu, Rbf, Sin


def relu_form(a, b):
    def form(covariance, var1, var2):
        scale = mp.sqrt(var1 * var2)
        angle = mp.acos(covariance / scale)
        kink = mp.mpf(a - b) ** 2 / (2 * mp.pi)
        dot = mp.mpf(a * a + b * b) / 2 - kink * angle
        return kink * scale * mp.sin(angle) + dot * covariance, dot

    return form


def erf_form(covariance, var1, var2):
    leg = mp.sqrt((1 + 2 * var1) * (1 + 2 * var2) - 4 * covariance**2)
    return 2 / mp.pi * mp.atan2(2 * covariance, leg), 4 / mp.pi / leg


def sin_form(phase):
    def form(covariance, var1, var2):
        near = mp.exp(covariance - (var1 + var2) / 2)
        far = mp.cos(2 * phase) * mp.exp(-covariance - (var1 + var2) / 2)
        return (near - far) / 2, (near + far) / 2

    return form


def rbf_form(covariance, var1, var2):
    value = mp.exp(2 * covariance - var1 - var2)
    return value, 2 * value


def gelu_form(covariance, var1, var2):
    norms = (1 + var1) * (1 + var2)
    leg = mp.sqrt(norms - covariance**2)
    angle = mp.atan2(covariance, leg)
    rational = (covariance**2 + var1 * var2 * leg**2) / (norms * leg)
    slope = covariance / leg * (1 / leg**2 + (1 - var1 * var2) / norms + 1)
    quarter = mp.mpf(1) / 4
    return (
        covariance * quarter + (rational + covariance * angle) / (2 * mp.pi),
        quarter + (angle + slope) / (2 * mp.pi),
    )


def exp_form(covariance, var1, var2):
    value = mp.exp((var1 + var2) / 2 + covariance)
    return value, value


# The activation, its closed form (E f(u) f(v), E f'(u) f'(v)), the largest variance.
CLOSED_FORMS = {
    "relu": (ABRelu(0.0, 1.0), relu_form(0, 1), 1e6),
    "abs": (ABRelu(-1.0, 1.0), relu_form(-1, 1), 1e6),
    "leaky": (ABRelu(0.25, 1.0), relu_form(0.25, 1), 1e6),
    "erf": (Erf(1.0, 1.0, 0.0), erf_form, 1e2),
    "gelu": (Gelu(), gelu_form, 1e6),
    "sin": (Sin(1.0, 1.0, 0.0), sin_form(0), 1e2),
    "sin with a phase": (Sin(1.0, 1.0, 0.25), sin_form(mp.mpf(0.25)), 1e2),
    "rbf": (Rbf(1.0), rbf_form, 1e2),
    "exp": (Exp(1.0, 1.0), exp_form, 1.0),
}


def exact_dual(form, var1, var2, deficit):
    """The deficit and the factor after an activation in 50 digits. Correlations beyond 1 or -1 are clipped."""
    with mp.workdps(50):
        var1, var2, deficit = (mp.mpf(float(x)) for x in (var1, var2, deficit))
        scale = mp.sqrt(var1 * var2)
        covariance = min(max((var1 + var2) / 2 - deficit, -scale), scale)
        value, dot = form(covariance, var1, var2)
        return (form(var1, var1, var1)[0] + form(var2, var2, var2)[0]) / 2 - value, dot


def samples(n, dtype, max_variance, variance_ratio, correlation_sides, seed=0):
    """Random variances and deficits, with deficits (of u against v or -v) over twelve orders of magnitude."""
    rng = np.random.default_rng(seed)
    relative = 10 ** rng.uniform(-12, 0, n)
    angular = np.where(rng.choice(correlation_sides, n) == 1, relative, 2 - relative)
    var1 = max_variance * 10 ** rng.uniform(-6, 0, n)
    var2 = np.minimum(var1 * variance_ratio(rng, relative), max_variance)
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * angular
    return tuple(x.astype(dtype) for x in (var1, var2, deficit))


def equal(rng, relative):
    return np.ones_like(relative)


def nearly_equal(rng, relative):
    return 1 + 0.3 * np.sqrt(relative) * rng.uniform(-1, 1, relative.size)


def any_ratio(rng, relative):
    return 10 ** rng.uniform(-6, 6, relative.size)


def check_backward_error(form, arguments, results, eps):
    """Checks that results are exact for arguments changed by 4 eps, but for 8 eps of their own variance or slope."""
    for i, row in enumerate(zip(*arguments, strict=True)):
        row = [float(x) for x in row]
        exact = exact_dual(form, *row)
        allowed = [8 * eps * sum(form(x, x, x)[j] for x in map(mp.mpf, row[:2])) / 2 for j in (0, 1)]
        for changed in range(3):
            moved = [
                exact_dual(form, *(x * (1 + change * (k == changed)) for k, x in enumerate(row)))
                for change in (-4 * eps, 4 * eps)
            ]
            for j in (0, 1):
                allowed[j] += max(abs(m[j] - exact[j]) for m in moved)
        for j, result in enumerate(results):
            assert abs(result[i] - exact[j]) <= allowed[j], (row, result[i], exact[j])
