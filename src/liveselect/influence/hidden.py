"""Names all layers that an estimator cannot measure, before anything is fitted."""

import warnings
from collections.abc import Callable, Collection, Iterable

from torch import Tensor

from liveselect import distributed
from liveselect.functional.coverage import Hidden, described, hidden_layers
from liveselect.grammar import LiveModel, Round, SelectionWarning

LEAST_SHARE = 0.5
"""Share of the parameters below which a measurement says little about the model."""

_ROWS = 2  # one alone does not show which dimension counts examples


def refuse_hidden(
    model: LiveModel,
    round: Round,
    names: Collection[str],
    what: str,
    advice: Callable[[list[Hidden]], str],
    replays: bool = True,
) -> None:
    """Raise ValueError when layers hide the gradients of single examples in the parameters ``names``.

    Args:
        model: the live model.
        round: serves a few candidates for one forward.
        names: of the parameters.
        what: cannot see them, for the message.
        advice: returns what helps against these layers.
        replays: whether a layer may be seen as it computes once more.
    """
    batch = next(round.batches(round.candidates[:_ROWS]))
    rows = {name: value[:_ROWS] if isinstance(value, Tensor) else value for name, value in batch.items()}
    hidden = hidden_layers(model.module, model.loss_fn, model.to_device(rows), names, replays)
    model.view.reshard()
    if hidden:
        raise ValueError(
            f"{what} cannot see the gradients of single examples in these layers: {described(hidden)}. {advice(hidden)}"
        )


def names_in(hidden: Iterable[Hidden]) -> list[str]:
    """Return the parameters of hidden layers."""
    return list(dict.fromkeys(name for each in hidden for name in each.parameters))


def warn_of_share(estimator: str, share: float, advice: str) -> None:
    """Warn when an estimator measures less than half of the trained parameters."""
    if share < LEAST_SHARE and distributed.rank() == 0:
        warnings.warn(
            f"{estimator} measures {share:.0%} of the parameters that are trained (measured_share), and knows nothing "
            f"of what candidates do to the others: {advice}",
            SelectionWarning,
            stacklevel=3,
        )
