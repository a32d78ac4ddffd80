"""What a cell of a kernel matrix takes of the arguments of a kernel function, and what it gives to the result."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nt_core.get import as_named, parse_get
from nt_core.grid import Cell, Grid, mirrored, swapped
from nt_core.kernel import Kernel
from nt_core.keywords import is_absent, is_array, split_kwargs
from nt_core.layer import is_of_layer
from nt_core.pytrees import register_dataclass
from nt_core.requirements import NO_REQUIREMENTS, resolve
from nt_core.spec import Spec
from nt_core.trees import nt_tree_leaves, nt_tree_map

_KERNEL_FIELDS = tuple(field.name for field in dataclasses.fields(Kernel))
# Fields with the samples of one batch along their first axis, and a number for both batches. All others that are arrays
# have the samples of both batches along their first two axes.
_OF_FIRST, _OF_SECOND = ("cov1", "mask1"), ("cov2", "mask2")
_FLAG = "x1_is_x2"
# Fields that say how the others are laid out.
_LAYOUT = ("batch_axis", "diagonal_batch", "diagonal_spatial", "shape1", "shape2")


class NotCut(ValueError):
    """The samples of some argument or result cannot be told."""


class _AnArray:
    """Stands where an array was."""


@jax.tree_util.register_pytree_node_class
class Mixed:
    """A tree of which arrays are the leaves, and anything else belongs to the structure: flags stay what they are."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def tree_flatten(self) -> tuple[list[Any], tuple[Any, tuple[Any, ...]]]:
        """Returns the arrays, and the rest."""
        leaves, structure = jax.tree.flatten(self.tree)
        arrays = [leaf for leaf in leaves if _is_data(leaf)]
        return arrays, (structure, tuple(_AnArray if _is_data(leaf) else leaf for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, tuple[Any, ...]], arrays: Sequence[Any]) -> "Mixed":
        """Inverts `tree_flatten`."""
        structure, leaves = static
        remaining = iter(arrays)
        return cls(structure.unflatten(next(remaining) if leaf is _AnArray else leaf for leaf in leaves))


