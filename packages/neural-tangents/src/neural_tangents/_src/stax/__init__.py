"""See `neural_tangents._src`."""

from neural_tangents._src.stax import requirements

__all__ = ["requirements"]
