"""Products of arrays with labelled axes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax

from nt_empirical._axes import sum_of_products

Labels = tuple[int, ...]
_numbers = itertools.count()


def new_labels(n: int) -> Labels:
    """Returns labels of axes that are in use nowhere else."""
    return tuple(itertools.islice(_numbers, n))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["labels", "chosen"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of the products, an array with labelled axes.

    Attributes:
      array: its axes are, with many samples, that of the samples, and those of `labels`.
      labels: of its axes.
      chosen: None; or a label and a size: the array then has positions along that axis (those outside of it are -1),
        and the factor is 1 at them and 0 elsewhere. So are rows of a table, which would be large as numbers.
    """

    array: jax.Array
    labels: Labels
    chosen: tuple[int, int] | None = None

    def has(self, label: int) -> bool:
        """Whether the factor differs along an axis."""
        return label in self.labels or (self.chosen is not None and self.chosen[0] == label)

    def named(self, name: Mapping[int, int]) -> "Factor":
        """Returns the factor with other labels, as far as there are names for them."""
        chosen = None if self.chosen is None else (name.get(self.chosen[0], self.chosen[0]), self.chosen[1])
        return Factor(self.array, tuple(name.get(label, label) for label in self.labels), chosen)

    def written_out(self) -> "Factor":
        """Returns an equal factor without `chosen`."""
        if self.chosen is None:
            return self
        label, size = self.chosen
        return Factor(jax.nn.one_hot(self.array, size), (*self.labels, label))


def product(factors: Sequence[Factor], labels: Sequence[int]) -> Factor:
    """Returns the product of factors, summed over all axes but those with these labels, which some factors have."""
    return Factor(sum_of_products([(factor.array, factor.labels) for factor in factors], labels), tuple(labels))


def multiplied(factors: Sequence[Factor], kept: Sequence[int]) -> tuple[Factor, ...]:
    """Returns factors with an equal product, some multiplied and summed: where that is no larger than what it is of.

    Args:
      factors: of one sample.
      kept: labels of axes that are not summed over, in the order that products shall have.
    """
    fixed = [factor for factor in factors if factor.chosen is not None]
    free = [factor for factor in factors if factor.chosen is None]
    while smaller := _smaller(free, fixed, kept):
        group, labels = smaller
        made = product([free[i] for i in group], labels)
        free = [*(factor for i, factor in enumerate(free) if i not in group), made]
    return (*free, *fixed)


def _smaller(
    factors: Sequence[Factor], fixed: Sequence[Factor], kept: Sequence[int]
) -> tuple[tuple[int, ...], list[int]] | None:
    """Returns the numbers of factors whose product is no larger than they are, and its labels; None if there are none.

    One that is only summed comes first, then the pair with the smallest product, then all.
    """
    numbers = range(len(factors))
    sizes = {label: size for factor in factors for label, size in zip(factor.labels, factor.array.shape, strict=True)}
    groups: list[list[tuple[int, ...]]] = [[(i,) for i in numbers], list(itertools.combinations(numbers, 2))]
    if len(factors) > 2:
        groups.append([tuple(numbers)])
    for of_same_size in groups:
        found = []
        for group in of_same_size:
            others = [*fixed, *(factors[i] for i in numbers if i not in group)]
            of_group = dict.fromkeys(label for i in group for label in factors[i].labels)
            needed = [label for label in of_group if label in kept or any(factor.has(label) for factor in others)]
            size = math.prod(sizes[label] for label in needed)
            if len(group) == 1 and len(needed) == len(of_group):
                continue
            if size <= sum(factors[i].array.size for i in group):
                ordered = [label for label in dict.fromkeys(kept) if label in needed]
                found.append((size, group, ordered + [label for label in needed if label not in ordered]))
        if found:
            _, group, labels = min(found)
            return group, labels
    return None
