"""Inference and training dynamics of infinitely wide networks."""

from nt_predict._cholesky import Cholesky
from nt_predict._fit import fit
from nt_predict._gaussian import Gaussian
from nt_predict._gp_inference import gp_inference
from nt_predict._gradient_descent import ODEState, gradient_descent
from nt_predict._gradient_descent_mse import gradient_descent_mse
from nt_predict._gradient_descent_mse_ensemble import gradient_descent_mse_ensemble
from nt_predict._gram import Gram
from nt_predict._max_learning_rate import max_learning_rate
from nt_predict._pcg import PCG
from nt_predict._posterior import Estimate, Fit, LeaveOneOut, Stats
from nt_predict._regularisation_path import RegularisationPath, regularisation_path

__version__ = "0.1.0"

__all__ = [
    "PCG",
    "Cholesky",
    "Estimate",
    "Fit",
    "Gaussian",
    "Gram",
    "LeaveOneOut",
    "ODEState",
    "RegularisationPath",
    "Stats",
    "fit",
    "gp_inference",
    "gradient_descent",
    "gradient_descent_mse",
    "gradient_descent_mse_ensemble",
    "max_learning_rate",
    "regularisation_path",
]
