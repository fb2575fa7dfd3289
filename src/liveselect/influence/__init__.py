"""Estimators of influence: how much training on a candidate would lower the reference loss."""

from liveselect.influence.first_order import FirstOrderInfluence
from liveselect.influence.kfac import KFACInfluence
from liveselect.influence.less import LESSInfluence
from liveselect.influence.losses_of_candidates import LossDropInfluence, PerplexityInfluence, ReducibleLossInfluence
from liveselect.influence.ngram_ratio import NgramRatioInfluence
from liveselect.influence.one_step import OneStepInfluence
from liveselect.influence.pmp import PMPInfluence

__all__ = [
    "FirstOrderInfluence",
    "KFACInfluence",
    "LESSInfluence",
    "LossDropInfluence",
    "NgramRatioInfluence",
    "OneStepInfluence",
    "PMPInfluence",
    "PerplexityInfluence",
    "ReducibleLossInfluence",
]
