"""Inference and training dynamics of infinitely wide networks."""

from nt_predict._gaussian import Gaussian
from nt_predict._gp_inference import gp_inference
from nt_predict._gradient_descent import ODEState, gradient_descent
from nt_predict._gradient_descent_mse import gradient_descent_mse
from nt_predict._gradient_descent_mse_ensemble import gradient_descent_mse_ensemble
from nt_predict._max_learning_rate import max_learning_rate

__version__ = "0.1.0"

__all__ = [
    "Gaussian",
    "ODEState",
    "gp_inference",
    "gradient_descent",
    "gradient_descent_mse",
    "gradient_descent_mse_ensemble",
    "max_learning_rate",
]
