"""Whether selection beats random data at equal total cost, found out inside of the run."""

from liveselect.verdict.settings import Verdict

__all__ = ["Verdict"]
