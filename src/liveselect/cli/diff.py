"""``liveselect diff``: what two runs chose differently."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from liveselect.cli.report import RUN

DESCRIPTION = """\
Compare what two runs chose, round by round: whether the plans are the same, how many candidates both chose, the
distance of their mixtures of groups (0 alike, 1 disjoint), and the rank correlation of their scores.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; the status is 0 when all plans are the same, 1 when they are not, and 2 for trouble."""
    parser = argparse.ArgumentParser(prog="liveselect diff", description=DESCRIPTION)
    for name in ("run_a", "run_b"):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=RUN)
    arguments = parser.parse_args(argv)

    from liveselect.cli.output import say
    from liveselect.decisions import find_decisions, lacking_rounds, rounds_in
    from liveselect.decisions.diff import compare_runs
    from liveselect.decisions.resumed import rounds_as_text

    found = compare_runs(arguments.run_a, arguments.run_b)
    say(f"{'round':>5}  {'plans':<9}  {'chosen':>15}  {'by both':>9}  {'mixture':>7}  {'scores':>7}  scored by both")
    for entry in found:
        plans = "same" if entry.same_plan else "different"
        chosen = f"{entry.chosen[0]} / {entry.chosen[1]}"
        correlation = "-" if math.isnan(entry.correlation) else f"{entry.correlation:.3f}"
        say(
            f"{entry.round:>5}  {plans:<9}  {chosen:>15}  {entry.shared:>9}  {entry.mixture:>7.3f}  {correlation:>7}  "
            f"{entry.scored}"
        )
    folders = [find_decisions(run) for run in (arguments.run_a, arguments.run_b)]
    rounds = [list(rounds_in(folder)) for folder in folders]
    same = all(entry.same_plan for entry in found) and rounds[0] == rounds[1]
    apart = next((entry.round for entry in found if not entry.same_plan), None)
    if not found:
        of_each = [rounds_as_text(found) for found in rounds]
        say(f"No round is recorded of both: one has {of_each[0]}, the other {of_each[1]}.")
    elif apart is not None:
        say(f"The plans first differ in round {apart}.")
    elif not same:
        counts = f"there are {len(rounds[0])} and {len(rounds[1])}"
        say(f"The plans of the {len(found)} rounds that both have are the same; {counts}.")
    else:
        say(f"All {len(found)} plans are the same.")
    for folder in folders:
        if (missing := lacking_rounds(folder)).rounds:
            say(f"{folder} lacks {missing}")
    if not found:
        return 2
    return 0 if same else 1
