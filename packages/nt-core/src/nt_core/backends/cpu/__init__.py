"""The native backend for CPUs: covariance programs in C++ (csrc), one XLA custom call for a program."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from nt_core.backends.base import Device, Refused, Request
from nt_core.backends.cpu import calls, native
from nt_core.backends.cpu.calls import Call
from nt_core.backends.cpu.encode import Encoded, encode
from nt_core.backends.cpu.linear import Linear, linear_call
from nt_core.backends.xla import XlaBackend
from nt_core.evaluation.samples import deficit_of_vectors, product_of_vectors
from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped, unzip_axes, zip_axes, zipped_diagonal
from nt_core.lowering import Form
from nt_core.program import Program
from nt_core.pytrees import replace_leaves
from nt_core.sources import Inputs, Source, dtype_of, is_symmetric, of_one_batch, same_batches
from nt_core.spec import Spec

_DTYPES = ("float32", "float64")


class CpuBackend:
    """Takes what docs/cpu-engine.md lists. Derivatives are native where it says so, elsewhere those of `xla`."""

    name = "cpu"

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request, device: Device) -> str | None:
        if device.platform != "cpu":
            return f"the device is a {device.platform}, not a CPU"
        dtypes = {dtype_of(source).name for source in sources}
        if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
            return f"it computes in float32 or float64, not in {', '.join(sorted(dtypes))}"
        reason = native.refusal()
        if reason is not None:
            return reason
        try:
            encode(program, sources, request)
        except Refused as refused:
            return str(refused)
        return None

    def derivatives(self, program: Program, sources: tuple[Source, ...], request: Request) -> str:
        reason = _refusal_of_derivative(program, sources, request)
        return "native" if reason is None else f"by xla. {reason}"

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        same = same_batches(sources)
        return tuple(
            Kernel.from_spec(program.spec(value), **arrays, x1_is_x2=same)
            for value, arrays in zip(program.outputs, _differentiable(request)(program, sources), strict=True)
        )


_Arrays = dict[str, Array | None]  # of a kernel, by the names of its fields


def _differentiable(request: Request) -> Any:
    """Returns the native computation of the outputs' arrays. Its derivatives are native where the engine has them."""

    @jax.custom_jvp
    def compute(program: Program, sources: tuple[Source, ...]) -> list[_Arrays]:
        return _arrays(program, sources, request)

    def reference(program: Program, sources: tuple[Source, ...]) -> list[_Arrays]:
        kernels = XlaBackend().propagate(program, sources, request)
        return [{name: getattr(k, name) for name in ("nngp", "ntk", "cov1", "cov2")} for k in kernels]

    @partial(compute.defjvp, symbolic_zeros=True)
    def jvp(primals: Any, tangents: Any) -> Any:
        # The value stays native: in reverse mode the forward pass of the reference is then dead code.
        value = compute(*primals)
        changes = {i: t for i, t in enumerate(jax.tree.leaves(tangents)) if not isinstance(t, SymbolicZero)}
        program, sources = primals
        if _refusal_of_derivative(program, sources, request) is None:
            return value, _native_tangent(primals, changes, reference, request)
        leaves = jax.tree.leaves(primals)
        return value, jax.jvp(_at(primals, reference), ({i: leaves[i] for i in changes},), (changes,))[1]

    return compute


def _at(primals: Any, compute: Any) -> Callable[[dict[int, Array]], list[_Arrays]]:
    """Returns what is computed of a program and sources, as a function of some of their leaves."""
    return lambda point: compute(*replace_leaves(primals, point))


def _refusal_of_derivative(program: Program, sources: tuple[Source, ...], request: Request) -> str | None:
    try:
        jax.eval_shape(_differentiated(calls.check_derivative, request), program, sources)
    except Refused as refused:
        return str(refused)
    return None


