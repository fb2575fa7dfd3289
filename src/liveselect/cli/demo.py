"""``liveselect demo``: selection against random data, on the texts of Python's own library, in a few minutes."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Pretrain a small decoder on texts that come with Python (its library's code, docstrings, comments and tables, its
language reference): on random data, on what a prior of words prefers, and on data that is selected live. The aim is
prose of the language reference; the judges are other prose of it, which neither the model nor selection sees, and a
sample of the pool, whose loss shows what a narrow choice costs. Ends with a table of what came out, at equal total
cost, and one HTML page. Nothing is downloaded. All settings are in configs/demo.yaml and the files beside it.

methods
  live     the recommended default: live influence inside the better part of the prior
  mates    rounds of probes with the live model; a regressor predicts from them what to train on
  quad     the pool is clustered, and clusters are pulled as the arms of a bandit
  pds      a small proxy model scores the pool before training, which draws from the scores
"""

METHODS = {
    "live": ("demo.yaml",),
    "mates": ("demo.yaml", "demo_mates.yaml"),
    "quad": ("demo.yaml", "demo_quad.yaml"),
    "pds": ("demo.yaml", "demo_pds.yaml"),
}
"""The configs of each method, each one on top of those before it."""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="liveselect demo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="live", help="how data is selected (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="training steps of each run (default: those of the config)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the weights and of selection (default: %(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="(default: liveselect-demo, and -mates, -quad or -pds after it)")
    add("--resume", action="store_true", help="continue a demo that was stopped")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {arguments.steps}")

    from liveselect.cli.demo_runs import Demo

    folder = arguments.out or Path("liveselect-demo" + ("" if arguments.method == "live" else f"-{arguments.method}"))
    demo = Demo(folder, METHODS[arguments.method], arguments.method, arguments.steps, arguments.seed)
    try:
        demo.run(arguments.resume)
    except KeyboardInterrupt:
        program = sys.argv[0] if Path(sys.argv[0]).is_file() else "liveselect"
        again = " ".join([program, "demo", *(word for word in argv if word != "--resume"), "--resume"])
        sys.stderr.write(f"\nstopped; to continue from here: {again}\n")
        return 130
    return 0
