"""Influence on the future by Pontryagin's maximum principle (PDS)."""

from liveselect.influence.pmp.estimator import PMPInfluence

__all__ = ["PMPInfluence"]
