"""Shows rounds in TensorBoard: histograms, and examples as text. Scalars go through the logger."""

from typing import TYPE_CHECKING

import numpy as np

from liveselect.ledger import Histogram
from liveselect.monitoring.view import EXAMPLE_COLUMNS, PREFIX, Cell, RoundView, example_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes to a SummaryWriter.

    Args:
        writer: ``TensorBoardLogger.experiment``.
    """

    def __init__(self, writer: "SummaryWriter") -> None:
        self._writer = writer

    def round(self, view: RoundView, rich: bool) -> None:
        """Show a round; ``rich`` adds texts."""
        record = view.record
        if record.histogram is not None:
            edges = record.histogram.edges
            self._histogram("scores", record.histogram, record.step)
            self._histogram("scores_of_chosen", Histogram(edges, record.histogram.chosen, []), record.step)
        influence = np.asarray(record.influence, dtype=np.float64)
        if np.isfinite(influence).any():
            self._writer.add_histogram(f"{PREFIX}influence", influence[np.isfinite(influence)], record.step)
        if rich and view.examples:
            rows: list[list[Cell]] = [[*EXAMPLE_COLUMNS], ["---"] * len(EXAMPLE_COLUMNS), *example_rows(view)]
            text = "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)
            self._writer.add_text(f"{PREFIX}examples", text, record.step)

    def alert(self, title: str, text: str) -> None:
        """Show an alarm as text."""
        self._writer.add_text(f"{PREFIX}alarms", f"**{title}** {text}")

    def _histogram(self, name: str, histogram: Histogram, step: int) -> None:
        edges, counts = np.asarray(histogram.edges), np.asarray(histogram.counts, dtype=np.float64)
        centres = (edges[1:] + edges[:-1]) / 2
        self._writer.add_histogram_raw(
            f"{PREFIX}{name}",
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * centres).sum()),
            sum_squares=float((counts * centres**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _cell(value: Cell) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
