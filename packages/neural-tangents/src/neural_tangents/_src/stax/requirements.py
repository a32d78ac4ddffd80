"""`layer` is `neural_tangents.stax.layer` now."""

from typing import Any

from nt_core import layer as _layer

from neural_tangents._src.moved import moved


def __getattr__(name: str) -> Any:
    return moved(__name__, name, {"layer": ("neural_tangents.stax.layer", _layer)})
