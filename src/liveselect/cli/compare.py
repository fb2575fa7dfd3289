"""``liveselect compare``: methods at equal total cost, over seeds, pools and references."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liveselect.cli.compare_runs import Comparison
    from liveselect.report.comparison import Row

DESCRIPTION = """\
Train with each of several methods, on each of several pools and references, with each of several seeds, and say what
each method is worth beside random data at equal total cost (selection included, in FLOPs and in seconds).

Runs are judged on held-out reference text (data.validation), on a sample of the pool's own mixture, and, where a task
names it, on text that nothing aims at; at averaged weights, and at raw ones beside them. Runs of one seed make a pair.

A comparison that was stopped goes on when it is started again: finished runs are not repeated.

  liveselect compare --config run.yaml --methods random prior LiveSelection --seeds 0 1 2
  liveselect compare comparison.yaml --processes 2

A comparison file:

  configs: [run.yaml]                  # as for `liveselect fit`
  methods:
    random: random                     # what the others are compared with; without it, the first
    narrow: prior:ratio=0.05
    live: {preset: LiveSelection, settings: {cost: 0.03}}
    mine: my_method.yaml               # goes on top of the configs
  tasks:
    law: {pool: pools/a, reference: law.jsonl, validation: law_held_out.jsonl, elsewhere: other.jsonl}
  seeds: [0, 1, 2]
