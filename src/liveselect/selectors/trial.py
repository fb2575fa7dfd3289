"""A trial of a regressor before anything is measured: what cannot work is reported in seconds, and not after hours."""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.grammar import MIN_MEASUREMENTS, InfluenceRegressor, Round, SelectionWarning
from liveselect.pool import CandidatePool


def try_regressor(regressor: InfluenceRegressor, round: Round) -> None:
    """Let the regressor check, and a copy of it learn from made-up influence and predict.

    The copy sees the round's candidates, which are to be few. A regressor that cannot be copied, or a pool that is too
    small to learn from, is not tried.

    Raises:
        Exception: what checking, fitting and predicting would raise.
        TypeError: fitting returned no mapping, or predicting no tensor.
        ValueError: predicting returned another number of values than it was given candidates.
    """
    regressor.check(round)
    ids = round.candidates
    if not regressor.rehearsed or len(ids) < MIN_MEASUREMENTS:
        return
    try:
        trial = copy.deepcopy(regressor)
    except Exception:  # such as one that holds a connection
        return
    metrics = trial.fit(round, ids, torch.randn(len(ids), generator=round.generator("trial")))
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"expected {type(regressor).__name__}.fit to return a mapping of metrics, 'spearman' among them, got "
            f"{type(metrics).__name__}"
        )
    for batch in round.batches(ids):
        check_predictions(regressor, trial.predict(round, batch), len(batch["input_ids"]))


def check_predictions(regressor: InfluenceRegressor, predictions: Tensor, rows: int) -> None:
    """Raise unless a regressor predicted one number for each of ``rows`` candidates."""
    name = type(regressor).__name__
    if not isinstance(predictions, Tensor):
        raise TypeError(f"expected {name}.predict to return a tensor ({rows},), got {type(predictions).__name__}")
    if predictions.shape != (rows,):
        hint = ": squeeze the last dimension" if predictions.shape == (rows, 1) else ""
        raise ValueError(
            f"expected {name}.predict to return one number for each of {rows} candidates, ({rows},), got "
            f"{tuple(predictions.shape)}{hint}"
        )


def warn_of_few(pool: CandidatePool, wanted: int, settings: str) -> None:
    """Warn when a round is set to measure more candidates than the pool holds."""
    if wanted > pool.size and distributed.rank() == 0:
        warnings.warn(
            f"a round is set to measure {wanted} candidates ({settings}), and the pool holds {pool.size}: it measures "
            "all that may be chosen in it",
            SelectionWarning,
            stacklevel=2,
        )
