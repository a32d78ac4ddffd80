"""An instrument: where inside a network two backends part."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax import Array

from nt_core import backends
from nt_core.backends import Request
from nt_core.get import Get
from nt_core.kernel import Kernel
from nt_core.layer import kernel_fields, request_for, rules_of
from nt_core.masks import get_masked_array
from nt_core.program import Program, prune
from nt_core.requirements import in_series, resolve
from nt_core.rules import Run, Segment, first_segment
from nt_core.sources import Source, make_inputs
from nt_core.trees import nt_tree_map

_COVARIANCES = ("nngp", "ntk", "cov1", "cov2")


@dataclasses.dataclass(frozen=True)
class Difference:
    """An entry in which two backends differ.

    Attributes:
      program: number of the program, from 1, as `explain` counts them.
      value: number of the value in it.
      step: the line of the program that makes the value.
      field: 'nngp', 'ntk', 'cov1' or 'cov2'.
      index: of the entry.
      entries: what the two backends have there.
      relative: their difference, divided by the largest entry of the whole array.
    """

    program: int
    value: int
    step: str
    field: str
    index: tuple[int, ...]
    entries: tuple[float, float]
    relative: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` has found; printed, a report.

    Attributes:
      implementations: the names of the two backends.
      tolerance: the relative difference that was tolerated.
      n_values: number of values that were compared.
      difference: the first value that differs by more, at its largest difference; None if there is none.
      refusals: lines that say which values a backend does not take, and why.
    """

    implementations: tuple[str, str]
    tolerance: float
    n_values: int
    difference: Difference | None
    refusals: tuple[str, ...]

    def __str__(self) -> str:
        first, second = self.implementations
        lines = [f"{first} and {second}: no difference above {self.tolerance} in {self.n_values} values"]
        if self.difference is not None:
            d = self.difference
            lines = [
                f"{first} and {second} differ first in program {d.program}, at {d.step}",
                f"  {d.field}{list(d.index)} is {d.entries[0]} on {first} and {d.entries[1]} on {second}:",
                f"  a difference of {d.relative:.1e} of the largest entry of {d.field}",
            ]
        return "\n".join([*lines, *(f"  ({refusal})" for refusal in self.refusals)])


def compare(
    kernel_fn: Callable[..., Any],
    x1: Any,
    x2: Any = None,
    implementations: tuple[str, str] = ("cpu", "xla"),
    *,
    get: Get = None,
    mask_constant: float | None = None,
    tolerance: float = 1e-5,
) -> Comparison:
    """Finds the first value inside a network in which two backends differ.

    Every value of every program, in order, is computed by both backends, as the result of a program that ends there:
    the covariance after each step, that is. It takes as many compilations as there are values, on each backend; use a
    few small inputs. Between programs, what the second backend has computed is carried on.

    Args:
      kernel_fn: of a layer or network.
      x1, x2: inputs, as for `kernel_fn`.
      implementations: names of two backends.
      get: what is compared, as for `kernel_fn`; by default everything.
      mask_constant: as for `kernel_fn`.
      tolerance: differences of two entries, divided by the largest entry of the array, that are none.

    >>> import jax.numpy as jnp
    >>> from nt_core import compare, make_kernel_fn, step_rule, steps
    >>> kernel_fn = make_kernel_fn((step_rule(steps.Dense(2.0, None, 16)), step_rule(steps.Dense(1.0, None, 16))))
    >>> print(compare(kernel_fn, jnp.ones((2, 3)), None, ("xla", "xla")))
    xla and xla: no difference above 1e-05 in 3 values
    """
    rules = rules_of(kernel_fn)
    layout = resolve(in_series(*(rule.requirements for rule in rules)))
    x2 = nt_tree_map(lambda _: None, x1) if x2 is None else x2
    masked1, masked2 = (nt_tree_map(lambda x: get_masked_array(x, mask_constant), x) for x in (x1, x2))
    state = nt_tree_map(lambda a, b: make_inputs(a, b, layout), masked1, masked2)
    run = Run(request_for(kernel_fields(get)), implementations[1], {"pattern": None})
    n_programs, n_values = 0, 0
    refusals: dict[str, None] = {}
    while rules:
        segment, rules = first_segment(rules, state, run)
        n_programs += 1
        for value, step, first, second in _values(segment, implementations, refusals):
            n_values += 1
            field, index, entries, relative = _largest_difference(first, second)
            if relative > tolerance:
                found = Difference(n_programs, value, step, field, index, entries, relative)
                return Comparison(implementations, tolerance, n_values, found, tuple(refusals))
        state = segment.apply()
    return Comparison(implementations, tolerance, n_values, None, tuple(refusals))


def _values(
    segment: Segment, implementations: tuple[str, str], refusals: dict[str, None]
) -> Iterator[tuple[int, str, Kernel, Kernel]]:
    """Computes the values that both backends take, in order. Appends why one does not take a value to `refusals`."""
    if segment.collected is None:  # a function of kernels, which has no backend
        return
    program, sources, request = segment.collected.program, segment.sources, segment.run.request
    for value, step in enumerate(str(program).splitlines()[: program.n_values]):
        until_here = prune(Program(program.sources, program.nodes, (value,)))
        refused = [_refusal(until_here, sources, request, name) for name in implementations]
        refusals.update({reason: None for reason in refused if reason is not None})
        if refused == [None, None]:
            (first,), (second,) = (
                backends.propagate(until_here, sources, request, implementation) for implementation in implementations
            )
            yield value, step, first, second


def _refusal(program: Program, sources: tuple[Source, ...], request: Request, implementation: str) -> str | None:
    try:
        backends.choose(program, sources, request, implementation)
    except NotImplementedError as error:
        return str(error)
    return None


def _largest_difference(first: Kernel, second: Kernel) -> tuple[str, tuple[int, ...], tuple[float, float], float]:
    """Returns the field, index, entries and relative difference where two kernels differ most."""
    differences = [(name, *_difference(getattr(first, name), getattr(second, name))) for name in _COVARIANCES]
    return max(differences, key=lambda difference: difference[-1])


def _difference(first: Array | None, second: Array | None) -> tuple[tuple[int, ...], tuple[float, float], float]:
    """Returns where two arrays differ most, their entries, and the difference relative to the largest entry."""
    if first is None and second is None:
        return (), (0.0, 0.0), 0.0
    # Of two kernels of which one is missing, or NaN, the difference is infinite.
    a, b = np.broadcast_arrays(*(np.asarray(np.nan if k is None else k, float) for k in (first, second)))
    scale = max(np.max(np.abs(k), initial=0, where=np.isfinite(k)) for k in (a, b))
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(equal, 0, np.abs(a - b) / scale)
    relative = np.where(np.isnan(relative), np.inf, relative)
    index = np.unravel_index(np.argmax(relative), relative.shape)
    return tuple(int(i) for i in index), (float(a[index]), float(b[index])), float(relative[index])
