"""The libraries that the store needs and nt-core does not."""

import importlib
from typing import Any


def load(name: str) -> Any:
    """Returns a module of the extra `store`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Kernels on disk need {name}, which is not installed: pip install 'nt-core[store]'"
        ) from error
