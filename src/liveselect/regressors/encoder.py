"""The data influence model: a text encoder that learns to predict measured influence."""

import copy
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from liveselect.distributed import rank
from liveselect.protocols import Batch, RoundContext
from liveselect.regressors.encoder_model import InfluenceNetwork, build_network, encoder_config, own_random_state
from liveselect.regressors.encoder_text import TextReader
from liveselect.regressors.encoder_training import Examples, Precision, Runner, Schedule, train
from liveselect.regressors.targets import distinct_targets, standardized

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TRIED = 4  # texts that a trial trains on
_ENOUGH_HELD_OUT = 32  # below this a rank correlation says little: its standard error is 1 / sqrt(32 - 1)


class EncoderRegressor:
    """Predicts influence, in units of its standard deviation, from text with an encoder such as BERT.

    A candidate is decoded, tokenised for the encoder, cut into even chunks that the encoder can take, encoded, averaged
    over all its tokens, and mapped to a number. Training minimises the squared error to standardised influence with
    AdamW and a linearly falling learning rate, looks at the held-out rank correlation ``evaluations`` times and keeps
    the weights of the best look. ``spearman`` is that correlation: the best of several looks, so a little too high.

    All ranks train one network together, each on its share of every batch. The random state of training is not
    touched. The network is no part of the LightningModule; it lives beside the model, in float32, and is saved in
    checkpoints (440 MB for BERT base).

    Args:
        encoder: hub name or local path of a pretrained encoder; or the fields (``model_type`` among them) or the
            configuration of one that begins with random weights.
        tokenizer: name or path of the encoder's tokenizer. By default the one that comes with a named encoder; an
            encoder given by configuration then reads the language model's token ids.
        epochs: passes over the measured candidates in each round.
        learning_rate: of the first step.
        weight_decay: on matrices; biases and norms are not decayed.
        batch_size: candidates of one optimizer step, all ranks together.
        dropout: probability of dropping a pooled feature before the head.
        held_out: share of the measured candidates that is held out, but at least 32 of them, or a quarter if that is
            less.
        evaluations: how often one fit looks at the held-out candidates. The best of many looks at few candidates is
            often an early, hardly trained network that was lucky: look often only where many are held out.
        warm_start: whether a round continues from the network of the round before, or begins anew.
        max_tokens: tokens of a text that are read; the rest is cut off.
        chunk_tokens: longest chunk; by default what the encoder can take, up to 512.
        tokens_per_forward: padded tokens in one forward; lower it when memory runs out, results stay the same up to
            rounding and dropout.
        precision: ``bfloat16`` computes under autocast; ``auto`` does so on CUDA devices that support it.

    Source: Yu et al. 2024, "MATES", arXiv 2406.06046; the defaults are those of the released code (bert-base-uncased,
    two chunks of 512 tokens), except that it looks every 20 steps at 8,000 candidates and restarts in every round.
    """

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
        precision: Precision = "auto",
    ) -> None:
        for name, value in (
            *(("epochs", epochs), ("batch_size", batch_size), ("evaluations", evaluations), ("max_tokens", max_tokens)),
            *(
                ("chunk_tokens", 1 if chunk_tokens is None else chunk_tokens),
                ("tokens_per_forward", tokens_per_forward),
            ),
        ):
            if value < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        if not 0.0 < held_out < 1.0:
            raise ValueError(f"expected held_out, a share of the measured candidates, between 0 and 1, got {held_out}")
        if precision not in get_args(Precision):
            raise ValueError(f"expected precision to be one of {get_args(Precision)}, got {precision!r}")
        self.encoder = encoder
        self.dropout = dropout
        self.held_out = held_out
        self.warm_start = warm_start
        self.chunk_tokens = chunk_tokens
        self.tokens_per_forward = tokens_per_forward
        self.precision: Precision = precision
        self.schedule = Schedule(epochs, learning_rate, weight_decay, batch_size, evaluations)
        own = encoder if isinstance(encoder, str) else None
        self._reader = TextReader(own if tokenizer is None else tokenizer, max_tokens)
        self._network: InfluenceNetwork | None = None
        self._restored: Mapping[str, Any] | None = None  # a state that waits for the first use

    def check(self, context: RoundContext) -> None:
        """Read the context's candidates, which are to be few, and let a network of the same making learn from some.

        The network is let go of; the run's own comes with a fit.

        Raises:
            OSError: the hub or the path does not hold what was named.
            ValueError: the encoder cannot be used, or a token id is outside of its vocabulary.
        """
        kept = self.state_dict() if self.warm_start else {}
        trial = copy.copy(self)  # shares the tokenizer
        trial._network, trial._restored = None, kept or None
        network = trial._ready(context)
        texts: list[Tensor] = []
        for batch in context.source.candidates(context.candidates):
            texts += self._reader.read(context, network.config, batch)
        tried = Examples(texts[:_TRIED], torch.zeros(min(_TRIED, len(texts))))
        with torch.enable_grad(), own_random_state(0, context.device):
            self._runner(context, network).accumulate_gradients(tried, torch.arange(len(tried.texts)))

    def fit(self, context: RoundContext, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from ``ids (m,)`` and ``influence (m,)``; repeated ids are averaged.

        Returns ``spearman`` (NaN when fewer than 3 candidates are held out or nothing varies; the last weights are
        kept then), the optimizer's ``best_step`` that it belongs to, and how many were ``held_out``.

        Raises:
            ValueError: an influence is not finite, there are fewer than 8 distinct candidates, or a token id is
                outside of the encoder's vocabulary.
        """
        known = distinct_targets(ids, influence)
        network = self._ready(context, anew=not self.warm_start)
        with context.phase("read measured candidates", len(known.ids), "candidates") as advance:
            texts: list[Tensor] = []
            for batch in context.source.candidates(known.ids):
                texts += self._reader.read(context, network.config, batch)
                advance(len(batch["input_ids"]))
        learned, held_out = self._split(context, texts, known.influence)
        if bool((learned.targets == 0).all()):  # nothing varies
            nn.init.zeros_(network.head.weight)
            nn.init.zeros_(network.head.bias)
            return {"spearman": math.nan, "held_out": float(len(held_out.texts))}
        # a seed for each rank, because each drops features of other examples
        with torch.enable_grad(), own_random_state(_seed(context, f"dropout/{rank()}"), context.device):
            found = train(self._runner(context, network), self.schedule, learned, held_out)
        return {**found, "held_out": float(len(held_out.texts))}

    def predict(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, standardised.

        Raises:
            RuntimeError: nothing was fitted or restored.
        """
        if self._network is None and self._restored is None:
            raise RuntimeError("EncoderRegressor.predict was called before fit: call fit(context, ids, influence)")
        network = self._ready(context)
        return self._runner(context, network).predict(self._reader.read(context, network.config, batch))

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the encoder's configuration, as tensors and builtins; empty before the first fit."""
        if self._network is None:
            return dict(self._restored or {})
        weights = {name: value.detach().cpu().clone() for name, value in self._network.state_dict().items()}
        return {"config": self._network.config.to_json_string(use_diff=False), "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the network is built at its first use."""
        self._network = None
        self._restored = dict(state) or None

    def _ready(self, context: RoundContext, anew: bool = False) -> InfluenceNetwork:
        """Return the network on the model's device: as it is, as it was saved, or new."""
        if anew:
            self._network = self._restored = None
        if self._network is None:
            with own_random_state(_seed(context, "init"), context.device):
                self._network = self._build()
            self._restored = None
        return self._network.to(context.device)

    def _build(self) -> InfluenceNetwork:
        if self._restored is None:
            return build_network(self.encoder, encoder_config(self.encoder), self.dropout, pretrained=True)
        saved = json.loads(self._restored["config"])
        # a saved network needs no hub; a configuration given by hand may hold more than its JSON (attention kernel)
        config = encoder_config(saved if isinstance(self.encoder, str) else self.encoder)
        network = build_network(self.encoder, config, self.dropout, pretrained=False)
        try:
            network.load_state_dict(self._restored["weights"])
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint's regressor ({saved['model_type']}, {saved.get('hidden_size')} wide) does not fit the "
                f"encoder of this run ({config.model_type}): resume with the encoder that the run began with"
            ) from error
        return network

    def _runner(self, context: RoundContext, network: InfluenceNetwork) -> Runner:
        longest = self.chunk_tokens or self._reader.longest_chunk(network.config)
        return Runner(context, network, longest, self.tokens_per_forward, self.precision)

    def _split(self, context: RoundContext, texts: list[Tensor], influence: Tensor) -> tuple[Examples, Examples]:
        """Return what is learned from and what is held out, in units of the standard deviation of the first."""
        m = len(texts)
        count = max(math.ceil(self.held_out * m), min(_ENOUGH_HELD_OUT, m // 4))
        order = torch.randperm(m, generator=context.generator("regressor/split"))
        held_out, learned = order[:count], order[count:]
        mean, std = float(influence[learned].mean()), float(influence[learned].std(correction=0))
        targets = standardized(influence, mean, std).float()
        return (
            Examples([texts[i] for i in learned.tolist()], targets[learned]),
            Examples([texts[i] for i in held_out.tolist()], targets[held_out]),
        )


def _seed(context: RoundContext, purpose: str) -> int:
    return context.generator(f"regressor/{purpose}").initial_seed()
