"""Loads the compiled module and registers its handlers with XLA, on first use."""

import contextlib
import functools
import importlib
import os
import pathlib
import re
import warnings
from typing import Any

import jax
import numpy as np

_MODULE = "nt_core._native"
_LEVEL = "NT_CPU_LEVEL"  # read once: the environment is not to be read on the threads of XLA


@functools.cache
def refusal() -> str | None:
    """Loads the native module. Returns why it cannot be used, or None if its handlers are registered.

    The reason is also a warning, once. A module built for a newer FFI than that of the installed jaxlib must not be
    registered: it could keep the whole CPU backend of JAX from starting.

    Raises:
      ValueError: the environment variable NT_CPU_LEVEL names no instruction set.
    """
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        return _warn(f"the native module is not there ({error}): nt-core was installed without a C++ compiler")
    built, running = module.ffi_api_version(), runtime_ffi_version()
    if built[0] != running[0] or built[1] > running[1]:
        return _warn(
            f"the native module was built for XLA FFI {built[0]}.{built[1]}, the installed jaxlib has "
            f"{running[0]}.{running[1]}: reinstall nt-core, or install a newer jaxlib"
        )
    module.choose_level(os.environ.get(_LEVEL, ""))
    for name, handler in module.registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


@functools.cache
def schema() -> dict[str, Any]:
    """Returns how programs are encoded: the numbers of operations and activations, as the module was compiled with."""
    return importlib.import_module(_MODULE).schema()


def refusal_of_derivative(code: np.ndarray) -> str | None:
    """Returns why an encoded program has no native derivative, or None if it has one."""
    return importlib.import_module(_MODULE).refusal_of_derivative(code)


def runtime_ffi_version() -> tuple[int, int]:
    """Returns the version of the XLA FFI that the installed jaxlib runs, as its headers say; (0, 0) without any."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return (0, 0)
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        return (0, 0)
    return int(major[1]), int(minor[1])


def _warn(reason: str) -> str:
    with contextlib.suppress(UserWarning):  # warnings may be errors, and this is none
        warnings.warn(f"nt_core: {reason}. Kernels are computed in pure JAX, more slowly on CPU.", stacklevel=3)
    return reason
