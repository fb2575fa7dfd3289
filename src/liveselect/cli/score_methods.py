"""The methods of ``liveselect score --method``: their names, and how each is built from its settings."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from liveselect.datamodules.clusters.embedding import make_embedder
from liveselect.functional.bands import Band, band_order
from liveselect.grammar import CandidateSource, InfluenceEstimator
from liveselect.influence import LESSInfluence, LossDropInfluence, PerplexityInfluence, ReducibleLossInfluence
from liveselect.scoring import BM25, DSIR, EmbeddingSimilarity, MethodCard, NearDuplicates, NgramRatio, Scorer

Built = tuple[Scorer | InfluenceEstimator, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Method:
    """A method of the command.

    Attributes:
        card: what it is.
        build: makes it from the data and its settings, with what makes scores of its results over the whole pool.
    """

    card: MethodCard
    build: Callable[..., Built]

    def defaults(self) -> dict[str, object]:
        """Return its settings with their defaults."""
        found = list(inspect.signature(self.build).parameters.values())
        return {each.name: each.default for each in found if each.name != "source"}


def build(
    name: str, settings: Mapping[str, object], source: CandidateSource
) -> tuple[Method, dict[str, object], Built]:
    """Return the method of that name, all of its settings, and the method as they make it.

    Raises:
        ValueError: there is no such method or setting, or a setting cannot be.
    """
    check_settings(name, settings)
    method = METHODS[name]
    chosen = {**method.defaults(), **settings}
    return method, chosen, method.build(source=source, **chosen)


def check_settings(name: str, settings: Mapping[str, object]) -> None:
    """Raise ValueError where there is no such method, or it has no such settings."""
    if name not in METHODS:
        raise ValueError(f"expected --method to be one of {sorted(METHODS)}, got {name!r}")
    method = METHODS[name]
    unknown = sorted(set(settings) - set(method.defaults()))
    if unknown:
        raise ValueError(f"{name} has no settings {unknown}: it has {method.defaults()} (--settings.NAME VALUE)")


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _scorer(kind: type[Scorer]) -> Callable[..., Built]:
    def make(source: CandidateSource, **settings: object) -> Built:
        return kind(**settings), _as_it_is

    make.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return make


def _embed(
    source: CandidateSource, embedding: str = "hashed", dimensions: int = 128, pool_rows: int = 1 << 14
) -> Built:
    if embedding.startswith("vectors:"):
        raise ValueError(
            f"expected an embedding that reads texts, as reference examples need vectors too, got {embedding!r}: use "
            "hashed, encoder:NAME or static:NAME"
        )
    embedder = make_embedder(embedding, source.pool.size, lambda tokens: source.decode(tokens), dimensions)

    def embed(tokens: Tensor) -> np.ndarray:
        return embedder.embed(np.zeros(len(tokens), np.int64), tokens)

    def fit_to(tokens: Tensor) -> None:
        rows = max(2, embedder.sample_tokens // max(1, tokens.shape[1]))
        embedder.fit(tokens[:rows])

    return EmbeddingSimilarity(embed, fit_to, pool_rows), _as_it_is


def _perplexity(source: CandidateSource, band: Band = "middle", scorer: str | None = None) -> Built:
    estimator = PerplexityInfluence(band=None, scorer=scorer)
    return estimator, partial(_in_bands, band=band)


def _in_bands(values: Tensor, band: Band) -> Tensor:
    return band_order(-values, band)


def _estimator(kind: type[InfluenceEstimator]) -> Callable[..., Built]:
    def make(source: CandidateSource, **settings: object) -> Built:
        return kind(**settings), _as_it_is

    make.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    return make


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
    "ngram-ratio": Method(NgramRatio.card, _scorer(NgramRatio)),
    "dsir": Method(DSIR.card, _scorer(DSIR)),
    "bm25": Method(BM25.card, _scorer(BM25)),
    "embed": Method(EmbeddingSimilarity.card, _embed),
    "near-duplicates": Method(NearDuplicates.card, _scorer(NearDuplicates)),
    "perplexity": Method(PPL, _perplexity),
    "rho": Method(RHO, _estimator(ReducibleLossInfluence)),
    "less": Method(LESS, _estimator(LESSInfluence)),
    "tap": Method(TAP, _estimator(LossDropInfluence)),
}
NEEDS_MODEL = ("perplexity", "rho", "less", "tap")
"""Methods that score with the model of the configuration."""