def _native_tangent(primals: Any, changes: dict[int, Array], reference: Any, request: Request) -> list[_Arrays]:
    """Returns the tangent of the outputs' arrays, whose transpose is native too; see `linear_call`.

    Args:
      primals: a program and sources.
      changes: tangents of their leaves, of those that change.
      reference: the same computation, for derivatives of higher order.
      request: what is asked for.
    """
    leaves = {i: jnp.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(primals))}
    point = {i: leaf for i, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    # What JAX keeps of these functions holds no number that it traces: those come with the point.
    others = replace_leaves(primals, dict.fromkeys(point, 0.0))

    changing = tuple(changes)

    def part(point: dict[int, Array], compute: Any) -> tuple[Any, dict[int, Array]]:
        # The rest is constant: the engine leaves cotangents out that nobody wants.
        return lambda changed: _at(others, compute)({**point, **changed}), {i: point[i] for i in changing}

    def pushes(compute: Any) -> Linear:
        def push(point: dict[int, Array], tangent: dict[int, Array]) -> list[_Arrays]:
            fn, changed = part(point, compute)
            return jax.jvp(fn, (changed,), (tangent,))[1]

        return push

    def pulls(compute: Any) -> Linear:
        def pull(point: dict[int, Array], cotangent: list[_Arrays]) -> dict[int, Array]:
            return jax.vjp(*part(point, compute))[1](cotangent)[0]

        return pull

    push = linear_call(
        pushes(_differentiated(calls.propagate_with_pushforward, request)),
        pulls(_differentiated(calls.propagate_with_pullback, request)),
        pushes(reference),
        pulls(reference),
    )
    return push(point, changes)


def _arrays(
    program: Program,
    sources: tuple[Source, ...],
    request: Request,
    propagate: Call = calls.propagate,
    for_derivatives: bool = False,
) -> list[_Arrays]:
    """Returns the arrays of the outputs; those between all samples of one batch are a call of its own."""
    outputs = _call(program, sources, request, (1, 2), propagate, for_derivatives)
    if not request.covariances or sources[0].spec.diagonal_batch:
        return outputs
    if all(is_symmetric(source) for source in sources):
        return [{**arrays, "cov1": arrays["nngp"]} for arrays in outputs]
    for which in (1, 2):
        alone = tuple(of_one_batch(source, which) for source in sources)
        own = _call(program, alone, Request(ntk=False, covariances=False), (which, which), propagate, for_derivatives)
        outputs = [{**arrays, f"cov{which}": k["nngp"]} for arrays, k in zip(outputs, own, strict=True)]
    return outputs


def _differentiated(propagate: Call, request: Request) -> Any:
    """The same arrays, as a function of a program and sources, to be differentiated."""
    return partial(_arrays, request=request, propagate=propagate, for_derivatives=True)


def _call(
    program: Program,
    sources: tuple[Source, ...],
    request: Request,
    batches: tuple[int, int],
    propagate: Call,
    for_derivatives: bool,
) -> list[_Arrays]:
    """One call of the engine, see `encode`."""
    encoded = encode(program, sources, request, batches, for_derivatives)
    dtype, (n1, n2) = dtype_of(sources[0]), (sources[0].spec.n1, sources[0].spec.n2)
    operands = [jnp.concatenate([jnp.ravel(jnp.asarray(c, dtype)) for c in encoded.coefficients])]
    for source, form in zip(sources, encoded.forms, strict=False):
        operands.extend(_operands(source, form, encoded))
    operands.extend(numbers.astype(dtype) for numbers in encoded.numbers)
    specs = [program.spec(value) for value in program.outputs]
    forms = [encoded.forms[value] for value in program.outputs]
    shapes: list[tuple[int, ...]] = []
    for spec, form, all_pairs in zip(specs, forms, encoded.all_pairs, strict=True):
        samples = [(n1, n2)] * (1 + form.has_ntk)
        if encoded.covariances:
            samples += [(n1,)] if encoded.symmetric else [(n1,), (n2,)]
        positions = (math.prod(spec.space),) * (2 if all_pairs else 1)
        shapes.extend(of_samples + positions for of_samples in samples)
    types = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    results = iter(propagate(encoded.code, types, operands))
    return [_take(results, spec, form, encoded, request.ntk, dtype) for spec, form in zip(specs, forms, strict=True)]


def _take(results: Iterator[Array], spec: Spec, form: Form, encoded: Encoded, ntk: bool, dtype: Any) -> _Arrays:
    """Takes the arrays of an output from the results, in the order of `make_job` in csrc/job.h."""

    def stored(n_batch: int) -> Array:
        return _as_stored(next(results), spec, form.axes, n_batch)

    nngp = stored(2)
    # A zero: no parameters seen yet.
    tangent = None if not ntk else stored(2) if form.has_ntk else jnp.zeros((), dtype)
    cov1 = stored(1) if encoded.covariances else None
    cov2 = stored(1) if encoded.covariances and not encoded.symmetric else None
    return {"nngp": nngp, "ntk": tangent, "cov1": cov1, "cov2": cov2}


def _operands(source: Source, form: Form, encoded: Encoded) -> list[Array]:
    """The arrays of a source, in the order of `source_of` in csrc/job.h."""
    if isinstance(source, Inputs):
        if encoded.formed:
            return _formed(source, form, encoded)
        return [source.first()] if encoded.symmetric else [source.first(), source.second()]
    spec = source.spec
    arrays = [_positions_last(source.nngp, spec, 2)]
    if form.has_ntk:
        assert source.ntk is not None
        arrays.append(_positions_last(source.ntk, spec, 2))
    if not form.deficit and not encoded.owns:
        return arrays
    assert source.cov1 is not None, "refused by the encoder"
    covariances = [_own(source.cov1, spec)]
    if not encoded.symmetric:
        covariances.append(covariances[0] if source.cov2 is None else _own(source.cov2, spec))
    if form.deficit:
        arrays.extend(_variances(c, spec) for c in covariances)
    if encoded.owns:
        arrays.extend(_positions_last(c, spec, 1) for c in covariances)
    return arrays


def _formed(inputs: Inputs, form: Form, encoded: Encoded) -> list[Array]:
    """What the pairs of inputs without positions are: covariances, or deficits and variances."""
    if not form.deficit:
        return [product_of_vectors(_vectors(inputs.first()), _vectors(inputs.second()))]
    deficit, *variances = _deficits(inputs.first(), inputs.second(), encoded.coefficients[0])
    return [deficit, *variances[: 1 if encoded.symmetric else 2]]


def _vectors(x: Array) -> Array:
    return x.reshape(len(x), math.prod(x.shape[1:]))  # there may be no samples


@jax.jit  # traced once: derivatives ask for it several times
def _deficits(x1: Array, x2: Array, are_identical: bool | Array) -> tuple[Array, Array, Array]:
    """The deficits of all pairs of samples, and the variances of either batch."""
    x1, x2 = _vectors(x1), _vectors(x2)
    var1, var2 = jnp.mean(x1**2, -1), jnp.mean(x2**2, -1)
    identical = jnp.eye(len(x1), len(x2), dtype=bool) & are_identical
    return deficit_of_vectors(x1, x2, var1[:, None], var2[None], identical), var1, var2


def _own(cov: Array, spec: Spec) -> Array:
    """Covariances of each sample with itself."""
    return cov if spec.diagonal_batch else jnp.moveaxis(jnp.diagonal(cov, axis1=0, axis2=1), -1, 0)


def _variances(cov: Array, spec: Spec) -> Array:
    if spec.diagonal_spatial or not spec.space:
        return cov
    variances = zipped_diagonal(cov, 1)
    return jnp.transpose(variances, (0, *range(variances.ndim - 1, 0, -1))) if spec.is_reversed else variances


def _positions_last(x: Array, spec: Spec, n_batch: int) -> Array:
    """`(*batch, H, H', W, W')` to `(*batch, H, W, H', W')`, in the order of the axes."""
    if spec.diagonal_spatial or not spec.space:
        return x
    return unzip_axes(reverse_zipped(x, n_batch) if spec.is_reversed else x, n_batch)


def _as_stored(x: Array, spec: Spec, axes: tuple[int, ...], n_batch: int) -> Array:
    """`(*batch, positions[, positions])` in the axes of the sources to the layout of a `Kernel`."""
    batch = x.shape[:n_batch]
    sizes = tuple(spec.space[axes.index(a)] for a in sorted(axes))
    if spec.diagonal_spatial or not spec.space:
        x = x.reshape(batch + sizes)
        return jnp.transpose(x, (*range(n_batch), *(n_batch + a for a in axes)))
    n_space = len(sizes)
    x = x.reshape(batch + sizes + sizes)
    order = [n_batch + half + a for half in (0, n_space) for a in axes]
    x = zip_axes(jnp.transpose(x, (*range(n_batch), *order)), n_batch)
    return reverse_zipped(x, n_batch) if spec.is_reversed else x
