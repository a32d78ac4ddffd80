"""Says how the kernel of a network will be computed, without computing it."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from nt_core import backends
from nt_core.activations import ElementwiseNumerical
from nt_core.activations.coefficients import TracedFunction, number_of_terms
from nt_core.activations.tables import coefficient_table, share_beyond_terms
from nt_core.backends import Implementation, Request
from nt_core.get import Get
from nt_core.layer import kernel_fields, request_for, rules_of
from nt_core.program import Node, Program
from nt_core.requirements import in_series, resolve
from nt_core.rules import Run, Segment, first_segment, materialise
from nt_core.sources import Source, make_inputs
from nt_core.spec import Spec
from nt_core.steps import Conv, Dual, Normalize, Pool
from nt_core.trees import nt_tree_map

# Floating point operations for one entry of a covariance and of its tangent kernel, roughly: a square root, two
# polynomials of degrees 7 and 6, and what is around them.
_OPERATIONS_OF_DUAL = 40
_OPERATIONS_OF_SCALING = 4
# At which it is said how much of a function is beyond its Hermite coefficients.
_VARIANCES = (1.0, 10.0)
# Where functions of the user are in memory: another place in every process.
_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")


def explain(
    kernel_fn: Callable[..., Any],
    shape1: Any,
    shape2: Any = None,
    get: Get = ("nngp", "ntk"),
    implementation: Implementation = None,
) -> str:
    """Returns the plan for a kernel: its programs, the backend of each and why, and estimates of work and memory.

    Of programs that JAX does not differentiate by itself it says whose derivatives they have. Of activations by Hermite
    coefficients it says how many there are, at two variances the share of the mean square that is beyond them, and from
    which variance on orders beyond them are added up in groups.

    Args:
      kernel_fn: of a layer or network; made by `batch`, its cells and devices are described too.
      shape1, shape2: shapes of the inputs (or nested lists of shapes); `shape2=None` for `x2=None`.
      get: as for `kernel_fn`.
      implementation: as for `kernel_fn`.

    >>> from nt_core import Rule, explain, make_kernel_fn, step_rule, steps
    >>> kernel_fn = make_kernel_fn((step_rule(steps.Dense(2.0, None, 16)),))
    >>> print(explain(kernel_fn, (4, 3), implementation="xla"))
    inputs (4, 3), kernel of the batch with itself, nngp and ntk
    program 1, on xla
      %0 = source (4, 3) x (4, 3)
      %1 = Dense(w_var=2.0, b_var=None, out_dim=16)(%0) (4, 16) x (4, 16)
      return %1
      about 64 operations, 128 bytes of results in float32
    """
    batching = getattr(kernel_fn, "batching", None)
    rules = rules_of(inspect.unwrap(kernel_fn, stop=lambda fn: not hasattr(fn, "batching")))
    names = kernel_fields(get)
    last = request_for(names)
    layout = resolve(in_series(*(rule.requirements for rule in rules)))
    lines = [
        f"inputs {shape1}, {'kernel of the batch with itself' if shape2 is None else f'with {shape2}'}, "
        + " and ".join(n for n in ("nngp", "ntk", "cov1", "cov2") if names is None or n in names)
    ]

    def trace(x1: Any, x2: Any) -> Any:
        x2 = nt_tree_map(lambda _: None, x1) if x2 is None else x2
        state = nt_tree_map(lambda a, b: make_inputs(a, b, layout), x1, x2)
        rest, n_segments = rules, 0
        while rest:
            segment, rest = first_segment(rest, state, Run(last, implementation, {"pattern": None}))
            n_segments += 1
            lines.extend(_describe(segment, f"program {n_segments}"))
            state = segment.apply()
        return nt_tree_map(materialise, state)

    if batching is not None:
        shapes = (shape1, shape1 if shape2 is None else shape2)
        n1, n2 = (_first_shape(shape)[layout["batch_axis"]] for shape in shapes)
        lines.append(f"for all samples at once; cell by cell it is {batching.describe(n1, n2, shape2 is None)}")
    arrays1 = _abstract(shape1)
    jax.eval_shape(trace, arrays1, None if shape2 is None else _abstract(shape2))
    return "\n".join(lines)


def _describe(segment: Segment, title: str) -> list[str]:
    if segment.collected is None:
        return [f"{title}: {segment.rules[0].name}, a function of materialised kernels"]
    program, request = segment.collected.program, segment.run.request
    backend, refusals = backends.choose(program, segment.sources, request, segment.run.implementation)
    return [
        f"{title}, on {backend.name}",
        *(f"  ({name} refuses: {reason})" for name, reason in refusals.items()),
        *(f"  {line}" for line in _ADDRESS.sub("", str(program)).splitlines()),
        *(f"  {line}" for line in _series(program, getattr(backend, "has_groups", True))),
        *(f"  derivatives: {line}" for line in _derivatives(backend, program, segment.sources, request)),
        f"  {_estimate(program, request)}",
    ]


def _derivatives(
    backend: backends.Backend, program: Program, sources: tuple[Source, ...], request: Request
) -> list[str]:
    derivatives = getattr(backend, "derivatives", None)
    return [] if derivatives is None else [derivatives(program, sources, request)]


def _series(program: Program, has_groups: bool) -> list[str]:
    """What activations by Hermite coefficients add up, and what is beyond that."""
    numbers: dict[ElementwiseNumerical, list[str]] = {}
    for number, node in enumerate(program.nodes, len(program.sources)):
        if isinstance(node.step, Dual) and isinstance(node.step.activation, ElementwiseNumerical):
            numbers.setdefault(node.step.activation, []).append(f"%{number}")
    return [f"{', '.join(values)}: {_series_of(activation, has_groups)}" for activation, values in numbers.items()]


def _series_of(activation: ElementwiseNumerical, has_groups: bool) -> str:
    terms = f"{number_of_terms(activation.deg)} Hermite coefficients"
    try:
        shares = share_beyond_terms(activation, _VARIANCES)
    except TracedFunction:
        return f"{terms} of a function of traced values"
    known = (f"{share:.0e} at variance {var:g}" for share, var in zip(shares, _VARIANCES, strict=True))
    rest = f"{terms}, the rest of the mean square ({', '.join(known)}) as a power of the order"
    table = coefficient_table(activation, jax.dtypes.canonicalize_dtype(float).name)
    if table.groups == 0 or not has_groups:
        return rest
    least, last = f"{table.least_variance_of_groups:g}", table.end_of_groups - 1
    return f"{rest}; from a variance of {least} on, the orders up to {last} in {table.groups} groups"


def operations(program: Program, request: Request) -> int:
    """Estimates the floating point operations of a program, for all pairs of samples."""
    tangents = 2 if request.ntk else 1
    return sum(_operations_per_pair(program, node) * tangents for node in program.nodes) * _n_pairs(program.sources[0])


def _operations_per_pair(program: Program, node: Node) -> int:
    spec = program.spec(node.inputs[0])
    entries = _entries(spec)
    match node.step:
        case Dual():
            return entries * _OPERATIONS_OF_DUAL // 2
        case Conv() | Pool():
            return entries * (sum(node.step.window) + 1)
        case Normalize():
            return entries * _OPERATIONS_OF_SCALING
    return entries * 2 * len(node.inputs)


def _estimate(program: Program, request: Request) -> str:
    dtype = jax.dtypes.canonicalize_dtype(float)
    results = sum(_entries(program.spec(i)) for i in program.outputs) * _n_pairs(program.sources[0])
    n_bytes = results * dtype.itemsize * (2 if request.ntk else 1)
    return f"about {operations(program, request):,} operations, {n_bytes:,} bytes of results in {dtype.name}"


def _entries(spec: Spec) -> int:
    """Pairs of positions of one pair of samples."""
    return math.prod(spec.space) ** (1 if spec.diagonal_spatial else 2)


def _n_pairs(spec: Spec) -> int:
    return spec.n1 * spec.n2


def _first_shape(shape: Any) -> Any:
    return shape if all(isinstance(n, int) for n in shape) else _first_shape(shape[0])


def _abstract(shape: Any) -> Any:
    if all(isinstance(n, int) for n in shape):
        return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(float))
    return type(shape)(_abstract(s) for s in shape)
