"""The decision ledger: why every candidate was chosen or not, one Parquet file for each round."""

from liveselect.decisions.files import (
    MOST_REJECTED,
    DecisionLedger,
    RecordedPlan,
    check_one_run,
    find_decisions,
    read_about,
    read_plan,
    read_round,
    read_scores,
    rounds_in,
)
from liveselect.decisions.resumed import carry_decisions, lacking_rounds
from liveselect.decisions.table import RoundDecisions

__all__ = [
    "MOST_REJECTED",
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
    "read_scores",
    "rounds_in",
]
