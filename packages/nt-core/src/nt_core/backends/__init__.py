"""Choice of the backend that executes a program."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax

from nt_core.backends.base import Backend, Device, Request, device_of
from nt_core.backends.cpu import CpuBackend
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend
from nt_core.backends.xla import XlaBackend
from nt_core.evaluation.platform import traced_for
from nt_core.kernel import Kernel
from nt_core.program import Program
from nt_core.sources import Source, check_arrays

__all__ = ["EVERYTHING", "Backend", "Implementation", "Request", "choose", "propagate"]

Implementation = str | Sequence[str] | None

EVERYTHING = Request()

# In the order of preference.
_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CpuBackend(), MosaicGpuBackend(), MosaicTpuBackend(), XlaBackend())
}
_VARIABLE = "NT_IMPLEMENTATION"
_NUMBERS = (bool, int, float)


def register_backend(backend: Backend) -> None:
    """Adds a backend, to be tried before those that there are.

    Args:
      backend: see `nt_core.Backend`.

    Raises:
      ValueError: there is a backend of this name.
    """
    if backend.name in _BACKENDS:
        raise ValueError(f"There is a backend {backend.name!r} already; give this one another name.")
    others = dict(_BACKENDS)
    _BACKENDS.clear()
    _BACKENDS.update({backend.name: backend, **others})


def propagate(
    program: Program,
    sources: Sequence[Source],
    request: Request = EVERYTHING,
    implementation: Implementation = None,
) -> tuple[Kernel, ...]:
    """Carries covariances through a program.

    Args:
      program: what is done to them.
      sources: one `Inputs` or `Kernel` for each of `program.sources`.
      request: what is to be computed.
      implementation: name of a backend, which must take the program; names to be tried in turn; or None for the best
        one there is. The environment variable `NT_IMPLEMENTATION` (names separated by commas) replaces None.

    Returns:
      A `Kernel` for each of `program.outputs`.

    Raises:
      ValueError: sources that do not fit the program, or hold no tangent kernel where it is asked for.
      NotImplementedError: none of the named backends takes the program. The message has the reason of each.

    >>> import jax.numpy as jnp
    >>> from nt_core import Builder, Inputs, Spec, activations, steps
    >>> builder = Builder()
    >>> x = builder.source(Spec((2, 3), (2, 3), batch_axis=0, channel_axis=1))
    >>> y = builder.add(steps.Dual(activations.ABRelu(0.0, 1.0)), builder.add(steps.Dense(2.0, None, 16), x))
    >>> program = builder.build(y)
    >>> (kernel,) = propagate(program, [Inputs(jnp.eye(2, 3), None, program.sources[0])])
    >>> print(kernel.nngp.round(4))
    [[0.3333 0.1061]
     [0.1061 0.3333]]
    """
    sources = tuple(sources)
    if tuple(source.spec for source in sources) != program.sources:
        raise ValueError(
            f"The program expects sources {program.sources}, got {tuple(source.spec for source in sources)}."
        )
    for source in sources:
        if isinstance(source, Kernel):
            _check_kernel(source, request)
    question = _question(program, sources, request)
    backend, _ = _choose(question, _candidates(implementation))
    coefficients, structure = program.flat
    platform = question.device.platform
    return _propagate(coefficients, sources, structure=structure, request=request, backend=backend, platform=platform)


def _check_kernel(kernel: Kernel, request: Request) -> None:
    check_arrays(kernel)
    if request.ntk and kernel.ntk is None:
        raise ValueError(
            "The tangent kernel is asked for, and the Kernel to start from holds none (ntk=None). Compute its tangent "
            "kernel too, or give it ntk=jnp.zeros(()) if there is no layer with parameters before it."
        )


def choose(
    program: Program, sources: tuple[Source, ...], request: Request, implementation: Implementation = None
) -> tuple[Backend, dict[str, str]]:
    """Returns the backend for a program, and why each one before it in the order was passed over."""
    backend, refusals = _choose(_question(program, sources, request), _candidates(implementation))
    return backend, dict(refusals)


@dataclasses.dataclass(frozen=True)
class _Question:
    """All that a refusal depends on."""

    program: Any  # structures
    sources: Any
    types: tuple[Any, ...]  # of coefficients and arrays
    request: Request
    device: Device
    leaves: tuple[Any, ...] = dataclasses.field(compare=False)  # numbers as they are, arrays without values


def _question(program: Program, sources: tuple[Source, ...], request: Request) -> _Question:
    coefficients, structure = program.flat
    arrays, structure_of_sources = jax.tree.flatten(sources)
    leaves = tuple(map(_without_values, (*coefficients, *arrays)))
    types = tuple(type(leaf) if isinstance(leaf, _NUMBERS) else leaf for leaf in leaves)
    return _Question(structure, structure_of_sources, types, request, device_of(sources), leaves)


def _without_values(leaf: Any) -> Any:
    if isinstance(leaf, _NUMBERS):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


@functools.lru_cache(maxsize=1024)
def _choose(question: _Question, candidates: tuple[Backend, ...]) -> tuple[Backend, dict[str, str]]:
    chosen: list[Backend] = []
    refusals: dict[str, str] = {}

    def ask(arrays: Sequence[Any]) -> None:
        traced = iter(arrays)
        leaves = [leaf if isinstance(leaf, _NUMBERS) else next(traced) for leaf in question.leaves]
        program = jax.tree.unflatten(question.program, leaves[: question.program.num_leaves])
        sources = jax.tree.unflatten(question.sources, leaves[question.program.num_leaves :])
        for backend in candidates:
            reason = backend.refusal(program, sources, question.request, question.device)
            if reason is None:
                chosen.append(backend)
                return
            refusals[backend.name] = reason

    # Arrays are traced: a decision can neither read nor compute any.
    jax.eval_shape(ask, [leaf for leaf in question.leaves if not isinstance(leaf, _NUMBERS)])
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise NotImplementedError(f"No backend takes this program. {reasons}")
    return chosen[0], refusals


@functools.partial(jax.jit, static_argnames=("structure", "request", "backend", "platform"))
def _propagate(
    coefficients: Sequence[Any],
    sources: tuple[Source, ...],
    *,
    structure: Any,
    request: Request,
    backend: Backend,
    platform: str,
) -> tuple[Kernel, ...]:
    with traced_for(platform):
        return backend.propagate(jax.tree.unflatten(structure, coefficients), sources, request)


def _candidates(implementation: Implementation) -> tuple[Backend, ...]:
    if implementation is None:
        from_environment = os.environ.get(_VARIABLE)
        if not from_environment:
            return tuple(_BACKENDS.values())
        implementation = [name.strip() for name in from_environment.split(",")]
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names:
        raise ValueError(
            f"`implementation` is empty: name one of {', '.join(_BACKENDS)}, or give None for the best one."
        )
    for name in names:
        if name not in _BACKENDS:
            raise ValueError(f"Unknown implementation {name!r}; there are {', '.join(_BACKENDS)}.")
    return tuple(_BACKENDS[name] for name in names)
