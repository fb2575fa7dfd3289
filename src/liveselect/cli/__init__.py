"""The ``liveselect`` console script. It imports a command, and what that needs, only to run it."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

TRACEBACK_FLAG = "LIVESELECT_TRACEBACK"

COMMANDS = {
    "demo": "train a small model on the texts of Python's library, at random and with selection",
    "prepare": "turn texts into a pool of training sequences on disk",
    "cluster": "sort the sequences of a pool into clusters of similar text",
    "plan": "say what a run will take and whether its selection can pay, from a minute of it",
    "fit": "train a model while its data is selected, from a YAML file (LightningCLI)",
    "validate": "evaluate a checkpoint of `liveselect fit` on the validation set",
    "compare": "train with several methods, and say what each is worth at equal total cost",
    "score": "score every sequence of a pool on a proxy model, for training to draw from",
    "report": "write one HTML page about one or several runs",
    "explain": "show why a run chose a candidate, or did not",
    "diff": "compare what two runs chose",
    "replay": "train on the plans that a run recorded",
    "workspace": "save a view of selection in a W&B project",
}


TROUBLE = {"diff": 2}
"""Exit statuses of commands that have something wrong, where it is not 1: that of diff(1) says that two differ."""

HELP = {"-h", "--help"}

SCORE_SETTINGS: tuple[str, ...] = (
    "out",
    "estimator",
    "regressor",
    "probes",
    "loss_fn",
    "shard_size",
    "device",
    "seed",
    "method",
)
SCORE_SETTINGS += ("settings", "filter", "pool", "parts", "column")
"""What a file of ``liveselect score`` may hold beside the sections of ``liveselect fit``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Expected problems are reported in a paragraph; LIVESELECT_TRACEBACK=1 shows where they were raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if arguments[0] == "--version":
        import liveselect

        sys.stdout.write(f"liveselect {liveselect.__version__}\n")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return _complain("liveselect", f"there is no command {command!r}.{hint}\n\n{usage()}", 2)
    return _run(command, rest)


def usage() -> str:
    """Return the help text."""
    lines = "".join(f"  {name:<10} {text}\n" for name, text in COMMANDS.items())
    return (
        "usage: liveselect COMMAND ...\n\nLive, model-aware data selection for language model pretraining.\n\n"
        f"commands:\n{lines}\n"
        "options:\n  -h, --help  show this text; 'liveselect COMMAND --help' lists the options of a command\n"
        "  --version   show the version\n"
    )


def _run(command: str, arguments: Sequence[str]) -> int:
    name = f"liveselect {command}"
    try:
        if command in ("fit", "validate", "score"):
            from liveselect.cli.overviews import OVERVIEWS
            from liveselect.cli.typos import refuse_typos

            if HELP & set(arguments):
                sys.stdout.write(OVERVIEWS[command])
                return 0
            refuse_typos(arguments, SCORE_SETTINGS if command == "score" else ())
            arguments = ["--help" if word == "--help-all" else word for word in arguments]
        status: int = importlib.import_module(f"liveselect.cli.{command}").main(arguments)
    except KeyboardInterrupt:
        return _complain(name, "stopped.", 130)
    except BrokenPipeError:  # the reader of the output, such as head, has exited; Python would flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(TRACEBACK_FLAG, "0") not in ("", "0") or not _is_expected(error):
            raise
        return _complain(
            name, f"{error}\n(set {TRACEBACK_FLAG}=1 to see where this was raised)", TROUBLE.get(command, 1)
        )
    return status


def _is_expected(error: Exception) -> bool:
    """Whether the error is about the user's input: raised by liveselect itself, or about a file or a setting."""
    if isinstance(error, OSError) or type(error).__name__ == "MisconfigurationException":
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, (ValueError, TypeError, ImportError)) and raised_in.split(".")[0] == "liveselect"


def _complain(name: str, text: str, status: int) -> int:
    sys.stderr.write(f"{name}: {text.rstrip()}\n")
    return status
