"""The two Mosaic backends: when they are taken, and how they fit the contract of backends."""

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.backends.base import Device, Refused, Request
from nt_core.backends.mosaic.plan import SUMS, Hardware, Stage, lower_for_planes, make_plan
from nt_core.backends.mosaic.run import Propagation, RunStage
from nt_core.backends.xla import XlaBackend
from nt_core.evaluation.platform import traced_for
from nt_core.kernel import Kernel
from nt_core.program import Program
from nt_core.sources import Source, dtype_of, same_batches

_OLDEST_JAX = (0, 11, 2)
_OLDEST_COMPUTE_CAPABILITY = 9.0


class MosaicBackend:
    """What both have in common. Derivatives are those of the `xla` backend.

    Args:
      interpret: execute kernels on CPU, slowly, whatever the device (for tests).
    """

    name: str
    platform: str
    hardware: Hardware
    module: str  # imported when a kernel is first executed
    has_groups = False  # of orders beyond the terms of Hermite coefficients: these are taken for a power of the order

    def __init__(self, interpret: bool = False) -> None:
        self._interpret = interpret

    def refusal(self, program: Program, sources: tuple[Source, ...], request: Request, device: Device) -> str | None:
        if not self._interpret:
            reason = self.hardware_refusal(device) or _jax_refusal()
            if reason is not None:
                return reason
        return self.program_refusal(program, sources, request)

    def program_refusal(self, program: Program, sources: tuple[Source, ...], request: Request) -> str | None:
        """Says why a program is not taken on any hardware, or None if it is."""
        dtypes = sorted({dtype_of(source).name for source in sources})
        if dtypes != ["float32"]:
            return f"it computes in float32, not in {', '.join(dtypes)}"
        if request.covariances and not all(source.spec.diagonal_batch for source in sources):
            return "covariances between all samples of one batch are asked for"
        try:
            for stage in make_plan(lower_for_planes(program, sources, request.ntk), sources, self.hardware):
                self.check_memory(stage)
        except Refused as refused:
            return str(refused)
        return None

    def derivatives(self, program: Program, sources: tuple[Source, ...], request: Request) -> str:
        return "by xla"

    def hardware_refusal(self, device: Device) -> str | None:
        raise NotImplementedError

    def check_memory(self, stage: Stage) -> None:
        """Raises `Refused` if the planes of a stage do not fit."""
        raise NotImplementedError

    def propagate(self, program: Program, sources: tuple[Source, ...], request: Request) -> tuple[Kernel, ...]:
        module = importlib.import_module(self.module)
        run_stage = partial(module.run_stage, interpret=self._interpret)
        nngp, ntk, cov1, cov2 = _differentiable(request, run_stage, self)(program, sources)
        spec, same = program.spec(program.outputs[0]), same_batches(sources)
        return (Kernel.from_spec(spec, nngp=nngp, ntk=ntk, cov1=cov1, cov2=cov2, x1_is_x2=same),)


class MosaicGpuBackend(MosaicBackend):
    """NVIDIA GPUs from Hopper on."""

    name = "mosaic_gpu"
    platform = "gpu"
    hardware = Hardware(multiple=128, largest=128, numbers=2**29)  # a number for each thread of a warpgroup
    module = "nt_core.backends.mosaic.gpu"

    def hardware_refusal(self, device: Device) -> str | None:
        if device.platform != "gpu":
            return f"the device is a {device.platform}, not a GPU"
        if _compute_capability(device) < _OLDEST_COMPUTE_CAPABILITY:
            return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer, this is {device.device_kind}"
        return None

    def check_memory(self, stage: Stage) -> None:
        needed = shared_bytes(stage)
        if needed > SHARED_MEMORY:
            raise Refused(f"planes of one pair take {needed:,} bytes, shared memory holds {SHARED_MEMORY:,}")


class MosaicTpuBackend(MosaicBackend):
    """TPUs."""

    name = "mosaic_tpu"
    platform = "tpu"
    hardware = Hardware(multiple=8, largest=None, numbers=2**27)
    module = "nt_core.backends.mosaic.tpu"

    def hardware_refusal(self, device: Device) -> str | None:
        if device.platform != "tpu":
            return f"the device is a {device.platform}, not a TPU"
        return None

    def check_memory(self, stage: Stage) -> None:
        needed = tpu_bytes(stage, kept_rows(stage))
        if needed > VECTOR_MEMORY:
            raise Refused(f"planes of 128 pairs take {needed:,} bytes, of vector memory it uses {VECTOR_MEMORY:,}")