def _is_data(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


# ---- arguments


class Taken(NamedTuple):
    """What a cell takes of a `Call`; or several cells, along the first axis of all arrays."""

    first: Mixed
    second: Mixed
    pairs: Mixed
    at: Any  # the place of the cell


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a kernel function, sorted by the samples that they belong to.

    Attributes:
      n1, n2: sizes of the batches.
      symmetric: the second batch is the first.
      knows_samples: the kernel of a sample with itself is not that of two equal ones (dropout).
      first, second: trees of what has the samples of one batch along the first axis of its arrays.
      pairs: tree of what has the samples of both along the first two.
      common: tree of what all cells get.
    """

    n1: int
    n2: int
    symmetric: bool
    knows_samples: bool
    first: Mixed
    second: Mixed
    pairs: Mixed
    common: Mixed

    @classmethod
    def of(cls, kernel_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Sorts the arguments of a call."""
        x1, x2, named, extra, keywords = _bind(kernel_fn, args, kwargs)
        layout = resolve(attribute(kernel_fn, "input_req") or NO_REQUIREMENTS)
        takes_kernels = is_absent(x2) and all(isinstance(leaf, Kernel) for leaf in nt_tree_leaves(x1))
        symmetric = all(k.cov2 is None for k in nt_tree_leaves(x1)) if takes_kernels else is_absent(x2)
        keys = None
        if keywords.get("rng") is not None:
            keys = [k["rng"] for k in split_kwargs({"rng": keywords.pop("rng")}, x1, x2)]
        first, second, shared = _sort_keywords(keywords)
        if symmetric:
            second = first
        pairs, specs, tree = [], None, None
        if takes_kernels:
            kernels = nt_tree_leaves(x1)
            specs, tree = [(k.spec, k.x1_is_x2) for k in kernels], _numbered(x1)
            first, second, pairs = _samples_of_kernels(kernels, first, second)
        else:
            first = (_move_axis(x1, layout["batch_axis"], 0), first)
            second = first if symmetric else (_move_axis(x2, layout["batch_axis"], 0), second)
        n1, n2 = pairs[0]["nngp"].shape[:2] if takes_kernels else (_n_samples(first, "x1"), _n_samples(second, "x2"))
        common = {
            "named": named,
            "extra": extra,
            "keywords": shared,
            "keys": keys,
            "specs": specs,
            "tree": tree,
            "batch_axis": layout["batch_axis"],
            "symmetric": symmetric,
            "sizes": (n1, n2),
            "is_network": is_of_layer(kernel_fn),
        }
        knows_samples = keys is not None or bool(layout["use_dropout"])
        return cls(n1, n2, symmetric, knows_samples, Mixed(first), Mixed(second), Mixed(pairs), Mixed(common))

    def take(self, rows: Any, columns: Any, at: Any) -> Taken:
        """Returns what some cells take.

        Args:
          rows, columns: numbers of the samples, `(cells, samples of a cell)`.
          at: the place of each cell, `(cells, 2)`.
        """

        def of_batch(index: Any) -> Callable[[Any], Any]:
            return lambda a: a[index] if a.ndim else _repeated(a, len(index))

        def of_pairs(a: Any) -> Any:
            return a[rows[:, :, None], columns[:, None, :]] if a.ndim else _repeated(a, len(rows))

        first, second = (jax.tree.map(of_batch(i), x) for i, x in ((rows, self.first), (columns, self.second)))
        return Taken(first, second, jax.tree.map(of_pairs, self.pairs), at)


register_dataclass(Call, ["first", "second", "pairs", "common"], ["n1", "n2", "symmetric", "knows_samples"])


def attribute(kernel_fn: Callable[..., Any], name: str) -> Any:
    """Returns what a kernel function says about itself, also through wrappers such as `jax.jit`; None if nothing."""
    return getattr(kernel_fn, name, getattr(inspect.unwrap(kernel_fn), name, None))


def _bind(kernel_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Returns x1, x2, what goes to declared parameters as `(name, value)`, other positional arguments, and keywords."""
    bound = inspect.signature(kernel_fn).bind(*args, **kwargs)
    bound.apply_defaults()
    named, extra, keywords = [], (), {}
    for name, parameter in bound.signature.parameters.items():
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            extra = value
        elif parameter.kind is parameter.VAR_KEYWORD:
            keywords.update(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords[name] = value
        else:
            named.append((name, value))
    if len(named) < 2:
        raise TypeError(f"A kernel function takes two batches as its first arguments, got {bound.signature}.")
    (_, x1), (_, x2), *named = named
    return x1, x2, named, extra, keywords


def _sort_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the keywords that go with the samples of each batch, and those that go to all cells."""
    first, second, shared = {}, {}, {}
    for name, value in keywords.items():
        if not any(is_array(leaf) and leaf.ndim for leaf in jax.tree.leaves(value)):
            shared[name] = value
        elif isinstance(value, tuple) and len(value) == 2:
            first[name], second[name] = value
        else:
            raise NotCut(
                f"Cell by cell, the array `{name}` must be given as a tuple of two arrays, for x1 and x2, with the "
                "samples along their first axis."
            )
    return first, second, shared


def _samples_of_kernels(kernels: list[Kernel], first: Any, second: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Returns what of kernels and keywords goes with the samples of each batch, and with pairs of them."""
    of_first, of_second, pairs = [], [], []
    for kernel in kernels:
        if not kernel.diagonal_batch:
            raise NotImplementedError(
                "The kernel has covariances between all samples of a batch (diagonal_batch=False), which go across "
                "cells. Batch kernels with diagonal_batch=True."
            )
        axis, (n1, n2) = kernel.batch_axis, kernel.nngp.shape[:2]
        second_batch = kernel if kernel.cov2 is not None else kernel.slice(slice(None), slice(None))
        of_first.append({"cov1": kernel.cov1, "mask1": _mask_of_samples(kernel.mask1, axis, n1)})
        of_second.append({"cov2": second_batch.cov2, "mask2": _mask_of_samples(second_batch.mask2, axis, n2)})
        pairs.append({"nngp": kernel.nngp, "ntk": kernel.ntk})
    return (of_first, first), (of_second, second), pairs


def _mask_of_samples(mask: Any, batch_axis: int, n: int) -> Any:
    """Returns a mask with the samples along the first axis, all written out."""
    if mask is None:
        return None
    mask = jnp.moveaxis(mask, batch_axis, 0)
    return jnp.broadcast_to(mask, (n, *mask.shape[1:]))


def _move_axis(x: Any, source: int, destination: int) -> Any:
    """Moves the axis of the samples of all arrays."""
    if source == destination:
        return x
    return jax.tree.map(lambda a: jnp.moveaxis(a, source, destination) if is_array(a) and a.ndim else a, x)


def _numbered(tree: Any) -> Any:
    numbers = iter(range(len(nt_tree_leaves(tree))))
    return nt_tree_map(lambda _: next(numbers), tree)


def _n_samples(batch: Any, name: str) -> int:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if is_array(leaf) and leaf.ndim}
    if len(sizes) != 1:
        raise NotCut(
            f"Cell by cell, all arrays of `{name}`, and those among the keywords that go with it, must have the same "
            f"size along their first axis, got sizes {sorted(sizes)}."
        )
    return sizes.pop()


def _repeated(a: Any, n: int) -> Any:
    return jnp.broadcast_to(a, (n,))


# ---- a cell


@dataclasses.dataclass(frozen=True)
class Shape:
    """What cells are computed together.

    Attributes:
      rows: samples of the first batch.
      columns: samples of the second batch.
      kept: how many of the columns are kept.
      alone: the second batch is the first.
    """

    rows: int
    columns: int
    kept: int
    alone: bool = False


def compute_cell(kernel_fn: Callable[..., Any], shape: Shape, taken: Taken, common: Mixed) -> Mixed:
    """Computes one cell.

    Args:
      kernel_fn: the kernel function.
      shape: of the cell.
      taken: what it takes of a `Call`.
      common: that of the call.

    Returns:
      Kernels as dicts of their fields, and how to put them together again; see `finish`.
    """
    (x1, keywords1), (x2, keywords2) = taken.first.tree, taken.second.tree
    call, at = common.tree, taken.at
    keywords = dict(call["keywords"])
    keywords.update({name: (keywords1[name], keywords2[name]) for name in keywords1})
    if call["keys"] is not None:
        # The children of `fold_in(rng, 2)`: `rng` itself and `fold_in(rng, 1)` may be the keys of x1 and x2.
        keys = [jax.random.fold_in(jax.random.fold_in(key, 2), i) for key, i in zip(call["keys"], at, strict=True)]
        keywords["rng"] = tuple(keys)
    if call["specs"] is None:
        x1, x2 = (_move_axis(x, 0, call["batch_axis"]) for x in (x1, x2))
        x2 = None if shape.alone else x2
    else:
        same = shape.alone or (not call["symmetric"] and at[0] == at[1])
        cells = zip(call["specs"], x1, x2, taken.pairs.tree, strict=True)
        kernels = [_kernel(spec, flag & same, fields, shape) for (spec, flag), *fields in cells]
        x1, x2 = nt_tree_map(lambda number: kernels[number], call["tree"]), None
    get = dict(call["named"]).get("get", keywords.get("get"))
    named = [_and_layout(value) if name == "get" and call["is_network"] else value for name, value in call["named"]]
    leaves, structure = jax.tree.flatten(kernel_fn(x1, x2, *named, *call["extra"], **keywords), is_leaf=_is_kernel)
    return Mixed(
        {
            "fields": [_normalised(_fields(value, get), shape, call) for value in leaves],
            "types": [type(value) if _is_kernel(value) else None for value in leaves],
            "structure": structure,
            "get": get if call["is_network"] else None,
        }
    )


def _kernel(spec: Spec, flag: Any, fields: list[dict[str, Any]], shape: Shape) -> Kernel:
    """Returns the kernel of a cell."""
    first, second, pairs = fields
    axis = spec.batch_axis
    if shape.alone:
        second = dict.fromkeys(second)
    mask1, mask2 = (None if m is None else jnp.moveaxis(m, 0, axis) for m in (first["mask1"], second["mask2"]))
    spec = spec.replace(
        shape1=_with_size(spec.shape1, axis, shape.rows), shape2=_with_size(spec.shape2, axis, shape.columns)
    )
    return Kernel.from_spec(
        spec, **pairs, cov1=first["cov1"], cov2=second["cov2"], x1_is_x2=flag, mask1=mask1, mask2=mask2
    )


def _with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return shape[:axis] + (size,) + shape[axis + 1 :]


def _and_layout(get: Any) -> Any:
    """Returns what to ask a network for: what `get` says, and how it is laid out."""
    if get is None:
        return None
    names = parse_get(get, _KERNEL_FIELDS)
    return names + tuple(name for name in _LAYOUT if name not in names)


def _is_kernel(value: Any) -> bool:
    """Whether this has fields of a `Kernel`, by name."""
    return isinstance(value, Kernel) or set(getattr(value, "_fields", ["none"])) <= set(_KERNEL_FIELDS)


def _fields(value: Any, get: Any) -> dict[str, Any]:
    if isinstance(value, Kernel):
        return value.asdict()
    if _is_kernel(value):
        return value._asdict()
    return {get.lower() if isinstance(get, str) and get.lower() in _KERNEL_FIELDS else "nngp": value}


def _normalised(fields: dict[str, Any], shape: Shape, call: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a cell in a form that is the same for all cells of a call."""
    axis, (n1, n2) = fields.get("batch_axis", 0), call["sizes"]
    fields = dict(fields)
    for name, value in fields.items():
        if name in ("shape1", "shape2"):
            fields[name] = _with_size(value, axis, n1 if name == "shape1" else n2)
        elif name == _FLAG:  # of the two batches, not of cells that may look alike
            is_known = (call["symmetric"] and call["specs"] is None) or n1 != n2
            fields[name] = jnp.asarray(call["symmetric"] if is_known else value)
        elif name in _OF_SECOND and call["symmetric"]:
            fields[name] = None
        elif is_array(value) and value.ndim > 0:
            _check(name, value, fields, shape)
            if name in ("mask1", "mask2"):
                value = _mask_of_samples(value, axis, shape.rows if name == "mask1" else shape.columns)
            if name in _OF_SECOND:
                value = value[: shape.kept]
            elif name not in _OF_FIRST:
                value = value[:, : shape.kept]
            fields[name] = value
    return fields


def _check(name: str, value: Any, fields: dict[str, Any], shape: Shape) -> None:
    if name in ("cov1", "cov2") and not fields.get("diagonal_batch", True):
        raise NotImplementedError(
            f"With diagonal_batch=False, {name} goes across cells. Ask for other fields, such as get=('nngp', 'ntk'), "
            "or leave diagonal_batch unset."
        )
    expected = {"cov1": (shape.rows,), "cov2": (shape.columns,)}.get(name, (shape.rows, shape.columns))
    if name not in ("mask1", "mask2") and value.shape[: len(expected)] != expected:
        raise NotCut(
            f"For {shape.rows} and {shape.columns} samples a kernel must have these as its first axes, but `{name}` "
            f"has shape {value.shape}. Cell by cell, the samples are along the first axis of inputs and outputs."
        )


# ---- results


def mirror_axes(kernel_fn: Callable[..., Any], cells: dict[str, Any]) -> dict[str, Any]:
    """Returns for each covariance of two batches the pairs of axes that its mirror image has exchanged.

    None where they are not known.

    Args:
      kernel_fn: the kernel function; its attribute `axis_pairs`, if there is one, takes a number of axes and tells.
      cells: fields of some cells, which are along the first axis.
    """
    axis_pairs = attribute(kernel_fn, "axis_pairs") or (lambda ndim: [(0, 1)] if ndim == 2 else None)
    if "diagonal_spatial" in cells:
        diagonal = cells["diagonal_spatial"]
        axis_pairs = lambda ndim: [(axis, axis + 1) for axis in range(0, 2 if diagonal else ndim, 2)]  # noqa: E731
    return {
        name: axis_pairs(value.ndim - 1)
        for name, value in cells.items()
        if name not in _OF_FIRST + _OF_SECOND and hasattr(value, "ndim") and value.ndim > 1
    }


def start(grid: Grid, cell: dict[str, Any]) -> dict[str, Any]:
    """Returns a kernel, in the memory of the CPU, to `put` cells into.

    Args:
      grid: the cells.
      cell: the fields of one of them, as `compute_cell` returns them.
    """

    def empty(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.ndim == 0:
            return value
        n_samples, shape = (grid.n1, grid.n2), value.shape[2:]
        if name in _OF_FIRST + _OF_SECOND:
            n_samples, shape = (n_samples[name in _OF_SECOND],), value.shape[1:]
        return np.empty(n_samples + shape, value.dtype)

    return {name: empty(name, value) for name, value in cell.items()}


def put(kernel: dict[str, Any], grid: Grid, place: Cell, cell: dict[str, Any], axes: dict[str, Any]) -> None:
    """Puts a cell into a kernel in the memory of the CPU, and its mirror image.

    Args:
      kernel: made by `start`.
      grid: the cells.
      place: that of the cell.
      cell: its fields.
      axes: of a symmetric grid, those that the mirror image of each covariance has exchanged.
    """
    rows, columns = grid.samples(place)
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
    for name, value in cell.items():
        if name == _FLAG and place[0] == place[1]:
            kernel[name] = kernel[name] & value
        elif not isinstance(value, np.ndarray) or value.ndim == 0:
            pass
        elif name in _OF_FIRST:
            kernel[name][rows] = value[:n_rows]
        elif name in _OF_SECOND:
            kernel[name][columns] = value[:n_columns]
        elif not grid.symmetric:
            kernel[name][rows, columns] = value[:n_rows, :n_columns]
        elif place[0] == place[1]:
            kernel[name][rows, rows] = mirrored(value[:n_rows, :n_rows], axes[name])
        else:
            kernel[name][rows, columns] = value[:n_rows, :n_columns]
            kernel[name][columns, rows] = swapped(value[:n_rows, :n_columns], axes[name])


def join(grid: Grid, cells: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    """Returns the kernel that all cells make, in their order along the first axis of all arrays; as for `put`."""
    numbers = {cell: number for number, cell in enumerate(grid.cells())}
    of_rows = np.array([numbers[i, i if grid.symmetric else 0] for i in range(grid.shape[0])])
    of_columns = np.array([numbers[0, j] for j in range(grid.shape[1])])
    on_diagonal = np.array([number for (i, j), number in numbers.items() if i == j])

    def joined(name: str, value: Any) -> Any:
        if not is_array(value):
            return value
        if name == _FLAG:
            return jnp.all(value[on_diagonal])
        if value.ndim == 1:
            return value[0]
        if name in _OF_FIRST + _OF_SECOND:
            n, blocks = (grid.n1, of_rows) if name in _OF_FIRST else (grid.n2, of_columns)
            return value[blocks].reshape(-1, *value.shape[2:])[:n]
        matrix = grid.join(value)
        return mirrored(matrix, axes[name]) if grid.symmetric else matrix

    return {name: joined(name, value) for name, value in cells.items()}


def finish(out: dict[str, Any], kernels: list[dict[str, Any]]) -> Any:
    """Returns what the kernel function returns, of the fields of all its kernels.

    Args:
      out: what `compute_cell` returned, of which the fields do not matter.
      kernels: the fields, for all samples.
    """
    values = [_value(type_, fields, out["get"]) for type_, fields in zip(out["types"], kernels, strict=True)]
    return out["structure"].unflatten(values)


def _value(type_: type | None, fields: dict[str, Any], get: Any) -> Any:
    axis = fields.get("batch_axis", 0)
    masks = {name: jnp.moveaxis(fields[name], 0, axis) for name in ("mask1", "mask2") if fields.get(name) is not None}
    fields = {**fields, **masks}
    if get is not None:
        return as_named(get, "AnalyticKernel", {name: fields[name] for name in parse_get(get, _KERNEL_FIELDS)})
    return next(iter(fields.values())) if type_ is None else type_(**fields)
