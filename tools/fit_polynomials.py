"""Fits the polynomials behind the duals of the ReLU family and of error functions, and prints them as source code.

    python tools/fit_polynomials.py [python|c++]

In Python those of polynomials.py, in C++ those of relu_polynomials.h and of arc_polynomials.h.

With w = 1 - |c| for a correlation c, the two functions that the arc-cosine kernels (Cho & Saul, 2009) need at negative
correlations are

    arccos(1 - w) / pi                                     = w^(1/2) P(w),
    (sqrt(w (2 - w)) - (1 - w) arccos(1 - w)) / pi         = w^(3/2) Q(w),

with P and Q analytic for |w| < 2. Error functions on CPU need, of an angle t in [0, pi/2] and of one in [0, pi/4],

    t / sin t = 1 + (1 - cos t) turn(1 - cos t),           t / sin t = arcsine(sin(t)^2).

The complementary error function is, on GPUs and TPUs, which have none,

    erfc(x) = exp(-x^2) t erfc(t),    t = 1 / (1 + x/2).

All are interpolated at Chebyshev nodes (on [0, 1], those of `arcsine` on [0, 1/2]) in 60 digits, and the printed error
is the largest relative one on a fine grid, of the polynomial itself ("fit") and of its evaluation in that precision.
Needs mpmath and numpy.
"""

import sys

import mpmath as mp
import numpy as np

# The relative errors of the fits are below half a unit in the last place, 6.0e-8 and 1.1e-16; only those of `turn` and
# `arcsine` in float32 are up to 1.3e-7: `turn` stands beside 1, and the term of `arcsine` is small where the variances
# differ little.
DEGREES = {
    "float32": {"P": 7, "Q": 6, "turn": 8, "arcsine": 6, "erfc": 10},
    "float64": {"P": 18, "Q": 17, "turn": 20, "arcsine": 18},
}


def _p(w):
    return mp.sqrt(2) / mp.pi if w == 0 else mp.acos(1 - w) / (mp.pi * mp.sqrt(w))


def _q(w):
    if w == 0:
        return 2 * mp.sqrt(2) / (3 * mp.pi)
    return (mp.sqrt(w * (2 - w)) - (1 - w) * mp.acos(1 - w)) / (mp.pi * w ** mp.mpf(1.5))


def _turn(w):
    return mp.mpf(1) / 3 if w == 0 else (mp.acos(1 - w) / mp.sqrt(w * (2 - w)) - 1) / w


def _arcsine(square):
    return mp.mpf(1) if square == 0 else mp.asin(mp.sqrt(square)) / mp.sqrt(square)


def _erfc(t):
    if t == 0:
        return 0.5 / mp.sqrt(mp.pi)
    x = 2 / mp.mpf(t) - 2
    return mp.exp(x * x) * mp.erfc(x) / t


# With the ends of the intervals.
FUNCTIONS = {"P": (_p, 1), "Q": (_q, 1), "turn": (_turn, 1), "arcsine": (_arcsine, 0.5), "erfc": (_erfc, 1)}
STRUCTS = {"ReluPolynomials": ("P", "Q"), "ArcPolynomials": ("turn", "arcsine")}


def _interpolate(f, end, degree):
    """Returns the coefficients, constant first, of the interpolant of `f` at the Chebyshev nodes of [0, end]."""
    nodes = [end * (1 - mp.cos(mp.pi * (2 * k + 1) / (2 * degree + 2))) / 2 for k in range(degree + 1)]
    vandermonde = mp.matrix(degree + 1, degree + 1)
    for i, node in enumerate(nodes):
        for j in range(degree + 1):
            vandermonde[i, j] = node**j
    return list(mp.lu_solve(vandermonde, mp.matrix([f(node) for node in nodes])))


def _horner(coefficients, w):
    value = np.full_like(w, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * w + w.dtype.type(c)
    return value


def _errors(f, end, coefficients, dtype):
    grid = np.linspace(0, end, 2001).astype(dtype)
    exact = [f(mp.mpf(float(w))) for w in grid]
    fit = max(
        abs(sum(c * mp.mpf(float(w)) ** k for k, c in enumerate(coefficients)) / e - 1)
        for w, e in zip(grid, exact, strict=True)
    )
    rounded = _horner([dtype(float(c)) for c in coefficients], grid)
    evaluated = max(abs(mp.mpf(float(v)) / e - 1) for v, e in zip(rounded, exact, strict=True))
    return f"fit {mp.nstr(fit, 2)}, evaluated {mp.nstr(evaluated, 2)}"


def _print_python(dtype, name, coefficients, note):
    print(f"# {dtype} {name}: {note}")
    print(f"{name.upper()}_{dtype.upper()} = (")
    for c in coefficients:
        print(f"    {float(c)!r},")
    print(")")


def _print_cpp(dtype, name, coefficients, note):
    scalar = {"float32": "float", "float64": "double"}[dtype]
    suffix = "f" if dtype == "float32" else ""
    print(f"  // {note}")
    print(f"  static constexpr {scalar} {name.lower()}[] = {{")
    for c in coefficients:
        print(f"      {float(c)!r}{suffix},")
    print("  };")


def _main():
    language = sys.argv[1] if len(sys.argv) > 1 else "python"
    if language not in ("python", "c++"):
        sys.exit(f"The language should be 'python' or 'c++', got {language!r}.")
    mp.mp.dps = 60
    for struct, names in STRUCTS.items() if language == "c++" else [(None, ("P", "Q", "erfc"))]:
        for dtype, scalar in (("float32", "float"), ("float64", "double")):
            if struct:
                print(f"template <>\nstruct {struct}<{scalar}> {{")
            for name in filter(DEGREES[dtype].get, names):
                f, end = FUNCTIONS[name]
                coefficients = _interpolate(f, end, DEGREES[dtype][name])
                note = _errors(f, end, coefficients, np.dtype(dtype).type)
                (_print_cpp if struct else _print_python)(dtype, name, coefficients, note)
            if struct:
                print("};")


if __name__ == "__main__":
    _main()
