"""Linearisation and kernels of finite networks: all of `nt_empirical`."""

from nt_empirical import *  # noqa: F403
from nt_empirical import __all__  # noqa: F401
