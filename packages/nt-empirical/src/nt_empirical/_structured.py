"""The tangent kernel from the structure of the equations that parameters enter."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from nt_core.manual import varying, varying_axes

from nt_empirical._axes import Layout, OutputAxes
from nt_empirical._batches import Batch
from nt_empirical._cotangents import cotangents_of
from nt_empirical._factors import Factor, new_labels, product
from nt_empirical._jacobian import Differentiated, differentiate, kernels_of
from nt_empirical._parameters import Parametrised, labelled
from nt_empirical._perturbation import Perturbed
from nt_empirical._uses import Use
from nt_empirical._vmap import BatchAxes, sample_outputs


class Array(NamedTuple):
    """An array of the parameters.

    Attributes:
      shape: its shape.
      scale: broadcasts to it, see `Parametrised`.
    """

    shape: tuple[int, ...]
    scale: jax.Array | None

    def scale_at(self, use: Use) -> list[Factor]:
        """Returns the scale of what enters at a use; none if it is 1."""
        if self.scale is None:
            return []
        scale = self.scale
        if use.steps and scale.ndim:
            scale = _taken(use, jnp.broadcast_to(scale, self.shape))
        scale, labels = labelled(scale, use.weight_shape, use.weight_axes)
        return [Factor(scale, tuple(labels))]


def ntk_by_structure(
    network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None, per_leaf: bool
) -> list[Any]:
    """Returns, of every array of the parameters, the tangent kernels of two batches: sums over its uses."""

    def uses(batch: Batch) -> tuple[Any, list[list[Use]]]:
        perturbed = Perturbed(lambda w: sample_outputs(network.f, w, batch, batch_axes), network.weights)
        return _uses_of_outputs(perturbed)

    outputs1 = differentiate(uses, batch1, batch_axes)
    outputs2 = outputs1 if batch2 is batch1 else differentiate(uses, batch2, batch_axes)

    def of_array(number: int) -> Any:
        array = Array(jnp.shape(network.weights[number]), network.scales[number])

        def kernel(output: OutputAxes, y1: Differentiated, y2: Differentiated) -> jax.Array:
            total = _of_array(output, y1, y2, number, array)
            if total is None:
                return output.contract(jnp.zeros_like(y1.value), jnp.zeros_like(y2.value))
            return output.symmetric(total) if batch2 is batch1 else total

        return kernels_of(kernel, outputs1, outputs2, layout)

    return [of_array(number) for number in range(len(network.weights))]


def _uses_of_outputs(perturbed: Perturbed) -> tuple[Any, list[list[Use]]]:
    """Returns the outputs of a network, and for each of them all ways in which parameters change it."""
    outputs, pull_back, uses = jax.vjp(perturbed, perturbed.zeros, has_aux=True)
    leaves, structure = jax.tree.flatten(outputs)

    def of_leaf(which: int) -> list[Use]:
        def of_output(cotangent: jax.Array) -> list[jax.Array]:
            everything = [cotangent if i == which else jnp.zeros_like(y) for i, y in enumerate(leaves)]
            return pull_back(structure.unflatten(everything))[0]

        cotangents = cotangents_of(of_output, leaves[which])
        return [
            use.carried_to_output(cotangent, jnp.promote_types(leaves[which].dtype, jnp.float32))
            for cotangent, of_value in zip(cotangents, uses, strict=True)
            if cotangent is not None
            for use in of_value
        ]

    return outputs, [of_leaf(which) for which in range(len(leaves))]


class Way(NamedTuple):
    """A way from a parameter to an output: an einsum, `weight_axes, factors -> axes of the output`.

    Attributes:
      use: of the parameter by the output; of one sample, if samples were differentiated one by one.
      factors: those of `use`, with the samples among their axes.
    """

    use: Use
    factors: tuple[Factor, ...]


def _ways(y: Differentiated, parameter: int, output_labels: Sequence[int]) -> list[Way]:
    """Returns all ways from a parameter to an output, whose axes get these labels, and all others new ones."""
    return [_way(use, y, output_labels) for use in y.derivatives if use.parameter == parameter]


def _way(use: Use, y: Differentiated, output_labels: Sequence[int]) -> Way:
    samples = () if y.samples_at is None else (output_labels[y.samples_at],)
    of_sample = [label for axis, label in enumerate(output_labels) if axis != y.samples_at]
    name = dict(zip(use.axes, of_sample, strict=True))
    for label in (*use.weight_axes, *(label for factor in use.factors for label in factor.all_labels)):
        if label not in name:
            (name[label],) = new_labels(1)
    named = [factor.named(name) for factor in use.factors]
    factors = [dataclasses.replace(factor, labels=(*samples, *factor.labels)) for factor in named]
    # Axes along which all numbers of the output change alike.
    alike = [i for i, label in enumerate(output_labels) if not any(factor.has(label) for factor in factors)]
    factors += [Factor(jnp.ones(y.value.shape[i], y.value.dtype), (output_labels[i],)) for i in alike]
    return Way(use.replace(weight_axes=tuple(name[label] for label in use.weight_axes)), tuple(factors))


def _of_array(
    output: OutputAxes, y1: Differentiated, y2: Differentiated, parameter: int, array: Array
) -> jax.Array | None:
    """Returns the part of a kernel that is due to one array of the parameters, None if that is 0."""
    new = new_labels(2 * output.ndim)
    labels1, labels2, labels_of_kernel = (
        [new[label] for label in labels] for labels in (output.labels1, output.labels2, output.labels_of_kernel)
    )
    ways1, ways2 = _ways(y1, parameter, labels1), _ways(y2, parameter, labels2)
    pairs = [(a, b) for a, b in itertools.product(ways1, ways2) if not a.use.apart(b.use)]
    if not pairs:
        return None
    alike = all(a.use.steps == b.use.steps for a, b in pairs)
    # A parameter with many uses, as in a loop, has too many pairs of them.
    if alike and len(pairs) <= 2 * max(len(ways1), len(ways2)):
        total = functools.reduce(jnp.add, (_of_pair(a, b, array, labels_of_kernel) for a, b in pairs))
        return total / output.size_of_traced(y1.value.shape)
    jacobian1, jacobian2 = (
        functools.reduce(jnp.add, (_jacobian(way, labels, array.shape) for way in ways))
        for ways, labels in ((ways1, labels1), (ways2, labels2))
    )
    return output.contract(jacobian1, jacobian2, array.scale)


def _of_pair(way1: Way, way2: Way, array: Array, labels_of_kernel: Sequence[int]) -> jax.Array:
    """Returns the sum of the products of two ways from an array; the einsum finds the order of products."""
    weight_axes, shape = way1.use.weight_axes, way1.use.weight_shape
    same = dict(zip(way2.use.weight_axes, weight_axes, strict=True))
    factors2 = [*(factor.named(same) for factor in way2.factors), *array.scale_at(way1.use)]
    repeated = math.prod(
        size
        for label, size in zip(weight_axes, shape, strict=True)
        if not any(factor.has(label) for factor in (*way1.factors, *factors2))
    )
    total = product(_with_equalities(way1.factors, factors2), labels_of_kernel).array
    return total if repeated == 1 else total * repeated


def _with_equalities(factors1: Sequence[Factor], factors2: Sequence[Factor]) -> list[Factor]:
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


def _jacobian(way: Way, output_labels: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Returns the derivative of an output by a parameter of a shape, by one way."""
    use, ndim = way.use, len(output_labels)
    factors = [factor.written_out() for factor in way.factors]
    present = [label for label in use.weight_axes if any(factor.has(label) for factor in factors)]
    jacobian = product(factors, [*output_labels, *present]).array
    absent = [ndim + axis for axis, label in enumerate(use.weight_axes) if label not in present]
    of_output = jacobian.shape[:ndim]
    jacobian = jnp.broadcast_to(jnp.expand_dims(jacobian, absent), (*of_output, *use.weight_shape))
    if not use.steps:
        return jacobian
    example = varying(jnp.zeros(shape, jacobian.dtype), varying_axes(jacobian))
    put_back = jax.linear_transpose(functools.partial(_taken, use), example)
    rows = jax.vmap(lambda entries: put_back(entries)[0])(jacobian.reshape(math.prod(of_output), *use.weight_shape))
    return rows.reshape(*of_output, *shape)


def _taken(use: Use, array: jax.Array) -> jax.Array:
    """Returns what of an array enters at a use."""
    return functools.reduce(lambda entries, step: step(entries), use.steps, array)
