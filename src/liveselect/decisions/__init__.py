"""The decision ledger: why every candidate was chosen or not, one Parquet file for each round."""

from liveselect.decisions.files import (
    DecisionLedger,
    RecordedPlan,
    check_one_run,
    find_decisions,
    read_about,
    read_plan,
    read_round,
    rounds_in,
)
from liveselect.decisions.resumed import carry_decisions, lacking_rounds
from liveselect.decisions.table import RoundDecisions

__all__ = [
    "DecisionLedger",
    "RecordedPlan",
    "RoundDecisions",
    "carry_decisions",
    "check_one_run",
    "find_decisions",
    "lacking_rounds",
    "read_about",
    "read_plan",
    "read_round",
    "rounds_in",
]
