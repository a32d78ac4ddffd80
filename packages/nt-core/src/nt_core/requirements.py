"""What a layer asks of the covariances that reach it, and how the demands of several layers combine.

A layer that reads only same-position covariances lets the whole network store only those, which is H x W times less
memory and work. Whether that is allowed is decided once for the network, from the demands of its layers.
"""

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar


class Bool(enum.IntEnum):
    """A three-valued answer, ordered `NO < MAYBE < YES`.

    >>> Bool.NO < Bool.MAYBE < Bool.YES
    True
    """

    NO = 0
    MAYBE = 1
    YES = 2


class Diagonal(NamedTuple):
    """Whether a layer can work with same-position (diagonal) covariances only.

    `input` answers whether its inputs may be diagonal (`MAYBE`: only if the entries off the diagonal vanish), `output`
    whether whatever follows may be. `a >> b` is the demand of layer `a` followed by layer `b`; `a & b` that of two
    parallel branches.

    >>> conv, flatten = Diagonal(Bool.YES, Bool.NO), Diagonal(Bool.YES, Bool.YES)
    >>> bool(conv), bool(conv >> flatten)
    (False, True)
    """

    input: Bool = Bool.YES
    output: Bool = Bool.NO

    def __rshift__(self, other: "Diagonal") -> "Diagonal":
        if self.output == Bool.YES:
            return self
        if self.output > Bool.NO and other.input > Bool.NO:
            return Diagonal(self.input, other.output)
        if self.output == Bool.NO and other.input < Bool.YES:
            return Diagonal(Bool.NO, other.output)
        return Diagonal(min(self.input, other.input), other.output)

    def __lshift__(self, other: "Diagonal") -> "Diagonal":
        return other >> self

    def __and__(self, other: "Diagonal") -> "Diagonal":
        return Diagonal(min(self.input, other.input), min(self.output, other.output))

    def __bool__(self) -> bool:
        return self.input == Bool.YES and self.output > Bool.NO


Requirements = Mapping[str, Any]
NO_REQUIREMENTS: Requirements = MappingProxyType({})
DEFAULTS: Requirements = MappingProxyType(
    {"diagonal_batch": True, "diagonal_spatial": False, "batch_axis": 0, "channel_axis": -1, "use_dropout": False}
)


def in_series(*requirements: Requirements) -> Requirements:
    """Returns the requirements of layers applied one after another."""
    combined: dict[str, Any] = {}
    for requirement in requirements:
        for name, value in requirement.items():
            _check_name(name)
            if name not in combined:
                combined[name] = value
            elif name == "diagonal_spatial":
                combined[name] = combined[name] >> value
            elif name == "diagonal_batch":
                combined[name] = combined[name] and value
            elif name == "use_dropout" and combined[name] != value:
                raise ValueError(
                    "The Dropout layers of one network must all be in the same mode, got both 'train' and 'test'."
                )
            # The first layer that names its batch and channel axes sees the inputs; later axes may have moved.
    return MappingProxyType(combined)


def in_parallel(*requirements: Requirements) -> Requirements:
    """Returns the requirements of branches that are applied side by side."""
    combined: dict[str, Any] = {}
    for requirement in requirements:
        for name, value in requirement.items():
            _check_name(name)
            if name not in combined:
                combined[name] = value
            elif name == "diagonal_spatial":
                combined[name] = combined[name] & value
            elif name == "diagonal_batch":
                combined[name] = combined[name] and value
            elif name == "use_dropout" and combined[name] != value:
                raise ValueError("The Dropout layers of all branches must be in the same mode.")
            elif name in ("batch_axis", "channel_axis"):
                # None is no demand. Inputs of branches may differ in their axes, but have the layout of the first.
                combined[name] = value if combined[name] is None else combined[name]
    if any("diagonal_spatial" not in r for r in requirements) and "diagonal_spatial" in combined:
        # A branch that states nothing (Identity) lets everything through, and demands nothing of what follows.
        combined["diagonal_spatial"] = combined["diagonal_spatial"] & Diagonal()
    return MappingProxyType(combined)


def resolve(requirements: Requirements, **chosen: Any) -> dict[str, Any]:
    """Returns the layout to be used: what the user chose, else what the network requires, else the defaults.

    Raises:
      ValueError: a user's `True` contradicts a requirement.
    """
    resolved = dict(DEFAULTS)
    resolved.update(requirements)
    for name, value in chosen.items():
        if value is None:
            continue
        required = requirements.get(name)
        forbidden = required.input == Bool.NO if isinstance(required, Diagonal) else required is False
        if value and forbidden:
            raise ValueError(
                f"{name}=True was asked for, but this network needs entries off that diagonal ({name}: {required}). "
                f"Leave {name} unset."
            )
        resolved[name] = value
    resolved["diagonal_spatial"] = bool(resolved["diagonal_spatial"])
    return resolved


class _HasLayout(Protocol):
    @property
    def diagonal_batch(self) -> bool: ...
    @property
    def diagonal_spatial(self) -> bool: ...
    @property
    def batch_axis(self) -> int: ...
    @property
    def channel_axis(self) -> int: ...
    @property
    def shape1(self) -> tuple[int, ...]: ...


def check(requirements: Requirements, kernel: _HasLayout, layer_name: str) -> None:
    """Raises `ValueError` if a covariance does not hold what a layer requires."""
    check_diagonals(requirements, kernel, layer_name)
    ndim = len(kernel.shape1)
    for name in ("batch_axis", "channel_axis"):
        required, actual = requirements.get(name), getattr(kernel, name)
        if required is not None and required % ndim != actual:
            raise ValueError(
                f"{layer_name} has {name}={required}, but in the incoming kernel (activations of shape "
                f"{kernel.shape1}) it is {actual}, making the infinite limit ill-defined. Use the same {name} in all "
                "layers."
            )


def check_diagonals(requirements: Requirements, kernel: _HasLayout, name: str) -> None:
    """Raises `ValueError` if a covariance lacks entries that a layer or network requires."""
    for field in ("diagonal_batch", "diagonal_spatial"):
        required = requirements.get(field)
        missing = required.input == Bool.NO if isinstance(required, Diagonal) else required is False
        if missing and getattr(kernel, field):
            raise ValueError(
                f"{name} requires {field} to be {required}, but the incoming kernel has {field}=True and does not "
                f"contain sufficient information. Compute that kernel with {field}=False."
            )


_F = TypeVar("_F", bound=Callable[..., Any])


def requires(**requirements: Any) -> Callable[[_F], _F]:
    """Decorates the `kernel_fn` of a user's layer with what it requires of incoming kernels.

    Args:
      **requirements: any of `diagonal_batch: bool`, `diagonal_spatial: Diagonal`, `batch_axis: int`,
        `channel_axis: int`, `use_dropout: bool`.

    >>> @requires(batch_axis=0, channel_axis=-1, diagonal_spatial=Diagonal(Bool.YES, Bool.NO))
    ... def kernel_fn(k, **kwargs):
    ...     return k * 2.0
    >>> kernel_fn.input_req["channel_axis"]
    -1
    """
    for name in requirements:
        _check_name(name)

    def decorate(kernel_fn: _F) -> _F:
        kernel_fn.input_req = MappingProxyType(dict(requirements))  # type: ignore[attr-defined]
        return kernel_fn

    return decorate


def _check_name(name: str) -> None:
    if name not in DEFAULTS:
        raise NotImplementedError(f"Unknown requirement {name!r}; known are {', '.join(sorted(DEFAULTS))}.")
