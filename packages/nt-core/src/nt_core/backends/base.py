"""The contract between covariance programs and what executes them."""

import dataclasses
from typing import Any, Protocol

import jax
from jax.core import Tracer

from nt_core.kernel import Kernel
from nt_core.program import Program
from nt_core.sources import Source

Device = Any  # jax.Device, which is no type to a type checker


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a program. What is not asked for is not computed.

    Attributes:
      ntk: the tangent kernel; otherwise `Kernel.ntk` is None.
      covariances: `cov1` and `cov2`; otherwise they are None.
    """

    ntk: bool = True
    covariances: bool = True


class Refused(Exception):
    """A backend does not take a program, for the reason given."""


def device_of(sources: tuple[Source, ...]) -> Device:
    """Returns where a program will run: where its arrays were put, or else the default device in force."""
    for array in jax.tree.leaves(sources):
        if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.committed:
            return next(iter(array.devices()))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]


class Backend(Protocol):
    """Executes programs.

    The results of all backends agree with those of `xla` in float64 to rounding, for every program that they take. One
    that has `derivatives(program, sources, request)` says with it, for `explain`, whose derivatives a program has. If
    `has_groups` is False, it leaves groups of orders out (`nt_core.activations.groups`).
    """

    name: str

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request, device: Device) -> str | None:
        """Says why this program is not taken on a device, or None if it is.

        It depends on types and shapes alone, never on values: the answer for one program is kept for all alike. Arrays
        are traced.
        """
        ...

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        """Returns the kernels at `program.outputs`. Called under `jax.jit` only, with traced sources."""
        ...
