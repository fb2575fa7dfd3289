"""From the language model's token ids to the encoder's."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liveselect.protocols import Batch, RoundContext

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LONGEST_CHUNK = 512  # of BERT; other encoders may take more, at a cost that grows with the square


class TextReader:
    """Reads candidates for an encoder.

    Args:
        tokenizer: name or path of the encoder's tokenizer, loaded at the first use; None when the encoder reads the
            language model's token ids.
        max_tokens: tokens of a text that are read; the rest is cut off.
    """

    def __init__(self, tokenizer: str | None, max_tokens: int) -> None:
        self.name = tokenizer
        self.max_tokens = max_tokens
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def read(self, context: RoundContext, config: "PretrainedConfig", batch: Batch) -> list[Tensor]:
        """Return the encoder's token ids of each example, ``(L_i,)`` int32 on CPU; what is masked is not read.

        Raises:
            ValueError: a token id is outside of the encoder's vocabulary.
        """
        if self.name is None:
            found = [row[: self.max_tokens].int() for row in _unpadded(batch)]
        else:
            encoded = self._load()(_decode(context, batch), truncation=True, max_length=self.max_tokens)["input_ids"]
            found = [torch.tensor(tokens, dtype=torch.int32) for tokens in encoded]
        largest = max((int(row.max()) for row in found if len(row)), default=0)
        if largest >= config.vocab_size:
            cure = (
                f"give the encoder a vocab_size above {largest}, or a tokenizer of its own"
                if self.name is None
                else f"the tokenizer {self.name!r} belongs to another encoder"
            )
            raise ValueError(
                f"expected token ids below the encoder's vocab_size {config.vocab_size}, got {largest}: {cure}"
            )
        return found

    def longest_chunk(self, config: "PretrainedConfig") -> int:
        """Return how many tokens the encoder can take at once, up to 512."""
        positions = getattr(config, "max_position_embeddings", None) or _LONGEST_CHUNK
        return min(_LONGEST_CHUNK, positions, _LONGEST_CHUNK if self.name is None else self._load().model_max_length)

    def _load(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.name)
        return self._tokenizer


def _unpadded(batch: Batch) -> list[Tensor]:
    rows = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    return list(rows) if mask is None else [row[keep] for row, keep in zip(rows, mask.cpu().bool(), strict=True)]


def _decode(context: RoundContext, batch: Batch) -> list[str]:
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return context.source.decode(batch["input_ids"].cpu())
    return [context.source.decode(row.unsqueeze(0))[0] for row in _unpadded(batch)]
