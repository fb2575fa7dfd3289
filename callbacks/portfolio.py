"""Portfolio: widths of a prior, and live influence, compete for a run."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from liveselect.arguments import check_plain
from liveselect.callbacks.arguments import RunArguments, only
from liveselect.callbacks.live import LiveSelection
from liveselect.callbacks.selection import DataSelection
from liveselect.grammar import Selector
from liveselect.selectors import NGramPrior, PortfolioSelector, ScoredSelector, UniformSelector
from liveselect.verdict import Verdict


class Portfolio(DataSelection):
    r"""Finds the width of the choice in the run, and whether live influence is worth its cost.

    **Idea.** The width of a choice is worth more than any estimate of influence, and what a prior finds before the run
    is only a start: training with several widths shows which is best. So a prior of some widths, the prior with live
    influence, and random data compete: from the same state copies of training follow each for a round, and the next
    round follows what gained most for its cost. See :class:`~liveselect.selectors.PortfolioSelector`.

    **Cost.** ``share`` of the run's training steps at most, most of it early on. A contest of five policies takes four
    rounds, and two or three of them settle most; so a run should have at least a hundred rounds, of hundreds of steps
    each, or a larger share.

    **What to know.** Policies are judged on the half of the reference set that selection does not see. What was chosen
    by it looks a little better on it than on other text.

    Args:
        every_n_steps: optimizer steps of one round, and of a contest.
        prior: True for that of n-grams, or scores, as in :class:`~liveselect.selectors.ScoredSelector`.
        ratios: widths of the prior, shares of the pool; the first one is followed until something is known.
        live_ratio: width of the prior with live influence, as ``ratio`` of
            :class:`~liveselect.callbacks.LiveSelection`; None leaves it out.
        live_cost: share of a round's training that its measuring may take.
        keep_general: share of every round that is drawn uniformly from the whole pool.
        share: of the run's training steps that contests may cost.
        cost: what the cost of policies is counted in.
        warmup_rounds: rounds at the beginning that are drawn by the first policy.
        run: arguments of every run, see :class:`~liveselect.callbacks.DataSelection`; ``mixture_sample`` is 64, and
            ``verdict`` is :class:`~liveselect.verdict.Verdict` with its defaults.
    """

    own_mixture_sample = 64

    def __init__(
        self,
        every_n_steps: int = 500,
        prior: Any = True,
        ratios: Sequence[float] = (0.2, 0.05, 0.5),
        live_ratio: float | None = 0.2,
        live_cost: float = 0.02,
        keep_general: float = 0.1,
        share: float = 0.1,
        cost: Literal["flops", "seconds"] = "flops",
        warmup_rounds: int = 1,
        **run: Unpack[RunArguments],
    ) -> None:
        check_plain(Portfolio, locals())
        if not ratios or len(set(ratios)) < len(ratios):
            raise ValueError(f"expected different ratios, shares of the pool, got {list(ratios)}")
        scores = NGramPrior() if prior is True else prior  # made once, for all
        policies: dict[str, Selector] = {
            f"prior {ratio:g}": ScoredSelector(scores, ratio, random_share=keep_general) for ratio in ratios
        }
        live = None
        if live_ratio is not None:
            live = LiveSelection(
                every_n_steps, prior=scores, ratio=live_ratio, cost=live_cost, keep_general=keep_general
            )
            policies[f"live {live_ratio:g}"] = live.selector
        policies["random"] = UniformSelector()
        run["verdict"] = run.get("verdict") or Verdict()  # YAML passes the None of every run
        super().__init__(
            selector=PortfolioSelector(policies, share, cost),
            estimator=None if live is None else live.estimator,
            every_n_steps=every_n_steps,
            warmup_rounds=warmup_rounds,
            **only(run, RunArguments),
        )
