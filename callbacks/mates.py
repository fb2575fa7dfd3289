"""MATES: a regressor of locally probed influence, refreshed as the model changes."""

from typing import Any, Literal, Unpack

from liveselect.arguments import check_plain
from liveselect.callbacks.arguments import SpreadRunArguments, only, published_regressor, with_prior
from liveselect.callbacks.selection import DataSelection
from liveselect.grammar import InfluenceRegressor
from liveselect.influence import OneStepInfluence
from liveselect.selectors import RegressionSelector


class MATES(DataSelection):
    r"""Model-aware data selection with data influence models.

    **Idea.** What is worth learning changes as the model learns. At every round some candidates are *probed*: the
    live optimizer takes one step on a candidate, the reference loss is read, everything is put back. A small encoder
    learns to predict the result from text alone, scores many more candidates, and the best of them, perturbed by
    Gumbel noise, are trained on until the next round.

    **Formula.** With :math:`A(\theta, x)` the live optimizer's step on candidate :math:`x` and :math:`D_r` the
    reference set, the influence is

    .. math:: I(x) = \frac{L(D_r; A(\theta, 0)) - L(D_r; A(\theta, x))}{\eta}

    where :math:`A(\theta, 0)` is the step with a zero gradient. The round trains on the top-k of
    :math:`\hat I(x) / \tau + G_x` over a random window of k / ratio candidates, :math:`G_x` Gumbel(0, 1).

    **Knobs, with the values of the released code and the defaults here where they differ.**

    =============  =================  ============  ==============================================================
    argument       published          default here  meaning
    =============  =================  ============  ==============================================================
    every_n_steps  10,000                           optimizer steps between rounds
    warmup_rounds  1                                rounds of random data at the beginning
    probes         80,000 per round                 candidates measured in a round
    ratio          0.2                              share of the compared candidates that is trained on
    temperature    0.5 (paper: 1.0)                 noise beside predictions of unit-variance targets
    noise          released_bottomk   gumbel_topk   form of the noise; gumbel_topk is the exact Plackett-Luce draw
    step           published                        the candidate alone makes the whole step
    min_spearman   none               0.0           rank correlation below which a round is drawn uniformly
    regressor      bert-base-uncased                encoder, two chunks of 512 tokens, masked mean pooling
    =============  =================  ============  ==============================================================

    **Cost.** A probe is one backward pass on the candidate and one forward pass on the whole reference set, which is
    nearly all of it: keep the reference small (1,024 short items in the paper). Fitting the regressor grows with the
    probes, predicting with the candidates compared; neither grows with the model.

    **Where we differ.** Influence is measured against the zero-gradient step, so its sign means something (momentum
    and weight decay lower the loss without any data). The default noise is true Gumbel-top-k. Probed candidates are
    drawn afresh in each round from candidates that were not trained on, and may be trained on. Exactly as many
    candidates are chosen as the round consumes. The regressor is warm-started from the round before. A regressor
    whose held-out rank correlation is not above ``min_spearman`` is not trusted: the round is drawn uniformly.
    ``step="in_batch"`` weights the candidate as one example of the global batch, which stays informative where the
    published step overshoots (large learning rates, no clipping).

    Yu, Das and Xiong, *MATES: Model-Aware Data Selection for Efficient Pretraining with Data Influence Models*,
    NeurIPS 2024, arXiv:2406.06046.

    Args:
        every_n_steps: optimizer steps of one round.
        probes: candidates measured in each round.
        ratio: share of the compared candidates that is trained on.
        temperature: strength of the Gumbel noise; 0 takes the best.
        noise: form of the noise.
        standardize: whether predictions are scaled to unit variance before the noise.
        min_spearman: held-out rank correlation below which a round is drawn uniformly; None trusts any regressor.
        step: size of the probe step.
        regressor: predicts influence; by default the BERT encoder of the paper.
        warmup_rounds: rounds of uniform data at the beginning.
        prior: scores that narrow the pool first, as :class:`~liveselect.selectors.PriorSelector` takes them; True is
            the n-gram prior, which needs no file.
        prior_ratio: share of the pool that it keeps.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`.
    """

    def __init__(
        self,
        every_n_steps: int = 10_000,
        probes: int = 80_000,
        ratio: float = 0.2,
        temperature: float = 0.5,
        noise: Literal["gumbel_topk", "released_bottomk"] = "gumbel_topk",
        standardize: bool = False,
        min_spearman: float | None = 0.0,
        step: Literal["published", "in_batch"] = "published",
        regressor: InfluenceRegressor | None = None,
        warmup_rounds: int = 1,
        prior: Any = None,
        prior_ratio: float = 0.5,
        **run: Unpack[SpreadRunArguments],
    ) -> None:
        check_plain(MATES, locals())
        selector = RegressionSelector(
            regressor=published_regressor(regressor),
            probes=probes,
            ratio=ratio,
            temperature=temperature,
            noise=noise,
            standardize=standardize,
            min_spearman=min_spearman,
        )
        super().__init__(
            selector=with_prior(selector, prior, prior_ratio),
            estimator=OneStepInfluence(step=step),
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            **only(run, SpreadRunArguments),
        )
