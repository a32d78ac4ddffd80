"""`Kernel` is `neural_tangents.Kernel` now."""

from typing import Any

from nt_core import Kernel as _Kernel

from neural_tangents._src.moved import moved


def __getattr__(name: str) -> Any:
    return moved(__name__, name, {"Kernel": ("neural_tangents.Kernel", _Kernel)})
