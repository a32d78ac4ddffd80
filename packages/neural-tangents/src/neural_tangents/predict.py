"""Inference and training dynamics of infinitely wide networks: all of `nt_predict`."""

from nt_predict import *  # noqa: F403
from nt_predict import __all__  # noqa: F401
