"""LiveSelection: what is recommended where nothing speaks for another method."""

from typing import Any, Unpack

from liveselect.arguments import check_plain
from liveselect.callbacks.arguments import SpreadRunArguments, only
from liveselect.callbacks.selection import DataSelection
from liveselect.grammar import InfluenceEstimator, InfluenceRegressor, Selector
from liveselect.influence import FirstOrderInfluence
from liveselect.regressors import TokenTableRegressor
from liveselect.selectors import CappedSelector, NGramPrior, PriorSelector, RegressionSelector
from liveselect.selectors.ngram_prior import USUAL_WIDTH

_REFERENCE_ROWS = 64


class LiveSelection(DataSelection):
    r"""Live influence inside the better part of a prior, for a few hundredths of the cost of training.

    **Idea.** Most of what can be gained is known before training: which texts share their words with the reference
    set. A prior of n-grams finds them in seconds, and its *width* matters more than anything that is measured later.
    What the live model adds is which of them it has not learned yet. So the prior keeps the best of what a round looks
    at, a few of these are measured, and the round trains on those whose tokens were worth most, with the prior added.
    A share of every round is drawn from the whole pool, because a narrow choice ruins what the model knows of the rest.

    **Formula.** With :math:`p` the prior's log-ratio in its standard deviations, :math:`G` Gumbel noise and
    :math:`\hat I` the mean over a candidate's tokens of what tokens were worth where they were measured,

    .. math:: K = \text{top}_{\,\text{gate}\cdot\text{ratio}} \; (p + 0.3\, G), \qquad
              \text{choose the best of } K \text{ by } \;\Phi^{-1}(\text{rank } \hat I) + w\, z_K(p)

    A token's worth is the slope of its loss along the step that the optimizer would take on the reference gradient,
    bounded as such a step is; it takes two forwards of a candidate.

    **Cost.** ``cost`` is the share of a round's training that measuring may take, half for the gradient of at most 64
    reference rows, others in each round, and half for probes; at least 8 of each are taken, so that very short rounds
    cost more. Prediction is three microseconds a candidate.

    **The width.** How much of the pool the prior keeps is worth more than any ranking inside the gate. It begins with
    what the prior says of reference text that it has not seen: narrow where few candidates score as high, the whole
    pool where reference and pool are alike. From there the run finds it: as long as the measured candidates with better
    scores are worth more, less of the pool is kept; once the model has learned what they hold, more. Where the
    reference set is the pool's own mixture there is nothing to select, and selection only costs.

    All this is spread over the last steps of a round, a quarter of a step's work after each, so no step is held up for
    long, and what is measured is a few steps old. Other paces can be set, see
    :class:`~liveselect.callbacks.DataSelection`.

    The first rounds, in which nothing is measured, are drawn by the prior alone.

    Args:
        every_n_steps: optimizer steps of one round.
        prior: True for that of n-grams; or a file or array of scores, see
            :class:`~liveselect.selectors.PriorSelector`; None for none, with which the choice is soft.
        ratio: share of the pool that the prior alone would choose, at first; by default the width that the n-gram prior
            finds, see :class:`~liveselect.selectors.NGramPrior`, and 0.1 with other scores or none.
        gate: how many times as much the prior keeps, for live influence to choose from.
        prior_weight: of the prior inside of the gate, beside live influence of weight up to 1.
        find_width: find ``ratio`` in the run, from what the live model says of better and worse scores in the gate.
        keep_general: share of every round that is drawn uniformly from the whole pool.
        cost: share of a round's training that measuring may take, 0..1.
        probes: candidates measured in a round; by default what the cost allows.
        estimator: measures influence; by default :class:`~liveselect.influence.FirstOrderInfluence`.
        regressor: predicts influence; by default :class:`~liveselect.regressors.TokenTableRegressor`.
        max_uses: how often a candidate is trained on before those below the prior's part come in.
        max_group_share: most that one group may fill of what is chosen by influence.
        max_per_document: most candidates of one document in a round, where the pool was prepared; None for any.
        warmup_rounds: rounds at the beginning that are drawn by the prior alone.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`; ``mixture_sample`` is 64.
    """

    own_mixture_sample = 64

    def __init__(
        self,
        every_n_steps: int = 1000,
        prior: Any = True,
        ratio: float | None = None,
        gate: float = 2.0,
        prior_weight: float = 2.0,
        find_width: bool = True,
        keep_general: float = 0.1,
        cost: float = 0.02,
        probes: int | None = None,
        estimator: InfluenceEstimator | None = None,
        regressor: InfluenceRegressor | None = None,
        max_uses: int | None = 4,
        max_group_share: float = 1.0,
        max_per_document: int | None = None,
        warmup_rounds: int = 1,
        **run: Unpack[SpreadRunArguments],
    ) -> None:
        check_plain(LiveSelection, locals())
        if ratio is None and not (prior is True or isinstance(prior, NGramPrior)):
            ratio = USUAL_WIDTH
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"expected ratio, the share that is chosen, above 0 and up to 1, got {ratio}")
        if not gate >= 1.0:
            raise ValueError(
                f"expected gate, how much the prior keeps of what it would choose, of at least 1, got {gate}"
            )
        if not 0.0 < cost < 1.0:
            raise ValueError(f"expected cost, a share of the cost of training, between 0 and 1, got {cost}")
        if ratio is not None:
            gate = min(gate, 1.0 / ratio)
        selector: Selector = RegressionSelector(
            regressor=TokenTableRegressor() if regressor is None else regressor,
            # a probe is two forwards where a trained example is three
            probes=0.75 * cost if probes is None else probes,
            ratio=ratio if prior is None and ratio is not None else 1.0 / gate,
            temperature=0.5 if prior is None else 0.0,
            trained_share=0.25,
            max_group_share=max_group_share,
        )
        if prior is not None:
            selector = PriorSelector(
                selector,
                prior,
                ratio=None if ratio is None else gate * ratio,
                offset=prior_weight,
                keep_general=keep_general,
                max_uses=max_uses,
                gate=gate,
                find_width=find_width,
            )
        if max_per_document is not None:
            selector = CappedSelector(selector, max_per_document)
        if estimator is None:
            estimator = FirstOrderInfluence(
                engine="central_difference",
                slope_over="reference",
                reference_rows=_REFERENCE_ROWS,
                reference_share=cost / 2,
            )
        self.own_last_share = min(1.0, 4 * cost)  # a quarter of a step's work after each of them
        super().__init__(
            selector=selector,
            estimator=estimator,
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            **only(run, SpreadRunArguments),
        )
