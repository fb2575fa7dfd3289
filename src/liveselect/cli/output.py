"""What the commands say to the person at the terminal."""

import logging
import sys


def say(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_progress_lines() -> None:
    """Let what liveselect logs about its rounds appear on standard error, once."""
    from liveselect.callbacks.lines import LOGGER, StderrHandler

    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(StderrHandler())
