"""Cheap methods as plain functions from a batch of rows to a column of scores."""

from liveselect.scoring.bm25 import BM25
from liveselect.scoring.near_duplicates import NearDuplicates, SemanticDuplicates
from liveselect.scoring.ngrams import DSIR, NgramRatio
from liveselect.scoring.scorer import MethodCard, Rows, Scorer
from liveselect.scoring.similarity import EmbeddingSimilarity

__all__ = [
    "BM25",
    "DSIR",
    "EmbeddingSimilarity",
    "MethodCard",
    "NearDuplicates",
    "NgramRatio",
    "Rows",
    "Scorer",
    "SemanticDuplicates",
]