"""

METHODS_HELP = """\
[NAME=]METHOD[:KEY=VALUE,...], where METHOD is random, prior, a preset of liveselect.callbacks (LiveSelection, MATES,
...), a YAML file that goes on top of the configs, or configured: what these name under `select`; the key steps=1.1
trains a tenth longer (default: random prior LiveSelection)"""

LABELS = {
    "averaged_val_loss": "held-out loss",
    "averaged_mixture_loss": "pool's mixture",
    "averaged_elsewhere_loss": "elsewhere",
    "val_loss": "raw weights",
}
"""What runs are judged by: names of metrics, and of columns."""

METRIC = "averaged_val_loss"
"""The one that decides."""

DRAWN = ("averaged_val_loss", "averaged_mixture_loss", "averaged_elsewhere_loss")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="liveselect compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="a comparison file; options take the place of what it says")
    add("--config", type=Path, nargs="+", metavar="FILE", help="files of `liveselect fit` that all runs share")
    add("--methods", nargs="+", metavar="METHOD", help=METHODS_HELP)
    add("--seeds", nargs="+", type=int, metavar="N", help="(default: 0)")
    add("--steps", type=int, metavar="N", help="training steps; rounds, probes and intervals shrink alike")
    add("--processes", type=int, default=1, metavar="N", help="runs at a time, which share the threads (default: 1)")
    add("--out", type=Path, default=Path("comparison"), metavar="FOLDER", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("steps", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.file is None and arguments.config is None:
        parser.error("expected a comparison file, or --config")

    from liveselect.callbacks.lines import show_lines
    from liveselect.cli.compare_runs import Comparison, Method, load_comparison

    given = {} if arguments.file is None else load_comparison(arguments.file)
    given.setdefault("methods", [Method.of(each) for each in ("random", "prior", "LiveSelection")])
    given |= {} if arguments.config is None else {"configs": arguments.config}
    given |= {} if arguments.methods is None else {"methods": [Method.of(each) for each in arguments.methods]}
    given |= {name: value for name in ("seeds", "steps") if (value := getattr(arguments, name)) is not None}
    show_lines(always=True)
    return run_comparison(Comparison(folder=arguments.out, **given), arguments.processes)


def run_comparison(comparison: "Comparison", processes: int = 1) -> int:
    """Train what is left of a comparison, show and save what came out, and return the exit status."""
    from liveselect.cli.output import say

    failed = comparison.train(processes)
    rows = show_results(comparison)
    for name, reason in failed.items():
        say(f"{name} has failed: {reason}")
    if rows:
        say(
            f"Results: {comparison.folder / 'comparison.md'}, .png, .json; a page on any of the runs: liveselect report"
        )
    return 1 if failed else 0


def show_results(comparison: "Comparison", beside: Sequence[str] = ()) -> "list[Row]":
    """Print the table of what is finished, and write it with its figure into the folder of the comparison.

    Methods named ``beside`` are compared with in a sentence, as the baseline is.
    """
    from liveselect.cli.compare_runs import LEDGER, save_results
    from liveselect.cli.output import say
    from liveselect.ledger import Ledger
    from liveselect.report.comparison import Trial, markdown, rows_of, sentences, table
    from liveselect.report.png import write_intervals
    from liveselect.report.runs import Run

    done = [planned for planned in comparison.runs() if planned.finished]
    trials = [
        Trial(each.task, each.method, each.seed, Run(each.method, Ledger.read(each.folder / LEDGER))) for each in done
    ]
    if not trials:
        say("No run is finished, so there is nothing to compare.")
        return []
    baseline = comparison.baseline
    rows = rows_of(trials, baseline, list(LABELS))
    cells = table(rows, baseline, LABELS)
    said = sentences(rows, baseline, METRIC)
    for other in beside:
        against = rows_of([trial for trial in trials if trial.method != baseline], other, list(LABELS))
        said += sentences(against, other, METRIC)
    notes = (
        "Nats per token, at equal total FLOPs and averaged weights unless stated otherwise. What follows the "
        f"held-out loss is less that of {baseline} with the same seed, so below zero is better. Intervals are 95%, "
        "over seeds. Shares are of FLOPs / of time."
    )
    print_table(cells)
    for text in [notes, *said]:
        say(text)
    lines = [markdown(cells), notes, "", *(f"- {text}" for text in said), ""]
    (comparison.folder / "comparison.md").write_text("\n".join(lines), encoding="utf-8")
    save_results(comparison.folder / "comparison.json", [row.builtins() for row in rows])
    others = [row for row in rows if row.method != baseline and row.differences]
    if others:
        drawn = [name for name in DRAWN if any(name in row.differences for row in others)]
        write_intervals(
            [
                (
                    f"{row.task}: {row.method}" if row.task else row.method,
                    [
                        None if (found := row.differences.get(name)) is None else (found.mean, found.half or 0.0)
                        for name in drawn
                    ],
                )
                for row in others
            ],
            [LABELS[name] for name in drawn],
            f"nats per token less {baseline}'s at equal total FLOPs",
            "What each method is worth at equal total cost",
            comparison.folder / "comparison.png",
        )
    return rows


def print_table(cells: Sequence[Sequence[str]]) -> None:
    """Print a table, its head first; in a narrow terminal without the columns that matter least."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from liveselect.report.comparison import AT_END, IN_TIME

    console, head = Console(), cells[0]
    kept = [i for i, name in enumerate(head) if name != "task" or len({row[i] for row in cells[1:]}) > 1]
    if console.width < sum(max(len(row[i]) for row in cells) + 3 for i in kept) + 1:
        least = (LABELS["val_loss"], LABELS["averaged_elsewhere_loss"], IN_TIME, AT_END)
        kept = [i for i in kept if head[i] not in least]
        loss = head.index(LABELS[METRIC])
        cells = [[*row[:loss], row[loss].split(" ± ")[0], *row[loss + 1 :]] for row in cells]
    widths = [max(len(word) for word in [*head[i].split(), *(row[i] for row in cells[1:])]) for i in kept]
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for i, width in zip(kept, widths, strict=True):
        shown.add_column(head[i], justify="left" if head[i] in ("task", "method") else "right", min_width=width)
    for row in cells[1:]:
        shown.add_row(*(row[i] for i in kept))
    console.print(shown, width=max(console.width, sum(widths) + 2 * len(widths) + 2))
