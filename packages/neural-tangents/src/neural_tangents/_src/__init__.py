"""Two names that programs took from the inside of neural-tangents 0.6: they resolve, and say where they are now."""

from neural_tangents._src import stax, utils

__all__ = ["stax", "utils"]
