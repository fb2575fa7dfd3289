"""PDS: data selection as optimal control, from scores made before training or solved on the live model."""

from collections.abc import Sequence
from typing import Any, Unpack

from liveselect.arguments import check_plain
from liveselect.callbacks.arguments import RunArguments, only, published_regressor, with_prior
from liveselect.callbacks.selection import DataSelection
from liveselect.grammar import InfluenceEstimator, InfluenceRegressor
from liveselect.influence import PMPInfluence
from liveselect.selectors import RegressionSelector, ScoredSelector


class PDS(DataSelection):
    r"""PMP-based data selection.

    **Idea.** Choose data for the whole future, not for the next step: minimise the reference loss summed along the way.
    Pontryagin's maximum principle turns that into one pass backwards through an unrolled stretch of training, after
    which the worth of every example is an inner product. On a small *proxy* model this is solved for some examples; a
    *scorer* learns to predict it from text and scores the pool; training draws from the scores with Gumbel noise.

    **Formula.** Training is :math:`\theta_{t+1} = \theta_t - \eta \nabla L_t(\theta_t)`, J the reference loss. The
    costate is pulled back from :math:`\lambda_T = \nabla J(\theta_T)` by
    :math:`\lambda_t = \lambda_{t+1} + \nabla J(\theta_t) - \eta \nabla^2 L_t(\theta_t) \lambda_{t+1}`, and

    .. math:: \mathrm{score}(x) = \sum_t \lambda_{t+1} \cdot \nabla \ell(x; \theta_t)
                                = -\frac{1}{\eta} \frac{d}{d\epsilon} \sum_{t=1}^{T} J(\theta_t)

    with :math:`\epsilon` the weight of x in the mean loss of the scored steps; larger is better. A round takes the
    top-k of :math:`\mathrm{score}(x) / \tau + G_x`, with :math:`G_x` Gumbel(0, 1).

    This preset draws from scores that are ready: those of ``liveselect score``, which solves on a proxy, fits the
    scorer and scores the pool, or any column of numbers (an educational value, a perplexity). It is the published
    method, except that the draw is made live. :class:`LivePDS` solves on the live model instead.

    **Knobs, with the values of the released code and the defaults here where they differ.**

    =============  ==================  ============  ===============================================================
    argument       published           default here  meaning
    =============  ==================  ============  ===============================================================
    ratio          0.4                               share of the pool that is trained on
    temperature    0.1                               noise beside scores of unit variance
    every_n_steps  once, before all    1000          optimizer steps between two draws
    =============  ==================  ============  ===============================================================

    **Cost.** A round costs one pass over the numbers; what making them cost stands in the ledger.

    **Where we differ.** The noise is drawn afresh in every round, and from a seed. A run that is longer than the share
    trains on it again.

    Gu, Dong, Wang, Hao, Dong, Wei and Huang, *Data Selection via Optimal Control for Language Models*, ICLR 2025,
    arXiv:2410.07064.

    Args:
        scores: a folder of ``liveselect score``, a ``.npy`` or ``.parquet`` file, or an array; see
            :class:`~liveselect.selectors.ScoredSelector`. To use scores as a prior of a live method see
            :class:`~liveselect.selectors.PriorSelector`.
        every_n_steps: optimizer steps of one round.
        ratio: share that is trained on.
        temperature: strength of the Gumbel noise; 0 takes the best.
        final_temperature: the temperature after ``anneal_rounds``; by default it stays.
        anneal_rounds: rounds until then.
        groups: names of the groups that may be chosen.
        random_share: share of each round that is drawn uniformly.
        standardize: whether scores are scaled to unit variance before the noise.
        column: the column of a Parquet file that holds them.
        repeat: whether a share that was trained on is trained on again, rather than what is below it.
        warmup_rounds: rounds of uniform data at the beginning.
        prior: scores that narrow the pool first, as :class:`~liveselect.selectors.PriorSelector` takes them; True is
            the n-gram prior, which needs no file.
        prior_ratio: share of the pool that it keeps.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`.
    """

    def __init__(
        self,
        scores: str | Any,
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
        warmup_rounds: int = 0,
        prior: Any = None,
        prior_ratio: float = 0.5,
        **run: Unpack[RunArguments],
    ) -> None:
        check_plain(PDS, locals())
        if scores is None:
            raise ValueError(
                "expected scores, a file made by `liveselect score` or elsewhere, got None: pass one, or solve on the "
                "live model with LivePDS"
            )
        selector = ScoredSelector(
            scores=scores,
            ratio=ratio,
            temperature=temperature,
            final_temperature=final_temperature,
            anneal_rounds=anneal_rounds,
            groups=groups,
            random_share=random_share,
            standardize=standardize,
            column=column,
            repeat=repeat,
        )
        super().__init__(
            with_prior(selector, prior, prior_ratio),
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            **only(run, RunArguments),
        )


