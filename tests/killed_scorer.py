"""A regressor and an estimator that end their process when they were asked often enough; for tests of resuming."""

import os
import signal

from torch import Tensor

from liveselect.grammar import Batch, LiveModel, Round
from liveselect.influence import PMPInfluence
from liveselect.regressors import HashedRidgeRegressor


def _die_at(variable: str, count: int) -> None:
    if count == int(os.environ.get(variable, -1)):
        os.kill(os.getpid(), signal.SIGKILL)


class KilledRegressor(HashedRidgeRegressor):
    predictions = 0

    def predict(self, round: Round, batch: Batch) -> Tensor:
        KilledRegressor.predictions += 1
        _die_at("DIES_AT_PREDICTION", KilledRegressor.predictions)
        return super().predict(round, batch)


class KilledInfluence(PMPInfluence):
    measurements = 0

    def score_ids(self, model: LiveModel, round: Round, ids: Tensor) -> Tensor:
        KilledInfluence.measurements += 1
        _die_at("DIES_AT_MEASUREMENT", KilledInfluence.measurements)
        return super().score_ids(model, round, ids)
