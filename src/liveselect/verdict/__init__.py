"""Whether selection beats random data at equal total cost, found out inside of the run."""

from liveselect.verdict.answer import Answer, Look
from liveselect.verdict.looking import LookAhead
from liveselect.verdict.settings import Verdict

__all__ = ["Answer", "Look", "LookAhead", "Verdict"]
