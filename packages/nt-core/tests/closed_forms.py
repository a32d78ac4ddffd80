"""Duals of activations in closed form, in 50 digits, and the arguments at which implementations are judged by them."""

import mpmath as mp
import numpy as np
from nt_core.activations import (
    ABRelu,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Hermite,
    Monomial,
    Polynomial,
    Rbf,
    RectifiedMonomial,
    Sin,
    Step,
)


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


def scaled(b, form):
    """The closed form of `f(b x)`."""

    def scaled_form(covariance, var1, var2):
        value, dot = form(*(mp.mpf(b) ** 2 * x for x in (covariance, var1, var2)))
        return value, mp.mpf(b) ** 2 * dot

    return scaled_form


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


def exp_normalized_form(gamma, shift):
    def form(covariance, var1, var2):
        scale = mp.sqrt(var1 * var2)
        value = mp.exp(gamma * (covariance / scale + shift))
        return scale * value, gamma * value

    return form


def sign_form(covariance, var1, var2):
    return 1 - 2 * mp.acos(covariance / mp.sqrt(var1 * var2)) / mp.pi, mp.mpf(0)


def gaussian_form(b):
    def form(covariance, var1, var2):
        det = (1 - 2 * b * var1) * (1 - 2 * b * var2) - 4 * b * b * covariance**2
        return 1 / mp.sqrt(det), 4 * b * b * covariance / det ** mp.mpf(1.5)

    return form


def gabor_form(covariance, var1, var2):
    """`f` is the imaginary part of `exp(i x - x^2)`: integrals of Gaussians, and their derivatives in the waves."""
    det = (1 + 2 * var1) * (1 + 2 * var2) - 4 * covariance**2

    def wave(sign):  # E exp(-u^2 - v^2) cos(u + sign v), and the same times 4 u v, by inverses of 2 x 2 matrices
        a, b, c = (
            (var1 + 2 * (var1 * var2 - covariance**2)) / det,
            (var2 + 2 * (var1 * var2 - covariance**2)) / det,
            covariance / det,
        )
        return mp.exp(-(a + b + 2 * sign * c) / 2) / mp.sqrt(det), a, b, c

    near, a, b, c = wave(-1)
    far = wave(1)[0]
    # f' = exp(-x^2) (cos x - 2 x sin x); means of products of u, v under the wave exp(i u + i s v) by their shifts.
    slope = 0
    for sign, mean in ((-1, near), (1, far)):
        u, v = 1j * (a + sign * c), 1j * (c + sign * b)
        # f(u) f(v) is the sum over s of -s/2 Re exp(i u + i s v), and f' has i s1 - 2 x for each factor.
        slope += -sign * mean / 2 * ((1j - 2 * u) * (1j * sign - 2 * v) + 4 * c)
    return (near - far) / 2, mp.re(slope)


def polynomial_form(*coefficients):
    """By moments: `E u^i v^j` is the sum over the number of pairs `(u, v)`."""

    def moment(i, j, covariance, var1, var2):
        total = mp.mpf(0)
        for n in range(i % 2, min(i, j) + 1, 2):
            if (i - n) % 2 or (j - n) % 2:
                continue
            ways = mp.binomial(i, n) * mp.binomial(j, n) * mp.factorial(n) * mp.fac2(i - n - 1) * mp.fac2(j - n - 1)
            total += ways * covariance**n * var1 ** ((i - n) // 2) * var2 ** ((j - n) // 2)
        return total

    def mean(coefficients, *moments):
        pairs = [(i, a, j, b) for i, a in enumerate(coefficients) for j, b in enumerate(coefficients)]
        return sum(mp.mpf(a) * mp.mpf(b) * moment(i, j, *moments) for i, a, j, b in pairs)

    derivative = [i * c for i, c in enumerate(coefficients)][1:]
    return lambda *moments: (mean(coefficients, *moments), mean(derivative, *moments))


def power_form(degree):
    return lambda covariance, var1, var2: (covariance**degree, degree * covariance ** (degree - 1))


def rectified_form(degree):
    """Cho & Saul, 2009: `J_n = (-1)^n sin^(2 n + 1) ((1/sin) d/dt)^n ((pi - t)/sin t)` for degrees up to 3."""

    def angular(n, t):
        sin, cos = mp.sin(t), mp.cos(t)
        return [
            mp.pi - t,
            sin + (mp.pi - t) * cos,
            3 * sin * cos + (mp.pi - t) * (1 + 2 * cos**2),
            (4 + 11 * cos**2) * sin + (mp.pi - t) * (9 * cos + 6 * cos**3),
        ][n]

    def form(covariance, var1, var2):
        scale = mp.sqrt(var1 * var2)
        angle = mp.acos(covariance / scale)
        value, dot = (scale**n / (2 * mp.pi) * angular(n, angle) for n in (degree, degree - 1))
        return value, degree**2 * dot

    return form


# The activation, its closed form (E f(u) f(v), E f'(u) f'(v)), the largest variance.
CLOSED_FORMS = {
    "relu": (ABRelu(0.0, 1.0), relu_form(0, 1), 1e6),
    "abs": (ABRelu(-1.0, 1.0), relu_form(-1, 1), 1e6),
    "leaky": (ABRelu(0.25, 1.0), relu_form(0.25, 1), 1e6),
    "erf": (Erf(1.0, 1.0, 0.0), erf_form, 1e2),
    "erf of a multiple": (Erf(1.0, 1.25, 0.0), scaled(1.25, erf_form), 1e2),
    "gelu": (Gelu(), gelu_form, 1e6),
    "sin": (Sin(1.0, 1.0, 0.0), sin_form(0), 1e2),
    "sin with a phase": (Sin(1.0, 1.0, 0.25), sin_form(mp.mpf(0.25)), 1e2),
    "sin of a multiple": (Sin(1.0, 1.25, 0.0), scaled(1.25, sin_form(0)), 1e2),
    "rbf": (Rbf(1.0), rbf_form, 1e2),
    "exp": (Exp(1.0, 1.0), exp_form, 1.0),
    "exp of a multiple": (Exp(1.0, 0.625), scaled(0.625, exp_form), 1.0),
    "exp normalized": (ExpNormalized(1.0, -0.5), exp_normalized_form(1, mp.mpf(-0.5)), 1e6),
    "sign": (Step(-1.0, 1.0, 0.0), sign_form, 1e6),
    "gaussian": (Gaussian(1.0, -1.0), gaussian_form(-1), 1e2),
    "gaussian that grows": (Gaussian(1.0, 0.046875), gaussian_form(mp.mpf(0.046875)), 1.0),
    "gabor": (Gabor(), gabor_form, 1e2),
    "monomial": (Monomial(3), polynomial_form(0, 0, 0, 1), 1e2),
    "polynomial": (Polynomial((0.5, 1.0, 0.25, 0.5)), polynomial_form(0.5, 1, 0.25, 0.5), 1e2),
    "hermite": (Hermite(3), power_form(3), 1e2),
    "rectified square": (RectifiedMonomial(2), rectified_form(2), 1e2),
    "rectified cube": (RectifiedMonomial(3), rectified_form(3), 1e2),
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
