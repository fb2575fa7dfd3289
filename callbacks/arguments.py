"""Arguments that mean the same in every preset, typed once."""

from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_type_hints

from liveselect.grammar import InfluenceRegressor, LossFn, Selector
from liveselect.regressors import EncoderRegressor
from liveselect.selectors import PriorSelector
from liveselect.verdict import Verdict


class RunArguments(TypedDict, total=False):
    """Arguments of :class:`DataSelection` that mean the same in every preset."""

    loss_fn: LossFn | None
    seed: int
    dirpath: str | Path | None
    training_loss_differs: bool
    most_rejected: int
    mixture_sample: int | None
    verdict: Verdict | None


class SpreadRunArguments(RunArguments, total=False):
    """Those of a preset whose rounds may be measured between training steps."""

    probes_between_steps: int | None
    max_overhead: float | None


R = TypeVar("R", bound=RunArguments)


def published_regressor(regressor: InfluenceRegressor | None) -> InfluenceRegressor:
    """Return the regressor, or the BERT encoder as its papers fit it: on standardized targets of one round alone."""
    if regressor is not None:
        return regressor
    return EncoderRegressor("bert-base-uncased", targets="standardized", forgetting=0.0, damping=1.0)


def with_prior(selector: Selector, prior: Any, ratio: float) -> Selector:
    """Return a selector that sees the share ``ratio`` of the pool that a prior keeps; all of it where that is None."""
    if not 0 < ratio <= 1:
        raise ValueError(f"expected prior_ratio, the share that the prior keeps, above 0 and up to 1, got {ratio}")
    return selector if prior is None else PriorSelector(selector, prior, ratio)


def only(run: R, kind: type[R]) -> R:
    """Return the arguments of a run; raise TypeError for one that a preset would have to ignore."""
    for name in run:
        if name not in get_type_hints(kind):
            raise TypeError(
                f"unexpected keyword argument {name!r}: expected arguments of this preset, or of every run "
                f"({', '.join(get_type_hints(kind))})"
            )
    return run
