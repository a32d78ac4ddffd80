"""The tangent kernel from the structure of the equations that parameters enter."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from nt_core.manual import varying, varying_axes

from nt_empirical._axes import Layout, OutputAxes, sum_of_products
from nt_empirical._batches import Batch
from nt_empirical._jacobian import Differentiated, Function, differentiate, kernels_of
from nt_empirical._parameters import Parametrised, labelled
from nt_empirical._perturbation import Perturbed
from nt_empirical._uses import Factor, Labels, Use
from nt_empirical._vmap import BatchAxes, sample_outputs


class Path(NamedTuple):
    """A way from a parameter to an output.

    Attributes:
      cotangents: derivatives of the output by a value that the parameter changes: axes of both.
      use: how it changes the value.
      samples_at: axis of the output with the samples, if they lead the axes of factors.
    """

    cotangents: jax.Array
    use: Use
    samples_at: int | None

    def factors(self, output_labels: list[int], weight_labels: list[int], unused: Iterator[int]) -> list[Factor]:
        """Returns factors whose product, summed over all other axes, is the derivative of the output by the array."""
        labels = dict(zip(self.use.weight_axes, weight_labels, strict=True))

        def named(of_use: Labels) -> Labels:
            return tuple(
                labels[label] if label in labels else labels.setdefault(label, next(unused)) for label in of_use
            )

        shape = self.cotangents.shape[: len(output_labels)] + self.use.shape
        sample = () if self.samples_at is None else (output_labels[self.samples_at],)
        found = [Factor(self.cotangents.reshape(shape), (*output_labels, *named(self.use.axes)))]
        for factor in self.use.factors:
            label, size = factor.chosen or (None, 0)
            chosen = None if label is None else (named((label,))[0], size)
            found.append(Factor(factor.array, (*sample, *named(factor.labels)), chosen))
        return found


class Array(NamedTuple):
    """An array of the parameters.

    Attributes:
      shape: its shape.
      scale: broadcasts to it, see `Parametrised`.
    """

    shape: tuple[int, ...]
    scale: jax.Array | None

    def scale_at(self, use: Use, weight_labels: list[int]) -> list[Factor]:
        """Returns the scale of what enters at a use, whose axes have these labels; none if it is 1."""
        if self.scale is None:
            return []
        scale = self.scale
        if use.steps and scale.ndim:
            scale = _taken(use, jnp.broadcast_to(scale, self.shape))
        scale, labels = labelled(scale, use.weight_shape, weight_labels)
        return [Factor(scale, tuple(labels))]


def ntk_by_structure(
    network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None, per_leaf: bool
) -> list[Any]:
    """Returns, of every array of the parameters, the tangent kernels of two batches: sums over its uses."""

    def function_of(batch: Batch) -> tuple[Function, list[Any]]:
        perturbed = Perturbed(lambda w: sample_outputs(network.f, w, batch, batch_axes), network.weights)
        return perturbed, perturbed.zeros

    outputs1, uses1 = differentiate(function_of, batch1, batch_axes)
    outputs2, uses2 = (outputs1, uses1) if batch2 is batch1 else differentiate(function_of, batch2, batch_axes)

    def of_array(number: int) -> Any:
        array = Array(jnp.shape(network.weights[number]), network.scales[number])

        def kernel(output: OutputAxes, y1: Differentiated, y2: Differentiated) -> jax.Array:
            total = _of_array(output, _paths(y1, uses1, number), _paths(y2, uses2, number), array)
            if total is None:
                return output.contract(jnp.zeros_like(y1.value), jnp.zeros_like(y2.value))
            return output.symmetric(total) if batch2 is batch1 else total

        return kernels_of(kernel, outputs1, outputs2, layout)

    return [of_array(number) for number in range(len(network.weights))]


def _paths(y: Differentiated, uses: list[tuple[Use, ...]], parameter: int) -> list[Path]:
    """Returns all ways from a parameter to an output."""
    return [
        Path(cotangents, use, y.samples_at)
        for cotangents, of_value in zip(y.jacobian, uses, strict=True)
        for use in of_value
        if use.parameter == parameter
    ]


def _of_array(output: OutputAxes, paths1: list[Path], paths2: list[Path], array: Array) -> jax.Array | None:
    """Returns the part of a kernel that is due to one array of the parameters, None if that is 0."""
    pairs = [(a, b) for a, b in itertools.product(paths1, paths2) if not a.use.apart(b.use)]
    if not pairs:
        return None
    alike = all(a.use.steps == b.use.steps for a, b in pairs)
    # A parameter with many uses, as in a loop, has too many pairs of them.
    if alike and len(pairs) <= 2 * max(len(paths1), len(paths2)):
        return functools.reduce(jnp.add, (_of_pair(output, a, b, array) for a, b in pairs))
    jacobian1, jacobian2 = (
        functools.reduce(jnp.add, (_jacobian(path, output.ndim, array.shape) for path in paths))
        for paths in (paths1, paths2)
    )
    return output.contract(jacobian1, jacobian2, array.scale)


def _of_pair(output: OutputAxes, path1: Path, path2: Path, array: Array) -> jax.Array:
    """Returns the part of a kernel that is due to two uses of an array; the einsum finds the order of products."""
    unused, use = itertools.count(2 * output.ndim), path1.use
    weight_labels = list(itertools.islice(unused, len(use.weight_axes)))
    factors1 = path1.factors(output.labels1, weight_labels, unused)
    factors2 = path2.factors(output.labels2, weight_labels, unused)
    factors2 += array.scale_at(use, weight_labels)
    equal_terms = math.prod(
        size
        for label, size in zip(weight_labels, use.weight_shape, strict=True)
        if not any(factor.has(label) for factor in (*factors1, *factors2))
    )
    factors = _with_equalities(factors1, factors2)
    total = sum_of_products([(factor.array, factor.labels) for factor in factors], output.labels_of_kernel)
    return total * (equal_terms / output.size_of_traced(path1.cotangents.shape))


def _with_equalities(factors1: list[Factor], factors2: list[Factor]) -> list[Factor]:
    """Returns all factors, none with `chosen`: of rows of one table it only matters whether they are the same."""
    factors = [*factors1, *factors2]
    for a, b in itertools.product(factors1, factors2):
        if a.chosen is None or a.chosen != b.chosen:
            continue
        label, others = a.chosen[0], [factor for factor in factors if factor is not a and factor is not b]
        if all(_can_be_at(label, a, factor) for factor in others):
            rows1 = jnp.expand_dims(a.array, range(a.array.ndim, a.array.ndim + b.array.ndim))
            rows2 = jnp.expand_dims(b.array, range(a.array.ndim))
            equal = Factor((rows1 == rows2) & (rows1 >= 0), (*a.labels, *b.labels))
            factors = [equal, *(_at(label, a, factor) for factor in others)]
    return [factor.written_out() for factor in factors]


def _can_be_at(label: int, rows: Factor, factor: Factor) -> bool:
    """Whether a factor has, at some rows of a table, no more axes than its own and those of the rows."""
    return not factor.has(label) or (factor.chosen is None and not set(factor.labels) & set(rows.labels))


def _at(label: int, rows: Factor, factor: Factor) -> Factor:
    """Returns a factor at some rows of a table."""
    if label not in factor.labels:
        return factor
    axis = factor.labels.index(label)
    array = jnp.take(factor.array, rows.array, axis=axis, mode="clip")
    return Factor(array, (*factor.labels[:axis], *rows.labels, *factor.labels[axis + 1 :]))


def _jacobian(path: Path, ndim: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns the derivative of an output with `ndim` axes by a parameter of a shape, by one way."""
    unused, use = itertools.count(ndim), path.use
    weight_labels = list(itertools.islice(unused, len(use.weight_axes)))
    factors = [factor.written_out() for factor in path.factors(list(range(ndim)), weight_labels, unused)]
    present = [label for label in weight_labels if any(label in factor.labels for factor in factors)]
    jacobian = sum_of_products([(f.array, f.labels) for f in factors], [*range(ndim), *present])
    jacobian = jnp.expand_dims(jacobian, [label for label in weight_labels if label not in present])
    of_output = jacobian.shape[:ndim]
    jacobian = jnp.broadcast_to(jacobian, (*of_output, *use.weight_shape))
    if not use.steps:
        return jacobian
    example = varying(jnp.zeros(shape, jacobian.dtype), varying_axes(jacobian))
    put_back = jax.linear_transpose(functools.partial(_taken, use), example)
    rows = jax.vmap(lambda entries: put_back(entries)[0])(jacobian.reshape(-1, *use.weight_shape))
    return rows.reshape(*of_output, *shape)


def _taken(use: Use, array: jax.Array) -> jax.Array:
    """Returns what of an array enters at a use."""
    return functools.reduce(lambda entries, step: step(entries), use.steps, array)
