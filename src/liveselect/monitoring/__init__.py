"""What a run's loggers are shown of its selection."""

from liveselect.monitoring.view import RoundView, evaluation_scalars, round_scalars, spread

__all__ = ["RoundView", "evaluation_scalars", "round_scalars", "spread"]
