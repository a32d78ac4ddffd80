"""The contract between covariance programs and what executes them."""

import dataclasses
from typing import Protocol

from nt_core.kernel import Kernel
from nt_core.program import Program
from nt_core.sources import Source


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a program. What is not asked for is not computed.

    Attributes:
      ntk: the tangent kernel; otherwise `Kernel.ntk` is None.
      covariances: `cov1` and `cov2`; otherwise they are None.
    """

    ntk: bool = True
    covariances: bool = True


class Backend(Protocol):
    """Executes programs.

    The results of all backends agree with those of `xla` in float64 to rounding, for every program that they take.
    """

    name: str

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request) -> str | None:
        """Says why this program is not taken, or None if it is."""
        ...

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        """Returns the kernels at `program.outputs`. Called under `jax.jit` only, with traced sources."""
        ...
