"""What is known of each sample alone at every value of a program, before any pair of samples is looked at."""

import dataclasses
from collections.abc import Callable

import jax
from jax import Array


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What pairs need to know of each sample of a batch.

    Attributes:
      variance: for the values that need it, `(*space, n)`.
      scale: of rescalings, by what they multiply, `(*space, n)`.
      self_deficit: of pools in deficit form, the pooled deficit of each window with itself, `(*space, n)`.
      repeated: of repeated blocks, the statistics of their body, `(count, *space, n)`.
    """

    variance: dict[int, Array]
    scale: dict[int, Array] = dataclasses.field(default_factory=dict)
    self_deficit: dict[int, Array] = dataclasses.field(default_factory=dict)
    repeated: dict[int, "Statistics"] = dataclasses.field(default_factory=dict)

    def map(self, fn: Callable[[Array], Array], repeated: Callable[[Array], Array]) -> "Statistics":
        """Applies functions to the arrays that a plane is evaluated from; to those of repeated blocks the second."""
        return Statistics(
            {i: fn(a) for i, a in self.variance.items()},
            {i: fn(a) for i, a in self.scale.items()},
            repeated={i: s.map(repeated, repeated) for i, s in self.repeated.items()},
        )


jax.tree_util.register_dataclass(
    Statistics, data_fields=["variance", "scale", "self_deficit", "repeated"], meta_fields=[]
)
