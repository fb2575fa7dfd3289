"""The report of a run: one self-contained HTML page made from ledgers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from liveselect.json_lines import whole_file
from liveselect.report.page import build_page, charts_of
from liveselect.report.runs import Run, load_runs

__all__ = ["Run", "build_page", "is_report", "load_runs", "write_pictures", "write_report"]


def is_report(path: Path) -> bool:
    """Return whether the file is a report of any version of liveselect."""
    with path.open("rb") as file:
        return b": liveselect report</title>" in file.read(1 << 16)


def write_report(paths: Iterable[Path], out: Path, metric: str | None = None, names: Sequence[str] = ()) -> Path:
    """Write the report about the ledgers in ``paths`` to ``out`` and return it.

    If ``out`` is a folder, the page in it is called ``report.html``. ``names`` are those of the runs in the page; by
    default their loggers' or folders' names.

    Raises:
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, or no run evaluated ``metric``.
    """
    if out.is_dir():
        out = out / "report.html"
    page = build_page(load_runs(paths, names), metric)
    with whole_file(out) as file:  # somebody may be looking at it while a run goes on
        file.write(page.encode("utf-8"))
    return out


def write_pictures(
    paths: Iterable[Path], folder: Path, metric: str | None = None, names: Sequence[str] = ()
) -> list[Path]:
    """Write the charts of the report about the ledgers in ``paths`` to ``folder`` as PNG files and return these.

    Raises:
        FileExistsError: ``folder`` is a file.
        FileNotFoundError: a path does not exist or holds no ledger.
        ValueError: a file is not a ledger, or no run evaluated ``metric``.
    """
    from liveselect.report.png import write_png  # draws by matplotlib, which the page does without

    return write_png(charts_of(load_runs(paths, names), metric), folder)
