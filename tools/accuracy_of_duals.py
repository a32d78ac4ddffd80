"""Prints the tables of docs/numerics.md: largest errors of activations, in units of the machine epsilon.

    .venv/bin/python tools/accuracy_of_duals.py [POINTS]

Random points: variances over six orders of magnitude, deficits relative to the variance from 1e-12 to 1, equal and
nearly equal variances. The closed forms in 50 digits are those of the tests of nt-core.
"""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "packages" / "nt-core" / "tests"))
from closed_forms import CLOSED_FORMS, equal, exact_dual, nearly_equal, samples
from nt_core import _native
from nt_core.backends.cpu.duals import encode_activation

DTYPES = ("float32", "float64")


def in_jax(activation, arguments, dtype):
    """Returns the variance, the deficit and the factor of the `xla` backend."""
    arguments = [jnp.asarray(x, dtype) for x in arguments]
    return activation.variance(arguments[0]), *activation.dual(*arguments)


def in_cpp(activation, arguments, dtype):
    """Returns those of the `cpu` backend, at the best instruction set of this machine."""
    number, coefficients = encode_activation(activation, dtype)
    return _native.dual(number, np.array(coefficients, dtype), *(np.asarray(x, dtype) for x in arguments))


def largest_errors(implementation, name, dtype, n):
    """Returns the largest errors of the deficit, the factor and the variance."""
    activation, form, max_variance = CLOSED_FORMS[name]
    worst = [0.0, 0.0, 0.0]
    for variance_ratio in (equal, nearly_equal):
        arguments = samples(n // 2, dtype, max_variance, variance_ratio, [1])
        variance, deficit, factor = (np.asarray(x) for x in implementation(activation, arguments, dtype))
        for i, row in enumerate(zip(*arguments, strict=True)):
            exact_deficit, exact_factor = exact_dual(form, *row)
            with mp.workdps(50):
                own, own_factor = form(*[mp.mpf(float(row[0]))] * 3)
                has_scale = variance_ratio is equal and own_factor != 0  # the factor of a step is 0
                errors = [
                    abs(mp.mpf(float(deficit[i])) / exact_deficit - 1),
                    abs(mp.mpf(float(factor[i])) - exact_factor) / own_factor if has_scale else 0,
                    abs(mp.mpf(float(variance[i])) / own - 1),
                ]
            worst = [max(w, float(e)) for w, e in zip(worst, errors, strict=True)]
    return [w / np.finfo(dtype).eps for w in worst]


def main():
    """Prints one table for each backend."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    jax.config.update("jax_enable_x64", True)
    for title, implementation in (("xla", in_jax), ("cpu", in_cpp)):
        print(
            f"| {title} | largest variance | D', f32 | factor, f32 | variance, f32 "
            "| D', f64 | factor, f64 | variance, f64 |"
        )
        print("|" + "---|" * 8)
        for name, (_, _, max_variance) in CLOSED_FORMS.items():
            cells = [e for dtype in DTYPES for e in largest_errors(implementation, name, dtype, n)]
            print(f"| {name} | 1e{round(math.log10(max_variance))} | " + " | ".join(f"{c:.1f}" for c in cells) + " |")
        print()


if __name__ == "__main__":
    main()
