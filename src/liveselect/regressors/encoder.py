"""The data influence model: a text encoder that learns to predict measured influence."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from liveselect.arguments import check_plain
from liveselect.distributed import rank
from liveselect.grammar import Batch, InfluenceRegressor, Round, State
from liveselect.regressors.encoder_model import (
    InfluenceNetwork,
    Precision,
    encoder_config,
    own_random_state,
)
from liveselect.regressors.encoder_training import (
    Examples,
    Schedule,
    accumulate_gradients,
    look,
    predict,
    train,
)
from liveselect.regressors.targets import (
    Memory,
    TargetScale,
    check_learning,
    distinct_targets,
    robust_targets,
    standardized,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_MAX_CHUNK_TOKENS = 512  # of BERT; other encoders may take more, at a cost that grows with the square
_TRIAL_TEXTS = 4  # trained on in a check: enough to need padding, few enough for seconds
_MIN_HELD_OUT_TEXTS = 32  # with fewer a rank correlation says little: its standard error is 1 / sqrt(32 - 1)


class EncoderRegressor(InfluenceRegressor):
    """Predicts influence, in units of its standard deviation, from text with an encoder such as BERT.

    A candidate is decoded, tokenised for the encoder, cut into even chunks that the encoder can take, encoded, averaged
    over all its tokens, and mapped to a number. Training minimises the squared error to standardised influence with
    AdamW and a linearly falling learning rate, evaluates the held-out rank correlation ``evaluations`` times and keeps
    the weights of the best. ``spearman`` is that correlation: the best of several, so a little too high.

    Measurements of earlier rounds are learned from too, with less weight for every round that has passed, and a network
    that goes on from that of the round before is moved only a part of the way to what a fit has found: influence after
    a round is partly a correction of that round. What is held out is of this round.

    All ranks train one network together, each on its share of every batch. The random state of training is not
    touched. The network is no part of the LightningModule; it stays beside the model, in float32, and is saved in
    checkpoints (440 MB for BERT base).

    Args:
        encoder: hub name or folder of a pretrained encoder; or the fields (``model_type`` among them) or the
            configuration of one that begins with random weights.
        tokenizer: hub name or folder of the encoder's tokenizer; by default that of a named encoder. An encoder given
            by configuration reads the language model's token ids.
        epochs: passes over the measured candidates in each round.
        learning_rate: of the first step.
        weight_decay: on matrices; biases and norms are not decayed.
        batch_size: candidates of one optimizer step, all ranks together.
        dropout: probability of dropping a pooled feature before the head.
        held_out: share of the measured candidates that is held out, but at least 32 of them, or a quarter if that is
            less.
        evaluations: evaluations of one fit. The best of many on few candidates is often an early, hardly trained
            network that was lucky: evaluate often only where many are held out.
        warm_start: whether a round continues from the network of the last round, or starts from the encoder again.
        max_tokens: tokens of a text that are read; the rest is cut off.
        chunk_tokens: longest chunk; by default the encoder's own limit, up to 512.
        tokens_per_forward: padded tokens in one forward; lower it when memory runs out, results stay the same up to
            rounding and dropout.
        targets: ``rank_normal`` learns from the ranks of influence, ``standardized``, as published, from its values.
        forgetting: share of its weight that a measurement keeps from one round to the next; 0, as published, forgets
            earlier rounds.
        damping: how far a fit moves the weights from those of the round before, above 0 and up to 1, as published; of
            no effect without ``warm_start``.
        precision: ``bfloat16`` computes under autocast; ``auto`` does so on CUDA devices that support it.

    Source: Yu et al. 2024, "MATES", arXiv 2406.06046; the defaults are those of the released code (bert-base-uncased,
    two chunks of 512 tokens), except that it evaluates every 20 steps on 8,000 candidates and restarts in every round.
    """

    rehearsed = False  # a fit takes minutes; check() tries one batch

    def __init__(
        self,
        encoder: "str | dict[str, Any] | PretrainedConfig" = "bert-base-uncased",
        tokenizer: str | None = None,
        epochs: int = 5,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        dropout: float = 0.1,
        held_out: float = 0.1,
        evaluations: int = 5,
        warm_start: bool = True,
        max_tokens: int = 1024,
        chunk_tokens: int | None = None,
        tokens_per_forward: int = 16_384,
        targets: TargetScale = "rank_normal",
        forgetting: float = 0.8,
        damping: float = 0.6,
        precision: Precision = "auto",
    ) -> None:
        check_plain(EncoderRegressor, locals())
        counts = {"epochs": epochs, "batch_size": batch_size, "evaluations": evaluations, "max_tokens": max_tokens}
        limits = {"chunk_tokens": chunk_tokens, "tokens_per_forward": tokens_per_forward}
        for name, value in {**counts, **limits}.items():
            if value is not None and value < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"expected held_out, a share of the measured candidates, between 0 and 1, got {held_out}")
        if precision not in get_args(Precision):
            raise ValueError(f"expected precision to be one of {get_args(Precision)}, got {precision!r}")
        check_learning(targets, damping)
        self.targets: TargetScale = targets
        self.damping = damping
        self.remembers = forgetting > 0
        self._memory = Memory(forgetting)
        self.encoder = encoder
        self.tokenizer = tokenizer or (encoder if isinstance(encoder, str) else None)
        self.dropout, self.held_out, self.warm_start = dropout, held_out, warm_start
        self.max_tokens, self.chunk_tokens, self.tokens_per_forward = max_tokens, chunk_tokens, tokens_per_forward
        self.precision: Precision = precision
        self.schedule = Schedule(epochs, learning_rate, weight_decay, batch_size, evaluations)
        self._network: InfluenceNetwork | None = None
        self._restored: State = {}  # a state that waits for the first use

    def check(self, round: Round) -> None:
        """Read the round's candidates, which should be few, and let a network of the same making learn from some.

        The network is discarded; the run's own comes with a fit.

        Raises:
            OSError: neither the hub nor the path holds the encoder.
            ValueError: the encoder cannot be used, or a token id is outside of its vocabulary.
        """
        network = self._built(self.state_dict() if self.warm_start else {}, round.device, seed=0)
        texts: list[Tensor] = []
        for batch in round.source.candidates(round.candidates):
            texts += self._read(batch, round.source.decode, network.config.vocab_size)
        tried = Examples(texts[:_TRIAL_TEXTS], torch.zeros(min(_TRIAL_TEXTS, len(texts))))
        with torch.enable_grad(), own_random_state(0, round.device):
            accumulate_gradients(network, tried, torch.arange(len(tried.texts)), round.meter)

    def fit(self, round: Round, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from ``ids (m,)`` and ``influence (m,)``; repeated ids are averaged.

        Returns ``spearman`` (NaN when fewer than 3 candidates are held out or nothing varies; the last weights are
        kept then), the optimizer's ``best_step`` that it belongs to, the number ``held_out``, and ``top_fifth``, the
        mean target of the fifth of these with the highest predictions.

        Raises:
            ValueError: an influence is not finite, there are fewer than 8 distinct candidates, or a token id is
                outside of the encoder's vocabulary.
        """
        known = distinct_targets(ids, influence)
        fresh = len(known.ids)
        count = max(math.ceil(self.held_out * fresh), min(_MIN_HELD_OUT_TEXTS, fresh // 4))
        held_out, learned = torch.randperm(fresh, generator=round.generator("regressor/split")).tensor_split([count])
        if self.targets == "rank_normal":
            targets = robust_targets(known.influence)
        else:
            mean, std = float(known.influence[learned].mean()), float(known.influence[learned].std(correction=0))
            targets = standardized(known.influence, mean, std)
        varies = bool(targets[learned].any())
        rows = self._memory.with_earlier(round.index, known._replace(influence=targets))
        learned = torch.cat([learned, torch.arange(fresh, len(rows.ids))])
        before = self._weights_before()
        if not self.warm_start:
            self._network, self._restored = None, {}
        network = self._ready(round.device, round.generator("regressor/init").initial_seed())
        with round.meter.tracked("read measured candidates", len(rows.ids), "candidates") as advance:
            texts: list[Tensor] = []
            for batch in round.source.candidates(rows.ids):
                texts += self._read(batch, round.source.decode, network.config.vocab_size)
                advance(len(batch["input_ids"]))
        examples = Examples(texts, rows.targets.float(), rows.weights.float())
        if not varies:
            nn.init.zeros_(network.head.weight)
            nn.init.zeros_(network.head.bias)
            return {"spearman": math.nan, "held_out": float(count)}
        order = round.generator("regressor/order")
        # a seed for each rank, because each drops features of other examples
        seed = round.generator(f"regressor/dropout/{rank()}").initial_seed()
        with (
            torch.enable_grad(),
            own_random_state(seed, round.device),
            round.meter.tracked("fit regressor", self.schedule.steps(len(learned)), "batches") as advance,
        ):
            found = train(network, self.schedule, examples, learned, held_out, order, round.meter, advance)
            if before is not None:
                _move(network, before, self.damping)
                found |= look(network, examples, held_out, round.meter)
        return {**found, "remembered": float(len(rows.ids) - fresh)}

    def predict(self, round: Round, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, standardised.

        Raises:
            RuntimeError: nothing was fitted or restored.
        """
        if self._network is None and not self._restored:
            raise RuntimeError("EncoderRegressor.predict was called before fit: call fit(round, ids, influence)")
        network = self._ready(round.device, seed=0)
        texts = self._read(batch, round.source.decode, network.config.vocab_size)
        return predict(network, texts, round.meter)

    def state_dict(self) -> State:
        """Return the weights and the encoder's configuration, as tensors and builtins; empty before the first fit."""
        if self._network is None:
            return dict(self._restored)
        weights = {name: value.detach().cpu().clone() for name, value in self._network.state_dict().items()}
        config = self._network.config.to_json_string(use_diff=False)
        return {"config": config, "weights": weights, "memory": self._memory.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore a state; the network is built at its first use."""
        self._network, self._restored = None, dict(state)
        self._memory.forget()
        if state:
            self._memory.load_state_dict(state["memory"])

    def _weights_before(self) -> dict[str, Tensor] | None:
        """Return the weights that a fit goes on from and is damped towards, on CPU; None where it starts afresh."""
        if not self.warm_start or self.damping == 1:
            return None
        if self._network is None:
            return dict(self._restored["weights"]) if self._restored else None
        return {name: value.detach().to("cpu", copy=True) for name, value in self._network.state_dict().items()}

    def _ready(self, device: torch.device, seed: int) -> InfluenceNetwork:
        """Return the network on the model's device: the current one, the saved one, or a new one."""
        if self._network is None:
            self._network = self._built(self._restored, device, seed)
            self._restored = {}
        return self._network.to(device)

    def _built(self, state: State, device: torch.device, seed: int) -> InfluenceNetwork:
        """Return a network in float32 and training mode: the one saved in ``state``, a new one when that is empty."""
        from transformers import AutoModel

        saved = json.loads(state["config"]) if state else {}
        name = self.encoder if isinstance(self.encoder, str) else None
        # a saved network needs no hub; a user's configuration may hold more than its JSON (attention kernel)
        config = encoder_config(saved if saved and name else self.encoder)
        with own_random_state(seed, device):
            if name is None or saved:
                encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
            else:
                encoder = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, trust_remote_code=False)
            longest = self.chunk_tokens or self._longest_chunk(config)
            network = InfluenceNetwork(encoder, self.dropout, longest, self.tokens_per_forward, self.precision)
        try:
            if state:
                network.load_state_dict(state["weights"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint's regressor ({saved['model_type']}, {saved.get('hidden_size')} wide) does not fit the "
                f"encoder of this run ({config.model_type}): resume with the encoder that the run began with"
            ) from error
        return network.train().to(device)  # from_pretrained leaves the encoder in eval mode

    def _longest_chunk(self, config: "PretrainedConfig") -> int:
        """Return the number of tokens that the encoder can take at once, up to 512."""
        positions = getattr(config, "max_position_embeddings", None) or _MAX_CHUNK_TOKENS
        return min(
            _MAX_CHUNK_TOKENS, positions, self._tokenizer.model_max_length if self.tokenizer else _MAX_CHUNK_TOKENS
        )

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=False)

    def _read(self, batch: Batch, decode: Callable[[Tensor], list[str]], vocab_size: int) -> list[Tensor]:
        """Return the encoder's token ids of each example, ``(L_i,)`` int32 on CPU; masked tokens are not read."""
        rows, mask = list(batch["input_ids"].cpu()), batch.get("attention_mask")
        if mask is not None:
            rows = [row[keep] for row, keep in zip(rows, mask.cpu().bool(), strict=True)]
        if self.tokenizer is None:
            texts = [row[: self.max_tokens].int() for row in rows]
        else:
            decoded = [decode(row.unsqueeze(0))[0] for row in rows]
            encoded = self._tokenizer(decoded, truncation=True, max_length=self.max_tokens)["input_ids"]
            texts = [torch.tensor(tokens, dtype=torch.int32) for tokens in encoded]
        largest = max((int(text.max()) for text in texts if len(text)), default=0)
        if largest >= vocab_size:
            cure = f"the tokenizer {self.tokenizer!r} belongs to another encoder"
            if self.tokenizer is None:
                cure = f"give the encoder a vocab_size above {largest}, or a tokenizer of its own"
            raise ValueError(f"expected token ids below the encoder's vocab_size {vocab_size}, got {largest}: {cure}")
        return texts


@torch.no_grad()
def _move(network: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Move the weights of a network back towards those ``before``: only a ``share`` of the way from them is kept."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[name].to(value), value, share))
