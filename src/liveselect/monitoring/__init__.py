"""What the loggers of a run show of its selection."""

from liveselect.ledger import spread
from liveselect.monitoring.view import RoundView, evaluation_scalars, round_scalars

__all__ = ["RoundView", "evaluation_scalars", "round_scalars", "spread"]
