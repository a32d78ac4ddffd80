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

    @property
    def all_labels(self) -> Labels:
        """Labels of the axes along which the factor differs."""
        return self.labels if self.chosen is None else (*self.labels, self.chosen[0])

    def has(self, label: int) -> bool:
        """Whether the factor differs along an axis."""
        return label in self.all_labels

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


def multiplied(factors: Sequence[Factor], kept: Sequence[int], most: int | None = None) -> tuple[Factor, ...]:
    """Returns factors with an equal product, some of them multiplied and summed.

    Factors are multiplied if their product is no larger than they are together.

    Args:
      factors: of one sample.
      kept: labels of axes that are not summed over, in the order that products shall have.
      most: so many factors at most are returned, even if products are larger; None for no bound.
    """
    fixed = [factor for factor in factors if factor.chosen is not None]
    free = [factor for factor in factors if factor.chosen is None]
    while (group := _to_multiply(free, fixed, kept, most)) is not None:
        made = product([free[i] for i in group], _labels_of_product(group, free, fixed, kept))
        free = [*(factor for i, factor in enumerate(free) if i not in group), made]
    return (*free, *fixed)


def _to_multiply(
    factors: Sequence[Factor], fixed: Sequence[Factor], kept: Sequence[int], most: int | None
) -> tuple[int, ...] | None:
    """Returns the numbers of factors to multiply next, None if there are none.

    One that is only summed comes first, then the pair with the smallest product. Three or more may sum over axes that
    no two have alone, so all are tried last.
    """
    numbers = range(len(factors))
    sizes = {label: size for factor in factors for label, size in zip(factor.labels, factor.array.shape, strict=True)}

    def size_of_product(group: tuple[int, ...]) -> int:
        return math.prod(sizes[label] for label in _labels_of_product(group, factors, fixed, kept))

    for i in numbers:
        if len(_labels_of_product((i,), factors, fixed, kept)) < len(factors[i].labels):
            return (i,)
    pairs = sorted((size_of_product(pair), pair) for pair in itertools.combinations(numbers, 2))
    together = [(size_of_product(tuple(numbers)), tuple(numbers))] if len(factors) > 2 else []
    for size, group in pairs + together:
        if size <= sum(factors[i].array.size for i in group):
            return group
    return pairs[0][1] if most is not None and len(factors) > most else None


def _labels_of_product(
    group: Sequence[int], factors: Sequence[Factor], fixed: Sequence[Factor], kept: Sequence[int]
) -> list[int]:
    """Returns the labels of the product of some factors: those that are kept, or that others have."""
    others = [*fixed, *(factor for i, factor in enumerate(factors) if i not in group)]
    of_group = dict.fromkeys(label for i in group for label in factors[i].labels)
    needed = [label for label in of_group if label in kept or any(factor.has(label) for factor in others)]
    ordered = [label for label in dict.fromkeys(kept) if label in needed]
    return ordered + [label for label in needed if label not in ordered]
