"""Predict influence where it was not measured."""

from liveselect.regressors.encoder import EncoderRegressor
from liveselect.regressors.hashed import HashedRidgeRegressor

__all__ = ["EncoderRegressor", "HashedRidgeRegressor"]
