"""Vectors for the blocks of a pool: from hashed n-grams, an encoder, static word vectors, or the user's file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from liveselect.arguments import refuse_missing_folder
from liveselect.datamodules.rows.groups import check_if_listed
from liveselect.functional.ngrams import hashed_ngrams

if TYPE_CHECKING:
    from model2vec import StaticModel
    from scipy.sparse import csr_matrix

SAMPLE_TOKENS = 1 << 23  # tokens that a basis is fitted on: 200 MB of counts
COUNTERS = 1 << 21  # counters of the rows hashed at once: more than a core's cache holds is three times as slow
FORMS = "hashed, encoder:NAME, static:NAME or vectors:FILE.npy"

Encode = Callable[[list[str]], np.ndarray]
"""Maps n texts to vectors ``(n, D)``."""


class Embedder(Protocol):
    """Turns blocks of tokens into vectors.

    Attributes:
        dimensions: D, length of a vector; known after ``fit``.
        sample_tokens: tokens of the sample that ``fit`` gets, at the most.
        networks: modules that it runs, whose FLOPs can be counted.
        uncounted: names of its work whose FLOPs are not.
    """

    dimensions: int
    sample_tokens: int
    networks: tuple[nn.Module, ...]
    uncounted: tuple[str, ...]

    def fit(self, blocks: Tensor) -> None:
        """Fit the embedding to a random sample of blocks, ``(m, T)``."""

    def embed(self, ids: np.ndarray, blocks: Tensor) -> np.ndarray:
        """Return ``(n, D)`` float32 vectors of the candidates ``ids (n,)``, whose tokens are ``blocks (n, T)``."""


class HashedEmbedder:
    """Latent semantic analysis of hashed token n-grams: needs no model and no text.

    Counts of tokens and neighbouring pairs, hashed into buckets, damped by a logarithm and weighted by inverse document
    frequency, are projected on the leading right singular vectors of a sample, less the sample's mean.

    Args:
        dimensions: D; fewer when the sample has fewer rows.
        buckets: a power of two.
        seed: seed of the randomized decomposition.
    """

    networks: tuple[nn.Module, ...] = ()
    uncounted: tuple[str, ...] = ("sparse products and their decomposition (scipy)",)

    def __init__(self, dimensions: int = 128, buckets: int = 1 << 15, seed: int = 0) -> None:
        if dimensions < 1:
            raise ValueError(f"expected at least one dimension, got {dimensions}")
        self.dimensions = dimensions
        self.buckets = buckets
        self.seed = seed
        self.sample_tokens = SAMPLE_TOKENS
        self._rows = max(1, COUNTERS // buckets)
        self._basis = np.empty((0, 0), np.float32)  # (buckets, D)
        self._mean = np.empty(0, np.float32)

    def fit(self, blocks: Tensor) -> None:
        """Fit document frequencies and the basis to a sample of blocks ``(m, T)``.

        Raises:
            ValueError: there are fewer than two blocks.
        """
        from sklearn.utils.extmath import randomized_svd

        if len(blocks) < 2:
            raise ValueError(f"expected at least two blocks to find how they differ, got {len(blocks)}")
        sample = self._counts(blocks)
        sample.sum_duplicates()
        frequency = np.bincount(sample.indices, minlength=self.buckets)
        inverse = np.log((1 + sample.shape[0]) / (1 + frequency)).astype(np.float32) + 1
        sample.data *= inverse[sample.indices]
        self.dimensions = min(self.dimensions, sample.shape[0] - 1)
        basis = randomized_svd(sample, self.dimensions, n_iter=4, random_state=self.seed)[2]
        self._mean = np.asarray(sample @ basis.T).mean(axis=0)
        self._basis = np.ascontiguousarray(basis.T) * inverse[:, None]

    def embed(self, ids: np.ndarray, blocks: Tensor) -> np.ndarray:
        """Return the vectors of ``blocks (n, T)``, ``(n, D)`` float32."""
        parts = [self._counts(part) @ self._basis for part in blocks.split(self._rows)]
        return np.concatenate(parts) - self._mean

    def _counts(self, blocks: Tensor) -> "csr_matrix":
        """Return the counts ``(n, buckets)``, sparse; an n-gram that occurs twice has two entries, which add up."""
        from scipy.sparse import csr_matrix

        parts = [hashed_ngrams(part, self.buckets) for part in blocks.split(self._rows)]
        buckets, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        starts = np.arange(len(buckets) + 1) * buckets.shape[1]
        return csr_matrix(
            (weights.numpy().ravel(), buckets.int().numpy().ravel(), starts), (len(buckets), self.buckets)
        )


class TextEmbedder:
    """The vectors that any function makes of the texts of blocks.

    Args:
        encode: maps a list of n texts to ``(n, D)``.
        decode: maps tokens ``(n, T)`` to n texts.
        networks: modules that ``encode`` runs.
    """

    sample_tokens = 1
    uncounted: tuple[str, ...] = ()  # looking up static vectors takes hardly any

    def __init__(
        self, encode: Encode, decode: Callable[[Tensor], list[str]], networks: tuple[nn.Module, ...] = ()
    ) -> None:
        self.networks = networks
        self._encode = encode
        self._decode = decode
        self.dimensions = 0

    def fit(self, blocks: Tensor) -> None:
        """Find the length of the vectors."""
        self.dimensions = self.embed(np.zeros(1), blocks[:1]).shape[1]

    def embed(self, ids: np.ndarray, blocks: Tensor) -> np.ndarray:
        """Return the vectors of the texts of ``blocks (n, T)``, ``(n, D)`` float32."""
        return np.asarray(self._encode(self._decode(blocks)), dtype=np.float32)


class ReadyVectors:
    """Vectors that the user has made.

    Args:
        vectors: ``(rows, D)``, one for each candidate, or the ``.npy`` file that holds them.
        rows: number of candidates.

    Raises:
        ValueError: there is another number of vectors.
    """

    sample_tokens = 1
    networks: tuple[nn.Module, ...] = ()
    uncounted: tuple[str, ...] = ("vectors that were made elsewhere",)

    def __init__(self, vectors: str | Path | np.ndarray, rows: int) -> None:
        self._vectors = _load_array(Path(vectors)) if isinstance(vectors, (str, Path)) else vectors
        if self._vectors.ndim != 2 or len(self._vectors) != rows or not self._vectors.shape[1]:
            raise ValueError(
                f"expected one vector for each of the pool's {rows} blocks, got an array of shape {self._vectors.shape}"
            )
        if not np.issubdtype(self._vectors.dtype, np.number) or np.iscomplexobj(self._vectors):
            raise ValueError(f"expected vectors of real numbers, got an array of {self._vectors.dtype}")
        self.dimensions = self._vectors.shape[1]

    def fit(self, blocks: Tensor) -> None:
        """Do nothing: the vectors are made."""

    def embed(self, ids: np.ndarray, blocks: Tensor) -> np.ndarray:
        """Return the vectors of the candidates ``ids (n,)``."""
        return np.asarray(self._vectors[ids], dtype=np.float32)


def parse_form(spec: str) -> tuple[str, str]:
    """Return kind and name of an embedding: hashed, encoder:NAME, static:NAME or vectors:FILE.npy.

    Raises:
        ValueError: the form is unknown.
        ImportError: an optional library is missing.
    """
    kind, _, name = spec.partition(":")
    if kind not in ("hashed", "vectors", "encoder", "static") or bool(name) is (kind == "hashed"):
        raise ValueError(f"expected an embedding of the form {FORMS}, got {spec!r}")
    if kind == "static":
        _static_model()
    return kind, name


def make_embedder(
    spec: str, rows: int, decode: Callable[[Tensor], list[str]] | None, dimensions: int = 128, seed: int = 0
) -> Embedder:
    """Return the embedder that ``spec`` names: hashed, encoder:NAME, static:NAME or vectors:FILE.npy.

    Args:
        spec: as above; NAME is a name on the Hugging Face hub, or a path.
        rows: number of blocks of the pool.
        decode: maps tokens ``(n, T)`` to n texts, or None where the pool has no tokenizer.
        dimensions: D of the hashed embedding; the others have their own.
        seed: seed of the hashed embedding.

    Raises:
        ValueError: the form is unknown, or it needs text and there is no tokenizer.
        ImportError: an optional library is missing.
    """
    kind, name = parse_form(spec)
    if kind == "hashed":
        return HashedEmbedder(dimensions, seed=seed)
    if kind == "vectors":
        return ReadyVectors(name, rows)
    if decode is None:
        raise ValueError(
            f"{spec} reads text, and this pool was made from token ids without a tokenizer: use hashed, or bring "
            "vectors:FILE.npy"
        )
    refuse_missing_folder(name)
    if kind == "static":
        return TextEmbedder(_static_model().from_pretrained(name).encode, decode)
    encode, network = _encoder(name)
    return TextEmbedder(encode, decode, (network,))


def _load_array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"expected a .npy file of vectors, written by numpy.save, got {path}: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"expected a .npy file of vectors, written by numpy.save, got the archive {path}")
    check_if_listed(path)
    return found


def _static_model() -> "type[StaticModel]":
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise ImportError("static:NAME needs model2vec: pip install 'liveselect[embed]'") from error
    return StaticModel


def _encoder(name: str) -> tuple[Encode, nn.Module]:
    """Return the sentence-transformers model of that name, or without this library the encoder's mean token state.

    And the module that it runs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return _mean_state(name, device)
    model = SentenceTransformer(name, device=device, trust_remote_code=False)
    return lambda texts: model.encode(texts, convert_to_numpy=True, show_progress_bar=False), model


def _mean_state(name: str, device: str, rows: int = 32, longest: int = 512) -> tuple[Encode, nn.Module]:
    # pipeline("feature-extraction") leaves padding in its batches, or runs text by text, which takes many times longer
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model = AutoModel.from_pretrained(name, trust_remote_code=False).to(device).eval()
    longest = min(longest, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", longest))

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), rows):
            batch = tokenizer(
                texts[start : start + rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            mask = batch["attention_mask"].unsqueeze(-1)
            state = model(**batch).last_hidden_state.float()
            found.append(((state * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
        return np.concatenate(found)

    return encode, model
