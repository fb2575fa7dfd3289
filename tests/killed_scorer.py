"""A regressor and an estimator that end their process when they were asked often enough; for tests of resuming."""

import os
import signal

from torch import Tensor

from liveselect.influence import PMPInfluence
from liveselect.protocols import Batch, RoundContext
from liveselect.regressors import HashedRidgeRegressor


def _die_at(variable: str, count: int) -> None:
    if count == int(os.environ.get(variable, -1)):
        os.kill(os.getpid(), signal.SIGKILL)


class KilledRegressor(HashedRidgeRegressor):
    predictions = 0

    def predict(self, context: RoundContext, batch: Batch) -> Tensor:
        KilledRegressor.predictions += 1
        _die_at("DIES_AT_PREDICTION", KilledRegressor.predictions)
        return super().predict(context, batch)


class KilledInfluence(PMPInfluence):
    measurements = 0

    def score_ids(self, context: RoundContext, ids: Tensor) -> Tensor:
        KilledInfluence.measurements += 1
        _die_at("DIES_AT_MEASUREMENT", KilledInfluence.measurements)
        return super().score_ids(context, ids)
