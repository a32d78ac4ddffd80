"""The compiled module; absent where nt-core was installed without a compiler."""

from typing import Any

import numpy as np

def ffi_api_version() -> tuple[int, int]:
    """The (major, minor) version of the XLA FFI that the handlers were compiled for."""

def registrations() -> dict[str, Any]:
    """The handlers: FFI target name -> capsule."""

def dual(
    activation: list[int], coefficients: np.ndarray, variance1: np.ndarray, variance2: np.ndarray, deficit: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A nonlinearity by itself, for tests: (variance1 after it, deficit after it, factor of the tangent kernel)."""

def schema() -> dict[str, Any]:
    """The encoding of programs: its version, and the numbers of operations and activations."""

def refusal_of_derivative(code: np.ndarray) -> str | None:
    """Why an encoded program has no native derivative, or None if it has one."""

def choose_level(name: str) -> None:
    """Lowers the instruction set to the named one (baseline, avx2 or avx512; '' for the best that there is)."""
