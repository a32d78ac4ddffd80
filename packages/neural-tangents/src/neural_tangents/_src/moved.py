"""What names say that have moved."""

import warnings
from typing import Any


def moved(module: str, name: str, places: dict[str, tuple[str, Any]]) -> Any:
    """Returns what a name of a module stands for, with a `DeprecationWarning`.

    Args:
      module: of the name.
      name: that is looked for.
      places: for each name that has moved, its public place and what stands there.
    """
    if name not in places:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    place, value = places[name]
    # The frames above: `__getattr__` of the module, and who asks it.
    warnings.warn(f"{module}.{name} is private and has moved: use {place}.", DeprecationWarning, stacklevel=3)
    return value