class LivePDS(DataSelection):
    r"""PMP-based data selection, solved on the live model at every round.

    **Idea.** As :class:`PDS`, with the live model and its optimizer in place of the proxy: in each round some
    candidates are measured against an unrolled future, a regressor learns to predict the result from text, as MATES
    does with its probes, and the round is drawn by its predictions.

    **Knobs, with the values of the released code and the defaults here where they differ.**

    =============  ==================  =================  ==============================================================
    argument       published           default here       meaning
    =============  ==================  =================  ==============================================================
    ratio          0.4                                    share of the compared candidates that is trained on
    temperature    0.1                                    noise beside predictions of unit-variance targets
    every_n_steps  once, before all    1000               optimizer steps between two solutions
    probes         163,840, once       4096               candidates measured in a round
    estimator      100 steps of SGD    live optimizer     the stretch that is unrolled; every 10th step is scored;
                   at rate 0.008                          published is ``PMPInfluence(dynamics="sgd",
                                                          learning_rate=0.008)``
    regressor      fairseq-dense-125M  bert-base-uncased  mean pooling and a linear head in both
    =============  ==================  =================  ==============================================================

    **Cost.** Solving costs some ten forwards and backwards of training for each unrolled step, the reference set for
    each as well, and three forwards for each candidate and scored step, which is most of it.

    **Where we differ.** The released code unrolls plain SGD, also where the target is trained otherwise; here the
    adjoint of momentum, Adam, AdamW, weight decay, clipping and schedules is known too. The regressor keeps its best
    look by held-out rank correlation (the released tracker is never updated, so the last epoch wins), and one that is
    no better than chance is not used. J is a mean over tokens; ``reference_weighting="examples"`` gives the published
    mean over conversations.

    Gu, Dong, Wang, Hao, Dong, Wei and Huang, *Data Selection via Optimal Control for Language Models*, ICLR 2025,
    arXiv:2410.07064.

    Args:
        every_n_steps: optimizer steps of one round.
        probes: candidates measured in each round.
        ratio: share of the compared candidates that is trained on.
        temperature: strength of the Gumbel noise; 0 takes the best.
        standardize: whether predictions are scaled to unit variance before the noise.
        min_spearman: held-out rank correlation below which a round is drawn uniformly; None trusts any.
        estimator: measures influence.
        regressor: predicts influence; by default a BERT encoder.
        warmup_rounds: rounds of uniform data at the beginning.
        prior: scores that narrow the pool first, as :class:`~liveselect.selectors.PriorSelector` takes them; True is
            the n-gram prior, which needs no file.
        prior_ratio: share of the pool that it keeps.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        probes: int = 4096,
        ratio: float = 0.4,
        temperature: float = 0.1,
        standardize: bool = False,
        min_spearman: float | None = 0.0,
        estimator: InfluenceEstimator | None = None,
        regressor: InfluenceRegressor | None = None,
        warmup_rounds: int = 1,
        prior: Any = None,
        prior_ratio: float = 0.5,
        **run: Unpack[RunArguments],
    ) -> None:
        check_plain(LivePDS, locals())
        selector = RegressionSelector(
            regressor=published_regressor(regressor),
            probes=probes,
            ratio=ratio,
            temperature=temperature,
            standardize=standardize,
            min_spearman=min_spearman,
        )
        super().__init__(
            with_prior(selector, prior, prior_ratio),
            PMPInfluence() if estimator is None else estimator,
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            **only(run, RunArguments),
        )
