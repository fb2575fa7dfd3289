"""``liveselect validate``: a checkpoint on the validation set."""

import warnings
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    from liveselect.cli.fit import run

    if not any(word.startswith("--ckpt_path") for word in argv) and not {"-h", "--help", "--print_config"} & {*argv}:
        raise ValueError("expected --ckpt_path, the checkpoint to evaluate, such as RUN/checkpoints/last.ckpt")
    with warnings.catch_warnings():  # what the callbacks of the run remember is not needed
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        return run("validate", argv)
