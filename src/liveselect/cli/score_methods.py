"""The methods of ``liveselect score --method``: their names, and how each is built from its settings."""

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from liveselect.datamodules.clusters.embedding import make_embedder
from liveselect.functional.bands import Band, band_order
from liveselect.grammar import CandidateSource, InfluenceEstimator
from liveselect.influence import LESSInfluence, LossDropInfluence, PerplexityInfluence, ReducibleLossInfluence
from liveselect.scoring import (
    BM25,
    DSIR,
    EmbeddingSimilarity,
    MethodCard,
    NearDuplicates,
    NgramRatio,
    Scorer,
    SemanticDuplicates,
)

Settings = dict[str, Any]
Part = Scorer | InfluenceEstimator


@dataclass(frozen=True)
class Method:
    """A method of the command.

    Attributes:
        card: what it is.
        part: makes it; its arguments are the settings of the method, but for ``source``, the data.
        finish: makes scores of its results over the whole pool; called with them and the settings.
    """

    card: MethodCard
    part: Callable[..., Part]
    finish: Callable[[Tensor, Settings], Tensor] = lambda values, settings: values


def build(name: str, settings: Mapping[str, object], source: CandidateSource) -> "BuiltMethod":
    """Return the method of that name, all of its settings, and what they make.

    Raises:
        ValueError: there is no such method or setting, or a setting cannot be.
    """
    chosen = check_settings(name, settings)
    method = METHODS[name]
    given = {"source": source} if "source" in inspect.signature(method.part).parameters else {}
    return BuiltMethod(
        method.card, chosen, method.part(**given, **chosen), lambda values: method.finish(values, chosen)
    )


@dataclass(frozen=True)
class BuiltMethod:
    """A method with its settings.

    Attributes:
        card: what it is.
        chosen: all of its settings.
        part: scores batches.
        finish: makes scores of its results over the whole pool.
    """

    card: MethodCard
    chosen: Settings
    part: Part
    finish: Callable[[Tensor], Tensor]


def check_settings(name: str, settings: Mapping[str, object]) -> Settings:
    """Return all settings of a method: those that are given, of their types, and the defaults of the others.

    Raises:
        ValueError: there is no such method, or it has no such settings.
    """
    if name not in METHODS:
        raise ValueError(f"expected --method to be one of {sorted(METHODS)}, got {name!r}")
    part = METHODS[name].part
    parser = ArgumentParser(exit_on_error=False)
    if inspect.isclass(part):
        parser.add_class_arguments(part)
    else:
        parser.add_function_arguments(part, skip={"source"})
    try:
        return dict(parser.parse_object(dict(settings)).as_dict())
    except ArgumentError as error:
        known = ", ".join(f"{key}={value!r}" for key, value in parser.get_defaults().as_dict().items())
        raise ValueError(f"{name} cannot be set so: {error}. Its settings and defaults: {known}") from error


def _embed(
    source: CandidateSource, embedding: str = "hashed", dimensions: int = 128, pool_rows: int = 1 << 14
) -> Scorer:
    return EmbeddingSimilarity(**_embedding(source, embedding, dimensions, pool_rows))


def _semantic_duplicates(
    source: CandidateSource,
    embedding: str = "hashed",
    threshold: float = 0.95,
    clusters: int | None = None,
    dimensions: int = 128,
    pool_rows: int = 1 << 14,
) -> Scorer:
    made = _embedding(source, embedding, dimensions, pool_rows)
    return SemanticDuplicates(threshold=threshold, clusters=clusters, **made)


class _Embedding(TypedDict):
    embed: Callable[[Tensor], np.ndarray]
    fit_to: Callable[[Tensor], None]
    pool_rows: int
    networks: Sequence[nn.Module]
    uncounted: Sequence[str]


def _embedding(source: CandidateSource, embedding: str, dimensions: int, pool_rows: int) -> _Embedding:
    if embedding.startswith("vectors:"):
        raise ValueError(
            f"expected an embedding that reads texts, as reference examples need vectors too, got {embedding!r}: use "
            "hashed, encoder:NAME or static:NAME"
        )
    if pool_rows < 2:
        raise ValueError(f"expected pool_rows of at least 2 to fit an embedding to, got {pool_rows}")
    embedder = make_embedder(embedding, source.pool.size, lambda tokens: source.decode(tokens), dimensions)

    def embed(tokens: Tensor) -> np.ndarray:
        return embedder.embed(np.zeros(len(tokens), np.int64), tokens)

    def fit_to(tokens: Tensor) -> None:
        rows = max(2, embedder.sample_tokens // max(1, tokens.shape[1]))
        embedder.fit(tokens[:rows])

    return _Embedding(
        embed=embed,
        fit_to=fit_to,
        pool_rows=pool_rows,
        networks=embedder.networks,
        uncounted=embedder.uncounted,
    )


def _perplexity(band: Band = "middle", scorer: str | None = None) -> InfluenceEstimator:
    return PerplexityInfluence(band=None, scorer=scorer)  # the band is cut out of the whole pool


def _in_bands(values: Tensor, settings: Settings) -> Tensor:
    return band_order(-values, settings["band"])


LIVE = "yes: liveselect.influence.{}, at the round's clock"
PPL = MethodCard(
    name="perplexity",
    measures="2 in the chosen third of perplexity, then 1 and 0",
    source="the PPL selector of Compute-Constrained Data Selection, arXiv 2410.16208; Marion et al., arXiv 2309.04564",
    published={
        "band": "middle",
        "cuts": "0.333 and 0.666",
        "scorer": "Llama-2-7B tuned on the reference set",
        "C/6ND": 1 / 3,
    },
    refreshed=LIVE.format("PerplexityInfluence"),
)
RHO = MethodCard(
    name="rho",
    measures="loss of the model less that of one trained on the reference set, nats per token",
    source="Mindermann et al. 2022, 'RHO-Loss', arXiv 2206.07137",
    published={"candidates": 320, "chosen": 32, "cost of a step": 4.3333},
    refreshed=LIVE.format("ReducibleLossInfluence"),
)
LESS = MethodCard(
    name="less",
    measures="cosine of the candidate's Adam step with the reference gradients, -1..1",
    source="Xia et al. 2024, 'LESS', arXiv 2402.04333",
    published={"checkpoints": 4, "dimensions": 8192, "kept": 0.05, "LoRA rank": 128, "C/6ND": 1.8},
    refreshed=LIVE.format("LESSInfluence"),
)
TAP = MethodCard(
    name="tap",
    measures="share of its loss that the candidate loses while the model trains on the reference set",
    source="TAP, arXiv 2605.09404 (abstract)",
    published={"forwards": 2},
    refreshed=LIVE.format("LossDropInfluence"),
)
METHODS = {
    "ngram-ratio": Method(NgramRatio.card, NgramRatio),
    "dsir": Method(DSIR.card, DSIR),
    "bm25": Method(BM25.card, BM25),
    "embed": Method(EmbeddingSimilarity.card, _embed),
    "near-duplicates": Method(NearDuplicates.card, NearDuplicates),
    "semantic-duplicates": Method(SemanticDuplicates.card, _semantic_duplicates),
    "perplexity": Method(PPL, _perplexity, _in_bands),
    "rho": Method(RHO, ReducibleLossInfluence),
    "less": Method(LESS, LESSInfluence),
    "tap": Method(TAP, LossDropInfluence),
}
NEEDS_MODEL = ("perplexity", "rho", "less", "tap")
"""Methods that score with the model of the configuration."""
