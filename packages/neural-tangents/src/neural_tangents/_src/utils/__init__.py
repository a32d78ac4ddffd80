"""See `neural_tangents._src`."""

from neural_tangents._src.utils import kernel

__all__ = ["kernel"]
