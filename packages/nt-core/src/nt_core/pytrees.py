"""Dataclasses as pytrees."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def static(**kwargs: Any) -> Any:
    """A field that is part of the structure of a pytree, not one of its leaves."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree_dataclass(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass and a pytree of its fields, but for those declared with `static()`."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    structure = [f.name for f in fields if f.metadata.get("static")]
    return register_dataclass(cls, [f.name for f in fields if f.name not in structure], structure)


def register_dataclass(cls: type[_T], data_fields: Sequence[str], meta_fields: Sequence[str]) -> type[_T]:
    """Registers a dataclass as a pytree of its `data_fields`; the `meta_fields` belong to its structure.

    In the place of `jax.tree_util.register_dataclass`, with which (JAX 0.10 to 0.12 at least) the structures of two
    classes compare equal if their fields do: `jax.jit` tells them apart by their hashes alone, and once in a hundred
    processes runs the program that was compiled for the other class.

    >>> import dataclasses, jax
    >>> @dataclasses.dataclass
    ... class Sine:
    ...     scale: float
    >>> @dataclasses.dataclass
    ... class Cosine:
    ...     scale: float
    >>> sine, cosine = (register_dataclass(c, ["scale"], [])(1.0) for c in (Sine, Cosine))
    >>> jax.tree.structure(sine) == jax.tree.structure(cosine)
    False
    """

    def flatten(value):
        return [getattr(value, name) for name in data_fields], tuple(getattr(value, name) for name in meta_fields)

    def flatten_with_keys(value):
        data, meta = flatten(value)
        return [(GetAttrKey(name), leaf) for name, leaf in zip(data_fields, data, strict=True)], meta

    def unflatten(meta, data):
        return cls(**dict(zip(meta_fields, meta, strict=True)), **dict(zip(data_fields, data, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def replace_leaves(tree: Any, leaves: dict[int, Any]) -> Any:
    """Returns a tree with some leaves, by their numbers, replaced.

    >>> replace_leaves({"a": 1, "b": (2, 3)}, {2: 4})
    {'a': 1, 'b': (2, 4)}
    """
    old, structure = jax.tree.flatten(tree)
    return structure.unflatten([leaves.get(i, leaf) for i, leaf in enumerate(old)])
