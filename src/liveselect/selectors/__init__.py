"""What to measure, and what to train on."""

from liveselect.selectors.capped import CappedSelector
from liveselect.selectors.mixture import MixtureSelector
from liveselect.selectors.ngram_prior import NGramPrior
from liveselect.selectors.portfolio import PortfolioSelector
from liveselect.selectors.regression import RegressionSelector
from liveselect.selectors.replay import ReplaySelector
from liveselect.selectors.scored import PriorSelector, ScoredSelector
from liveselect.selectors.stratified import StratifiedSelector
from liveselect.selectors.ucb import UCBSelector
from liveselect.selectors.uniform import UniformSelector

__all__ = [
    "CappedSelector",
    "MixtureSelector",
    "NGramPrior",
    "PortfolioSelector",
    "PriorSelector",
    "RegressionSelector",
    "ReplaySelector",
    "ScoredSelector",
    "StratifiedSelector",
    "UCBSelector",
    "UniformSelector",
]
