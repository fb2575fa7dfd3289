"""Guess influence where it was not measured."""

from liveselect.regressors.hashed import HashedRidgeRegressor

__all__ = ["HashedRidgeRegressor"]
