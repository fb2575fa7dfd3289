"""Uniform selection: the baseline, the warm-up, and what other selectors fall back to."""

from collections.abc import Mapping

from liveselect.functional.sampling import gumbel_topk, uniform_subset
from liveselect.grammar import Round, Selection, Selector


class UniformSelector(Selector):
    """Draws candidates uniformly without replacement; measures nothing.

    The engine trains on each candidate once before any comes twice, so an epoch of uniform selection is an epoch of
    ordinary shuffled training.
    """

    def select(self, round: Round, budget: int) -> Selection:
        """Choose ``budget`` of the round's candidates; all subsets are equally likely."""
        return uniform_selection(round, budget)


def uniform_selection(
    round: Round,
    budget: int,
    metrics: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
    because: str | None = None,
) -> Selection:
    """Draw ``budget`` candidates by the prior's weights, or uniformly where there is no prior.

    ``metrics`` and ``notes`` go to the ledger; ``because`` says there why a selector that compares fell back to this.
    """
    if round.offset is None:
        how = "drawn uniformly"
        places = uniform_subset(len(round.candidates), budget, round.generator("select"))
    else:
        how = "drawn by the prior alone"
        places = gumbel_topk(round.offset[round.candidates], budget, 1.0, round.generator("select"))
    drawn = round.candidates[places]
    fell_back = () if because is None else (f"{how}: {because}",)
    return Selection(drawn, metrics=metrics or {}, notes=(*notes, *fell_back), reasons={how: drawn})
