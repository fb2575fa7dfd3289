"""PDS: data selection as optimal control, from scores made before training or solved on the live model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from liveselect.callbacks.selection import DataSelection
from liveselect.influence import PMPInfluence
from liveselect.protocols import InfluenceEstimator, InfluenceRegressor, LossFn, Selector
from liveselect.regressors import EncoderRegressor
from liveselect.selectors import RegressionSelector, ScoredSelector


class PDS(DataSelection):
    r"""PMP-based data selection.

    **Idea.** Choose data for the whole future, not for the next step: minimise the reference loss summed along the way.
    Pontryagin's maximum principle turns that into one pass backwards through an unrolled stretch of training, after
    which the worth of every example is an inner product. On a small *proxy* model this is solved for some examples; a
    *scorer* learns to tell it from text and scores the pool; training draws from the scores with Gumbel noise.

    **Formula.** Training is :math:`\theta_{t+1} = \theta_t - \eta \nabla L_t(\theta_t)`, J the reference loss. The
    costate is pulled back from :math:`\lambda_T = \nabla J(\theta_T)` by
    :math:`\lambda_t = \lambda_{t+1} + \nabla J(\theta_t) - \eta \nabla^2 L_t(\theta_t) \lambda_{t+1}`, and

    .. math:: \mathrm{score}(x) = \sum_t \lambda_{t+1} \cdot \nabla \ell(x; \theta_t)
                                = -\frac{1}{\eta} \frac{d}{d\epsilon} \sum_{t=1}^{T} J(\theta_t)

    with :math:`\epsilon` the weight of x in the mean loss of the scored steps; larger is better. A round takes the
    top-k of :math:`\mathrm{score}(x) / \tau + G_x`, with :math:`G_x` Gumbel(0, 1).

    **Two ways.** ``PDS(scores)`` draws from scores that are ready: those of ``liveselect score``, which solves on a
    proxy, fits the scorer and scores the pool, or any column of numbers (an educational value, a perplexity). This is
    the published method, except that the draw is made live. ``PDS(live=True)`` solves on the live model at every round,
    with its optimizer, and fits a regressor to the result, as MATES does with its probes.

    **Knobs, with the values of the released code and the defaults here where they differ.**

    =============  ==================  =================  ==============================================================
    argument       published           default here       meaning
    =============  ==================  =================  ==============================================================
    ratio          0.4                                    share of the pool (live: of the compared) that is trained on
    temperature    0.1                                    noise beside scores of unit variance
    every_n_steps  once, before all    1000               optimizer steps between two draws (live: solutions)
    probes         163,840, once       4096               live: candidates measured in a round
    estimator      100 steps of SGD    live optimizer     live: the stretch that is unrolled; every 10th step is scored;
                   at rate 0.008                          published is ``PMPInfluence(dynamics="sgd",
                                                          learning_rate=0.008)``
    regressor      fairseq-dense-125M  bert-base-uncased  live: mean pooling and a linear head in both
    =============  ==================  =================  ==============================================================

    **Cost.** With precomputed scores a round costs one pass over the numbers. Solving costs some ten forwards and
    backwards of training for each unrolled step, the reference set for each as well, and three forwards for each
    candidate and scored step, which is most of it.

    **Where we differ.** The noise is drawn anew in every round, and from a seed. A run that is longer than the share
    trains on it again. The released code unrolls plain SGD, whatever the target is trained with; here the adjoint of
    momentum, Adam, AdamW, weight decay, clipping and schedules is known too. The regressor keeps its best look by
    held-out rank correlation (the released tracker is never updated, so the last epoch wins), and one that is no better
    than chance is not used. J is a mean over tokens; ``reference_weighting="examples"`` gives the published mean over
    conversations.

    Gu, Dong, Wang, Hao, Dong, Wei and Huang, *Data Selection via Optimal Control for Language Models*, ICLR 2025,
    arXiv:2410.07064.

    Args:
        scores: a folder of ``liveselect score``, a ``.npy`` or ``.parquet`` file, or an array; see
            :class:`~liveselect.selectors.ScoredSelector`. Not together with ``live``; to use scores as a prior of a
            live method see :class:`~liveselect.selectors.PriorSelector`.
        live: solve on the live model instead.
        every_n_steps: optimizer steps of one round.
        ratio: share that is trained on.
        temperature: strength of the Gumbel noise; 0 takes the best.
        final_temperature: with scores: the temperature after ``anneal_rounds``; by default it stays.
        anneal_rounds: with scores: rounds until then.
        groups: with scores: names of the groups that may be chosen.
        random_share: with scores: share of each round that is drawn uniformly.
        standardize: whether scores or predictions are scaled to unit variance before the noise.
        column: with scores: the column of a Parquet file that holds them.
        repeat: with scores: whether a share that was trained on is trained on again, rather than what is below it.
        probes: live: candidates measured in each round.
        estimator: live: measures influence.
        regressor: live: predicts influence; by default a BERT encoder.
        min_spearman: live: held-out rank correlation below which a round is drawn uniformly; None trusts any.
        warmup_rounds: rounds of uniform data at the beginning; by default 0 with scores, and 1 live.
        loss_fn: per-example loss, see :class:`~liveselect.callbacks.DataSelection`.
        seed: seed of every draw that selection makes.
        dirpath: where the ledger is written.
    """

    def __init__(
        self,
        scores: str | Any = None,
        live: bool = False,
        every_n_steps: int = 1000,
        ratio: float = 0.4,
        temperature: float = 0.1,
        final_temperature: float | None = None,
        anneal_rounds: int | None = None,
        groups: Sequence[str] | None = None,
        random_share: float = 0.0,
        standardize: bool = False,
        column: str = "score",
        repeat: bool = True,
        probes: int = 4096,
        estimator: InfluenceEstimator | None = None,
        regressor: InfluenceRegressor | None = None,
        min_spearman: float | None = 0.0,
        warmup_rounds: int | None = None,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        dirpath: str | Path | None = None,
    ) -> None:
        if live == (scores is not None):
            raise ValueError(
                "expected either scores, a file made by `liveselect score` or elsewhere, or live=True, which solves on "
                f"the live model, got scores={scores!r} and live={live}"
            )
        selector: Selector
        if live:
            if groups is not None or random_share or final_temperature is not None or anneal_rounds is not None:
                raise ValueError(
                    "groups, random_share, final_temperature and anneal_rounds belong to ready scores: leave them out "
                    "with live=True, or compose a selector with PriorSelector"
                )
            selector = RegressionSelector(
                regressor=regressor or EncoderRegressor("bert-base-uncased"),
                probes=probes,
                ratio=ratio,
                temperature=temperature,
                standardize=standardize,
                min_spearman=min_spearman,
            )
        else:
            if estimator is not None or regressor is not None:
                raise ValueError(
                    "an estimator or a regressor is used with live=True only: with ready scores nothing is measured"
                )
            selector = ScoredSelector(
                scores,
                ratio,
                temperature,
                final_temperature,
                anneal_rounds,
                groups,
                random_share,
                standardize,
                column,
                repeat,
            )
        super().__init__(
            selector=selector,
            estimator=(estimator or PMPInfluence()) if live else None,
            every_n_steps=every_n_steps,
            warmup_rounds=int(live) if warmup_rounds is None else warmup_rounds,
            loss_fn=loss_fn,
            seed=seed,
            dirpath=dirpath,
        )
