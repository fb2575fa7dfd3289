"""The report of a run: one self-contained HTML page made from ledgers."""

from collections.abc import Iterable
from pathlib import Path

from liveselect.report.page import build_page
from liveselect.report.runs import Run, load_runs

__all__ = ["Run", "build_page", "load_runs", "write_report"]


def write_report(paths: Iterable[Path], out: Path, metric: str | None = None) -> Path:
    """Write the report about the ledgers in ``paths`` to ``out`` and return it.

    Raises:
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, or no run evaluated ``metric``.
    """
    page = build_page(load_runs(paths), metric)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
