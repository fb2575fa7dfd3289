"""A regressor that learns from single tokens: one measured row tells it what dozens of rows tell others."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.functional.token_table import TokenTable, TokenValues
from liveselect.grammar import IGNORE_INDEX, Batch, InfluenceRegressor, Round, State
from liveselect.regressors.targets import distinct_targets, held_out_metrics, robust_targets

_MAX_FOLDS, _MIN_FOLD_EXAMPLES = 5, 4


class TokenTableRegressor(InfluenceRegressor):
    """Predicts the influence of a candidate as the mean of what its tokens were worth where they were measured.

    Where the estimator gives the influence of every token (:meth:`~liveselect.InfluenceEstimator.score_tokens`), a row
    of T tokens is T examples. They are clipped at their outermost hundredths, shifted to a mean of zero, and divided by
    the standard deviation of the rows' means. What is remembered are shrunken means by hashed pair of neighbours, which
    back off to single tokens; every round that passes they count less. Where only the influence of candidates is known,
    all tokens of a row get its rank-normal target.

    ``spearman``, ``top_fifth`` and ``held_out`` are of rows of this round, predicted by a table without their fold;
    both less their mean over the fold.

    A prediction is a gather and a mean, some three microseconds for 128 tokens.

    Args:
        buckets: of tokens and of pairs each, a power of two.
        shrinkage: tokens that a mean is shrunk by: a pair that was seen as often counts half.
        forgetting: share of its weight that a token keeps from one round to the next; 0 forgets earlier rounds.
        clip: share of the tokens of a round that are clipped at each end, 0 to below a half.
    """

    learns_tokens = True
    remembers = True

    def __init__(
        self, buckets: int = 2**16, shrinkage: float = 8.0, forgetting: float = 0.8, clip: float = 0.01
    ) -> None:
        check_plain(TokenTableRegressor, locals())
        if buckets < 2 or buckets & (buckets - 1):
            raise ValueError(f"expected the number of buckets to be a power of two, got {buckets}")
        if not shrinkage > 0:
            raise ValueError(f"expected a shrinkage above 0, got {shrinkage}: tokens that were never seen need a value")
        if not 0.0 <= forgetting <= 1.0:
            raise ValueError(
                f"expected forgetting, the share of its weight that a round keeps, in 0..1, got {forgetting}"
            )
        if not 0.0 <= clip < 0.5:
            raise ValueError(f"expected clip, a share of tokens at each end, from 0 to below 0.5, got {clip}")
        self.buckets = buckets
        self.shrinkage = shrinkage
        self.forgetting = forgetting
        self.clip = clip
        self.remembers = forgetting > 0
        self._table = TokenTable.empty(buckets)
        self._round = -1  # of the last fit
        self._values: TokenValues | None = None

    def fit(self, round: Round, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from the influence ``(m,)`` of whole candidates ``ids (m,)``; repeated ids are averaged.

        Raises:
            ValueError: an influence is not finite, or there are fewer than 8 distinct candidates.
        """
        known = distinct_targets(ids, influence)
        targets = robust_targets(known.influence)
        return self._learn(round, known.ids, targets, targets[:, None])

    def fit_tokens(self, round: Round, ids: Tensor, influence: Tensor, tokens: Tensor) -> Mapping[str, float]:
        """Learn from the influence of single tokens, ``tokens (m, T)``, of ``ids (m,)``.

        A row without any, such as one that a training step has shown, is learned from as a whole. Of a repeated id the
        last row counts.

        Raises:
            ValueError: as :meth:`fit`, or the rows of ``tokens`` are not as many.
        """
        if tokens.dim() != 2 or len(tokens) != len(ids):
            raise ValueError(f"expected tokens ({len(ids)}, T), one row for each candidate, got {tuple(tokens.shape)}")
        known = distinct_targets(ids, influence)
        row_of = torch.zeros(len(known.ids), dtype=torch.int64)
        row_of[torch.searchsorted(known.ids, ids.cpu())] = torch.arange(len(ids))
        labels = tokens[row_of].double()
        inside = labels[labels.isfinite()]
        if not len(inside):
            return self.fit(round, ids, influence)
        low, high = (_quantile(inside, share) for share in (self.clip, 1 - self.clip))
        labels = labels.clamp(low, high)
        labels = labels - labels[labels.isfinite()].mean()
        by_row = labels.nanmean(dim=1)
        whole = by_row.isnan()
        spread = float(by_row[~whole].std(correction=0)) if int((~whole).sum()) > 1 else 0.0
        labels = labels / spread if spread > 0 else torch.zeros_like(labels)
        # a row as a whole says of each of its tokens what it says of all
        targets = torch.where(whole, robust_targets(known.influence), labels.nanmean(dim=1))
        labels = torch.where(whole[:, None], targets[:, None], labels)
        return self._learn(round, known.ids, targets, labels)

    def predict(self, round: Round, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, in standard deviations.

        Raises:
            RuntimeError: nothing was fitted or restored.
        """
        if self._values is None:
            raise RuntimeError("TokenTableRegressor.predict was called before fit: call fit(round, ids, influence)")
        return self._values.mean(batch["input_ids"].cpu(), _targets(batch))

    def predict_tokens(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what each token adds to the prediction of its row, ``(B, T)``; they sum up to it."""
        return None if self._values is None else self._values.parts(batch["input_ids"].cpu(), _targets(batch))

    def state_dict(self) -> State:
        """Return the table, as tensors and builtins."""
        return {
            "buckets": self.buckets,
            "round": self._round,
            "sums": self._table.sums.clone(),
            "weights": self._table.weights.clone(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore a table; raise ValueError when it has another number of buckets."""
        if state["buckets"] != self.buckets:
            raise ValueError(
                f"the checkpoint holds a token table with {state['buckets']} buckets, this one has {self.buckets}: "
                f"resume with TokenTableRegressor(buckets={state['buckets']})"
            )
        self._round = state["round"]
        self._table = TokenTable(state["sums"].clone(), state["weights"].clone())
        self._values = self._table.values(self.shrinkage) if self._round >= 0 else None

    def _learn(self, round: Round, ids: Tensor, targets: Tensor, labels: Tensor) -> Mapping[str, float]:
        """Add the ``labels (m, T)`` or ``(m, 1)`` of the tokens of ``ids (m,)``; return how they are predicted."""
        with round.meter.tracked("fit regressor", len(ids), "candidates") as advance:
            rows: list[tuple[Tensor, Tensor, Tensor | None]] = []
            for part, (tokens, counted) in _read(round, ids):
                values = labels[part]
                width = tokens.shape[1]
                values = values.expand(-1, width) if values.shape[1] == 1 else _fitted(values, width)
                rows.append((tokens, values if counted is None else values.masked_fill(~counted, torch.nan), counted))
                advance(len(tokens))
        if self._round >= 0:
            self._table.fade(self.forgetting ** max(0, round.index - self._round))
        self._round = round.index
        for tokens, values, _ in rows:
            self._table.add(tokens, values)
        metrics = self._held_out(round, rows, targets)
        self._values = self._table.values(self.shrinkage)
        return {**metrics, "tokens": float(self._table.weights[0].sum())}

    def _held_out(
        self, round: Round, rows: list[tuple[Tensor, Tensor, Tensor | None]], targets: Tensor
    ) -> dict[str, float]:
        """Return how well rows are predicted by the table without them; it is as it was afterwards."""
        unknown = {"spearman": torch.nan, "top_fifth": torch.nan, "held_out": 0.0}
        count = min(_MAX_FOLDS, len(targets) // _MIN_FOLD_EXAMPLES)
        if count < 2 or not targets.any():
            return unknown
        folds = torch.randperm(len(targets), generator=round.generator("regressor/folds")) % count
        whole = TokenTable(self._table.sums.clone(), self._table.weights.clone())
        found, actual = torch.zeros(len(targets)), targets.clone()
        for fold in range(count):
            begin = 0
            parts = []
            for tokens, values, counted in rows:
                inside = (folds[begin : begin + len(tokens)] == fold).nonzero().flatten()
                own = None if counted is None else counted[inside]
                parts.append((begin + inside, tokens[inside], values[inside], own))
                begin += len(tokens)
            for _, tokens, values, _ in parts:
                self._table.add(tokens, values, -1.0)
            without = self._table.values(self.shrinkage)
            for places, tokens, _, counted in parts:
                found[places] = without.mean(tokens, counted)
            # where a fold lies high, what is left lies low, and so would its predictions: only differences within count
            inside = folds == fold
            found[inside] -= found[inside].mean()
            actual[inside] -= actual[inside].mean()
            self._table = TokenTable(whole.sums.clone(), whole.weights.clone())
        return held_out_metrics(found, actual)


def _read(round: Round, ids: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor | None]]]:
    """Yield which of ``ids (m,)`` a batch holds, its tokens, and which of them are targets."""
    begin = 0
    for batch in round.source.in_bulk(ids):
        tokens = batch["input_ids"].cpu()
        yield slice(begin, begin + len(tokens)), (tokens, _targets(batch))
        begin += len(tokens)


def _targets(batch: Batch) -> Tensor | None:
    """Return which tokens carry loss, ``(B, T)`` bool on CPU; None when all but the first of each row do."""
    if "labels" not in batch:
        mask = batch.get("attention_mask")
        return None if mask is None else mask.cpu().bool()
    carries = batch["labels"].cpu() != IGNORE_INDEX
    return None if bool(carries[:, 1:].all()) else carries


def _fitted(values: Tensor, width: int) -> Tensor:
    """Return ``values (B, T)`` cut or filled up with NaN to ``(B, width)``."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=torch.nan)


def _quantile(values: Tensor, share: float) -> float:
    """Return the value below which this share of ``values (n,)`` lies; of any number of them."""
    place = min(len(values), max(1, round(share * (len(values) - 1)) + 1))
    return float(values.kthvalue(place).values)
