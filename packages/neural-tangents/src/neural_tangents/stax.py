"""Layers of neural networks that know their infinite-width kernels: all of `nt_stax`."""

from nt_stax import *  # noqa: F403
from nt_stax import __all__  # noqa: F401