# What is used of the shared memory of a block of threads (227 KiB on Hopper, of which Mosaic needs some itself), and of
# the vector memory of a TPU (128 MiB from v5e on).
SHARED_MEMORY = 224 * 2**10
VECTOR_MEMORY = 127 * 2**20
# Planes that the compiler of TPU v5e keeps on its stack: between 13 and 25 at 64 x 64, and with sums 40 at 24 x 24.
_TEMPORARIES, _TEMPORARIES_OF_SUMS = 20, 45
TPU_LANES = 128  # pairs of samples side by side


def shared_bytes(stage: Stage) -> int:
    """Shared memory that one warpgroup needs: the buffers of a plane."""
    return 4 * sum(stage.buffers) * (2 if stage.has_ntk else 1) * stage.torus.piece_reach


def is_streamed(stage: Stage) -> bool:
    """Whether the tables of repeated layers are too large for the vector memory of a TPU, and are fetched in turn."""
    return tpu_bytes(stage, stage.n_rows) > VECTOR_MEMORY


def kept_rows(stage: Stage) -> int:
    """The rows of tables that must be in memory at once: those of one iteration, and of what is not repeated."""
    return stage.tables[0].size + max((table.size for table in stage.tables[1:]), default=0)


def tpu_bytes(stage: Stage, n_rows: int) -> int:
    """Vector memory that a program of a stage needs, with one plane of what comes in and goes out."""
    kernels, torus = 2 if stage.has_ntk else 1, stage.torus
    tables = n_rows * (torus.slots + torus.reach)
    buffers = kernels * sum(stage.buffers) * torus.reach
    sources = 2 * sum(source.n_source_rows for source in stage.sources) * torus.slots
    has_sums = any(isinstance(activation, SUMS) for activation in stage.nonlinearities)
    temporaries = _TEMPORARIES_OF_SUMS if has_sums else _TEMPORARIES
    return 4 * TPU_LANES * (tables + buffers + sources + (kernels + temporaries) * torus.slots)


_Arrays = tuple[Array, Array | None, Array | None, Array | None]


def _differentiable(request: Request, run_stage: RunStage, backend: MosaicBackend) -> Callable[..., _Arrays]:
    """Returns the computation of a `Kernel`'s arrays, with the derivatives of the `xla` backend."""

    @jax.custom_jvp
    def compute(program: Program, sources: tuple[Source, ...]) -> _Arrays:
        pairs = Propagation(program, sources, request, run_stage, backend.hardware).pairs()
        cov1, cov2 = None, None
        if request.covariances:  # of each sample with itself: little work, the pairs of this are never computed
            (own,) = XlaBackend().propagate(program, sources, Request(ntk=False, covariances=True))
            cov1, cov2 = own.cov1, own.cov2
        ntk = jnp.zeros((), pairs.value.dtype) if request.ntk and pairs.ntk is None else pairs.ntk
        return pairs.value, ntk, cov1, cov2

    def reference(program: Program, sources: tuple[Source, ...]) -> _Arrays:
        with traced_for(backend.platform):  # also where a derivative is traced, later than the value
            (kernel,) = XlaBackend().propagate(program, sources, request)
        return kernel.nngp, kernel.ntk, kernel.cov1, kernel.cov2

    @compute.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        return jax.jvp(reference, primals, tangents)

    return compute


def _compute_capability(device: Device) -> float:
    """Returns 0 for what is no NVIDIA GPU: AMD's say names such as 'gfx90a'."""
    number = re.fullmatch(r"\d+(\.\d+)?", str(getattr(device, "compute_capability", "")))
    return float(number[0]) if number else 0.0


def _jax_refusal() -> str | None:
    numbers = tuple(int(n) for n in re.findall(r"\d+", jax.__version__)[:3])
    if numbers < _OLDEST_JAX:
        return f"it needs JAX {'.'.join(map(str, _OLDEST_JAX))} or newer, this is {jax.__version__}"
    return None
