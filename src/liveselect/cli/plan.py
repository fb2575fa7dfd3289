"""``liveselect plan``: what a run of ``liveselect fit`` will take, and whether its selection can pay, from a minute."""

import argparse
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from liveselect.cli.plan_forecast import MethodCost, Trial
    from liveselect.cli.plan_run import Plan

DESCRIPTION = """\
Run a configuration of `liveselect fit` for a minute at most, and say what the whole run will take: time and memory of a
round, what each method costs at its sizes, when it can be known whether selection pays, and what is recommended.

Nothing is kept: no checkpoint, no record, no logger.

  liveselect plan --config run.yaml
  liveselect plan --config run.yaml --seconds 20 --trainer.max_steps 5000
  liveselect plan --config run.yaml --proxy proxy.yaml

All other options are those of `liveselect fit`.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="liveselect plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, metavar="N", help="of the trial, about (default: 60)")
    add("--proxy", metavar="PROXY", help="parameters of a proxy to score with, or a file that goes on top: its model")
    add("--json", type=Path, metavar="FILE", help="write the numbers there too")
    arguments, rest = parser.parse_known_args(list(argv))
    if not arguments.seconds > 0:
        parser.error(f"argument --seconds: expected more than 0, got {arguments.seconds:g}")
    if not rest:
        parser.error("expected --config FILE, as for `liveselect fit`")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls, not the user's

    from liveselect.cli.output import say
    from liveselect.cli.plan_run import make_plan

    with tempfile.TemporaryDirectory() as folder, _without_lines():
        plan = make_plan(rest, Path(folder), arguments.seconds, arguments.proxy)
    if plan is None:  # another rank than the first
        return 0
    for line in lines_of(plan):
        say(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(plan.builtins(), indent=1) + "\n")
    return 0


@contextmanager
def _without_lines() -> Iterator[None]:
    """Open a block in which rounds do not say what they did."""
    log = logging.getLogger("liveselect")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def lines_of(plan: "Plan") -> list[str]:
    """Return a plan as lines of text."""
    from liveselect.cli.plan_forecast import scoring_lines
    from liveselect.report import words

    trial = plan.trial
    lines = [
        f"{trial.method}, {trial.parameters / 1e6:,.1f}M parameters, {_steps(trial)} of {trial.global_batch} examples, "
        f"a pool of {trial.pool:,}",
        "",
        *_costs(trial),
        "",
        "| method | a round | of training's time | must teach, beside random data | measured a round |",
        "| --- | --- | --- | --- | --- |",
        *(_method_line(each, trial) for each in plan.methods),
        "",
    ]
    if math.isfinite(trial.total_steps):
        lines += scoring_lines(trial)
        lines += [
            f"the pool is trained on {trial.passes:.2f} times; what is chosen, {trial.ratio:.0%} of it, up to "
            f"{trial.epochs:.2f} times"
        ]
    lines += [_answer(plan)]
    if plan.proxy is not None:
        lines += [f"a proxy of {plan.proxy / 1e6:,.1f}M parameters is large enough to rank data for this model"]
    lines += [f"warning: {text}" for text in plan.recommendation.warnings]
    lines += ["", f"recommended: {plan.recommendation.method}: {plan.recommendation.because}"]
    if math.isfinite(trial.total_steps):
        lines.insert(3, f"the run: {words.duration(trial.seconds)}, without validation, and {words.flops(trial.flops)}")
    return lines


def _steps(trial: "Trial") -> str:
    return f"{trial.total_steps:,.0f} steps" if math.isfinite(trial.total_steps) else "steps without an end"


def _costs(trial: "Trial") -> list[str]:
    from liveselect.report import words

    part = ""
    if trial.measured < trial.asked:
        part = f"; timed on {trial.measured:,} of {trial.asked:,} candidates"
    kind = "GPU memory" if trial.device == "cuda" else "memory of the process"
    return [
        f"a round of {trial.every_n_steps:,} steps: {words.duration(trial.training_seconds)} of training, "
        f"{words.duration(trial.round_seconds)} of selection ({trial.overhead:.1%} of training's time){part}",
        f"once: {words.duration(trial.once_seconds)} to open the data and make what is drawn from"
        + (f", and {words.duration(trial.before_seconds)} before the run" if trial.before_seconds else ""),
        f"{kind}: {trial.memory / 2**20:,.0f} MiB at its peak, {trial.training_memory / 2**20:,.0f} MiB by training",
    ]


def _method_line(method: "MethodCost", trial: "Trial") -> str:
    from liveselect.functional.curves import rate_gain_needed
    from liveselect.report import words

    if method.seconds is None:
        return f"| {method.name} | – | – | – | {method.note} |"
    overhead = method.seconds / max(1e-9, trial.training_seconds)
    cells = [words.duration(method.seconds), f"{overhead:.1%}", f"{rate_gain_needed(overhead, 0.0):.2f} times as fast"]
    return f"| {' | '.join([method.name, *cells, f'{method.candidates:,}'])} |"


def _answer(plan: "Plan") -> str:
    found = plan.answer
    asked = "" if plan.has_verdict else " (verdict is off: set verdict to find out)"
    head = f"does it pay{asked}: {found.looks:.0f} look-aheads of {found.length} steps at share={found.share:g}"
    if math.isinf(plan.trial.total_steps):
        head = f"does it pay{asked}: look-aheads of {found.length} steps at share={found.share:g}"
    if found.step is not None:
        return f"{head}; an effect as large as its noise is found by step {found.step:,}"
    if found.share_needed < 1:
        return f"{head}, too few for an answer: share={found.share_needed:.2g} would give one by the end"
    return f"{head}: the run is too short for an answer. Compare whole runs: liveselect compare"
