"""Quad: clusters of the pool as arms of a bandit, pulled by the influence that the live model shows."""

from typing import Any, Unpack

from liveselect.arguments import check_plain
from liveselect.callbacks.arguments import RunArguments, only, with_prior
from liveselect.callbacks.overhearing import Overhearing
from liveselect.callbacks.selection import DataSelection
from liveselect.grammar import InfluenceEstimator
from liveselect.influence import KFACInfluence
from liveselect.parts import check_part
from liveselect.selectors import UCBSelector


class Quad(DataSelection):
    r"""Data of quality and diversity by a bandit over clusters.

    **Idea.** Texts of one cluster help alike, so it is enough to measure a few of each. The pool is clustered once
    (`liveselect cluster POOL`); every cluster is an arm. While training runs, the arms that promise most are pulled:
    a few of their candidates are measured with the live model, and the next steps train on the arms with the largest
    upper confidence bound. The bound is wide for arms that were seldom pulled, which keeps the mixture diverse.

    **Formula.** With :math:`\bar\rho_i` the mean reward of arm i and :math:`T_i` its pulls,

    .. math:: CS_i = \bar\rho_i + \alpha \sqrt{\frac{2 \ln \sum_j T_j}{T_i}}

    and the reward of a pull the mean influence :math:`g_r^\top (H + \lambda I)^{-1} \nabla \ell(x)` of its candidates,
    where :math:`g_r` is the gradient of the reference loss and H its Kronecker-factored curvature; larger is better.

    **Knobs, with the values of the released code and the defaults here where they differ.**

    =============  ================  ============  ===============================================================
    argument       published         default here  meaning
    =============  ================  ============  ===============================================================
    every_n_steps  once, before all  20            optimizer steps that one choice of arms lasts
    warmup_rounds  none              5             rounds of random data at the beginning
    alpha          0.0001            0.5           width of the bound; published beside rewards of 0.001, here in
                                                   units of what chance does to an outcome
    pulls          50, of 10,000     8             arms pulled in a round
    probes         10                8             candidates measured in a pull
    controls       none              16            random candidates that rewards are compared with
    arms           all above tau     8             how many arms share a round
    gamma          20,000 documents  1.0           the largest share of an arm that a round may take
    tau            0.002             0.0           reward below which an arm is left out; published of a mean
                                                   cosine, here 0 is as good as random data
    cutoff         0.2                             cosine distance up to which clusters share outcomes
    discount       1.0                             below 1, old outcomes fade: it follows change and explores more
    released       True              False         the bound and the neighbour counts of the released code
    overhear       none              True          the first step of a round scores what it trains on
    =============  ================  ============  ===============================================================

    **Cost.** A round measures ``pulls * probes + controls`` candidates and prepares the estimator on the reference set.
    Keep both below the examples of an optimizer step, and a round every 20 steps costs about 5% of training or less.
    Arms that are being trained on need no probes: the first step of a round shows their influence out of its own
    backward (``overhear``), so the pulls of the next round are spent on the others.

    **Where we differ.** The paper chooses once, by one checkpoint; here arms are pulled by the live model and the
    mixture follows it. Rewards are relative to random candidates of the same round, in units of their spread, so
    alpha and tau mean the same throughout training and for every model. Unknown arms have an infinite bound. A
    neighbour's outcome counts as much as it is weighted. Probes are drawn from the front of what training takes next.

    Zhang et al., *Harnessing Diversity for Important Data Selection in Pretraining Large Language Models*, ICLR 2025,
    arXiv:2409.16986.

    Args:
        every_n_steps: optimizer steps of one round.
        alpha: width of the confidence bound, see :class:`~liveselect.selectors.UCBSelector`.
        pulls: arms pulled in each round.
        at_once: arms pulled before their outcomes are looked at.
        probes: candidates measured in a pull.
        controls: random candidates measured in each round.
        arms: how many arms share a round.
        gamma: largest share of an arm that one round may train on.
        tau: mean reward below which an arm is not trained on while others suffice; None accepts all.
        discount: what remains of old rewards and pulls in each round.
        cutoff: cosine distance up to which clusters share outcomes; None for no sharing.
        released: the bound and the neighbour counts of the released code.
        overhear: let the first step of every round show the influence of what it trains on, where the estimator has a
            direction to compare gradients with.
        estimator: measures influence; by default :class:`~liveselect.influence.KFACInfluence` with the curvature of all
            candidates: that of the mixture alone makes too much of what the mixture leaves out.
        warmup_rounds: rounds of uniform data at the beginning.
        prior: scores that narrow the pool first, as :class:`~liveselect.selectors.PriorSelector` takes them; True is
            the n-gram prior, which needs no file.
        prior_ratio: share of the pool that it keeps.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        alpha: float = 0.5,
        pulls: int = 8,
        at_once: int = 4,
        probes: int = 8,
        controls: int = 16,
        arms: int = 8,
        gamma: float = 1.0,
        tau: float | None = 0.0,
        discount: float = 1.0,
        cutoff: float | None = 0.2,
        released: bool = False,
        overhear: bool = True,
        estimator: InfluenceEstimator | None = None,
        warmup_rounds: int = 5,
        prior: Any = None,
        prior_ratio: float = 0.5,
        **run: Unpack[RunArguments],
    ) -> None:
        check_plain(Quad, locals())
        selector = UCBSelector(
            alpha=alpha,
            pulls=pulls,
            at_once=at_once,
            probes=probes,
            controls=controls,
            arms=arms,
            gamma=gamma,
            tau=tau,
            discount=discount,
            cutoff=cutoff,
            released=released,
        )
        # the mixture leaves arms out: what only they need would have no curvature there, and look better than it is
        estimator = KFACInfluence(factors_of="candidates") if estimator is None else estimator
        check_part(estimator, InfluenceEstimator, "estimator")
        super().__init__(
            selector=with_prior(selector, prior, prior_ratio),
            estimator=estimator,
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            overhear=int(overhear and estimator.has_direction),
            **only(run, RunArguments),
        )
        # of each arm that is trained on, as many examples as a pull would measure
        self.overhearing = Overhearing(self.overhearing.steps, self.loss_fn, examples=arms * probes)
