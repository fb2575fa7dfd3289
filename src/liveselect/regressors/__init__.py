"""Predict influence where it was not measured."""

from liveselect.regressors.encoder import EncoderRegressor
from liveselect.regressors.hashed import HashedRidgeRegressor
from liveselect.regressors.token_table import TokenTableRegressor

__all__ = ["EncoderRegressor", "HashedRidgeRegressor", "TokenTableRegressor"]
