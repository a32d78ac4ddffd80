"""The compiled module; absent where nt-core was installed without a compiler."""

from typing import Any

def ffi_api_version() -> tuple[int, int]:
    """The (major, minor) version of the XLA FFI that the handlers were compiled for."""

def registrations() -> dict[str, Any]:
    """The handlers: FFI target name -> capsule."""
