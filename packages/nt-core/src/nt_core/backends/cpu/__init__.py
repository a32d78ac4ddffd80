"""The native backend for CPUs: covariance programs in C++ (csrc), one XLA custom call for a program."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.backends.base import Device, Request
from nt_core.backends.cpu import native
from nt_core.backends.cpu.encode import Encoded, Refused, encode
from nt_core.backends.xla import XlaBackend
from nt_core.evaluation.fusion import constant
from nt_core.kernel import Kernel
from nt_core.layouts import reverse_zipped, unzip_axes, zip_axes, zipped_diagonal
from nt_core.program import Program
from nt_core.sources import Inputs, Source, dtype_of, identical_batches, is_symmetric, same_batches
from nt_core.spec import Spec

_TARGET = "nt_propagate"
_DTYPES = ("float32", "float64")


class CpuBackend:
    """Takes what docs/cpu-engine.md lists. Derivatives are those of the `xla` backend."""

    name = "cpu"

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request, device: Device) -> str | None:
        if device.platform != "cpu":
            return f"the device is a {device.platform}, not a CPU"
        dtypes = {dtype_of(source).name for source in sources}
        if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
            return f"it computes in float32 or float64, not in {', '.join(sorted(dtypes))}"
        try:
            encode(program, sources, request, 0.0)
        except Refused as refused:
            return str(refused)
        return native.refusal()

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        spec = program.spec(program.outputs[0])
        nngp, ntk, cov1, cov2 = _differentiable(request)(program, sources)
        same = same_batches(sources)
        return (Kernel.from_spec(spec, nngp=nngp, ntk=ntk, cov1=cov1, cov2=cov2, x1_is_x2=same),)


_Arrays = tuple[Array, Array | None, Array | None, Array | None]


def _differentiable(request: Request) -> Any:
    """Returns the native computation of a `Kernel`'s arrays, with the derivatives of the `xla` backend."""

    @jax.custom_jvp
    def compute(program: Program, sources: tuple[Source, ...]) -> _Arrays:
        return _call(program, sources, request)

    def reference(program: Program, sources: tuple[Source, ...]) -> _Arrays:
        (kernel,) = XlaBackend().propagate(program, sources, request)
        return kernel.nngp, kernel.ntk, kernel.cov1, kernel.cov2

    @compute.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        # The value stays native: in reverse mode the forward pass of the reference is then dead code.
        return compute(*primals), jax.jvp(reference, primals, tangents)[1]

    return compute


def _call(program: Program, sources: tuple[Source, ...], request: Request) -> _Arrays:
    encoded = encode(program, sources, request, identical_batches(sources))
    spec, dtype = program.spec(program.outputs[0]), dtype_of(sources[0])
    symmetric = all(is_symmetric(source) for source in sources)
    operands = [jnp.stack([jnp.asarray(c, dtype) for c in encoded.coefficients])]
    for source, needs in zip(sources, encoded.needs, strict=True):
        operands.extend(_operands(source, needs, encoded, symmetric))
    sizes = tuple(spec.space[encoded.axes.index(a)] for a in sorted(encoded.axes))
    positions = (math.prod(sizes),) * (2 if encoded.all_pairs else 1)
    shapes = [(spec.n1, spec.n2)] * (1 + encoded.has_ntk)
    if request.covariances:
        shapes += [(spec.n1,)] if symmetric else [(spec.n1,), (spec.n2,)]
    outputs = [jax.ShapeDtypeStruct(shape + positions, dtype) for shape in shapes]
    computed = jax.ffi.ffi_call(_TARGET, outputs, vmap_method="sequential")(*operands, code=encoded.code)
    # JAX does not know over which axes of a mesh the results of a custom call vary: adding this 0 tells it.
    results = iter([result + constant((), 0, dtype, operands) for result in computed])

    def stored(n_batch: int) -> Array:
        return _as_stored(next(results), spec, sizes, encoded, n_batch)

    nngp = stored(2)
    ntk = None
    if request.ntk:
        ntk = stored(2) if encoded.has_ntk else jnp.zeros((), dtype)  # zero: no parameters seen yet
    cov1 = stored(1) if request.covariances else None
    cov2 = stored(1) if request.covariances and not symmetric else None
    return nngp, ntk, cov1, cov2


def _operands(source: Source, needs: bool, encoded: Encoded, symmetric: bool) -> list[Array]:
    """The arrays of a source, in the order of `source_of` in csrc/job.h."""
    if isinstance(source, Inputs):
        return [source.first()] if symmetric else [source.first(), source.second()]
    spec = source.spec
    arrays = [_positions_last(source.nngp, spec, 2)]
    if encoded.has_ntk and source.ntk is not None and source.ntk.ndim > 0:
        arrays.append(_positions_last(source.ntk, spec, 2))
    if not needs and not encoded.owns:
        return arrays
    assert source.cov1 is not None, "refused by the encoder"
    covariances = [_own(source.cov1, spec)]
    if not symmetric:
        covariances.append(covariances[0] if source.cov2 is None else _own(source.cov2, spec))
    if needs:
        arrays.extend(_variances(c, spec) for c in covariances)
    if encoded.owns:
        arrays.extend(_positions_last(c, spec, 1) for c in covariances)
    return arrays


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


def _as_stored(x: Array, spec: Spec, sizes: tuple[int, ...], encoded: Encoded, n_batch: int) -> Array:
    """`(*batch, positions[, positions])` in the axes of the sources to the layout of a `Kernel`."""
    batch = x.shape[:n_batch]
    if spec.diagonal_spatial or not spec.space:
        x = x.reshape(batch + sizes)
        return jnp.transpose(x, (*range(n_batch), *(n_batch + a for a in encoded.axes)))
    n_space = len(sizes)
    x = x.reshape(batch + sizes + sizes)
    order = [n_batch + half + a for half in (0, n_space) for a in encoded.axes]
    x = zip_axes(jnp.transpose(x, (*range(n_batch), *order)), n_batch)
    return reverse_zipped(x, n_batch) if spec.is_reversed else x
