"""The report of a run: one self-contained HTML page made from ledgers."""

from collections.abc import Iterable
from pathlib import Path

from liveselect.report import pictures
from liveselect.report.page import build_page
from liveselect.report.runs import Run, load_runs

__all__ = ["Run", "build_page", "is_report", "load_runs", "write_pictures", "write_report"]


def is_report(path: Path) -> bool:
    """Return whether the file is a report of any version of liveselect."""
    with path.open("rb") as file:
        return b": liveselect report</title>" in file.read(1 << 16)


def write_report(paths: Iterable[Path], out: Path, metric: str | None = None) -> Path:
    """Write the report about the ledgers in ``paths`` to ``out`` and return it.

    If ``out`` is a folder, the page in it is called ``report.html``.

    Raises:
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, or no run evaluated ``metric``.
    """
    if out.is_dir():
        out = out / "report.html"
    page = build_page(load_runs(paths), metric)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def write_pictures(paths: Iterable[Path], folder: Path, metric: str | None = None) -> list[Path]:
    """Write the pictures of the report about the ledgers in ``paths`` to ``folder`` as PNG files and return these.

    Raises:
        FileExistsError: ``folder`` is a file.
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, or no run evaluated ``metric``.
    """
    runs = load_runs(paths)
    with pictures.written_to(folder) as written:
        build_page(runs, metric)
    return written
