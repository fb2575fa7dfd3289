"""The network of the encoder regressor: an encoder of transformers, the mean over a text's tokens, a linear head."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from liveselect.cost import CostMeter
from liveselect.grammar import State
from liveselect.regressors.chunks import even_chunks, length_groups, mean_over_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Precision = Literal["auto", "float32", "bfloat16"]


class InfluenceNetwork(nn.Module):
    """Maps texts, token ids ``(L_i,)``, to one number each, in parts of bounded size.

    Not a sequence classifier of transformers: those read one chunk of a text, and most of them its first token alone.

    Args:
        encoder: takes ``input_ids`` and ``attention_mask``, returns ``last_hidden_state`` (C, L, D).
        dropout: probability of dropping a pooled feature.
        longest: most tokens of a chunk.
        tokens: most padded tokens of one forward.
        precision: of the encoder's computation.
    """

    def __init__(
        self, encoder: "PreTrainedModel", dropout: float, longest: int, tokens: int, precision: Precision
    ) -> None:
        super().__init__()
        self.encoder, self.config, self.dropout = encoder, encoder.config, nn.Dropout(dropout)
        self.longest, self.tokens, self.precision = longest, tokens, precision
        self.head = nn.Linear(self.config.hidden_size, 1, dtype=torch.float32)  # training may have another default type
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def parts(self, texts: Sequence[Tensor], meter: CostMeter) -> Iterator[tuple[list[int], Tensor]]:
        """Yield positions in ``texts``, their outputs, ``(g,)`` float32, for all texts.

        The meter is charged for a forward, and in training mode for the backward that is to come.
        """
        for group in length_groups([len(text) for text in texts], self.longest, self.tokens):
            input_ids, mask = even_chunks([texts[i] for i in group], self.longest)
            run = partial(self, input_ids, mask, torch.tensor([len(texts[i]) for i in group]))

            def gradient(run: Callable[[], Tensor] = run) -> None:
                torch.autograd.grad(run().sum(), list(self.parameters()), allow_unused=True)

            with meter.counting(self, self.training, input_ids.shape, trial=gradient if self.training else run):
                outputs = run()
            yield group, outputs

    def forward(self, input_ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Return ``(len(lengths),)`` float32 for texts of ``lengths`` tokens, given as chunks ``(C, L)``, from CPU.

        A text without tokens gets the head's output for zeros.
        """
        device = self.head.weight.device
        input_ids, mask, lengths = input_ids.to(device), mask.to(device), lengths.to(device)
        automatic = self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        hidden = torch.zeros(0, 0, self.head.in_features, device=device, dtype=torch.float32)
        if len(input_ids):
            with torch.autocast(device.type, torch.bfloat16, enabled=automatic or self.precision == "bfloat16"):
                hidden = self.encoder(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        with torch.autocast(device.type, enabled=False):  # training may have it enabled; pooling and head are float32
            return self.head(self.dropout(mean_over_tokens(hidden.float(), mask, lengths))).squeeze(-1)


def encoder_config(encoder: "str | State | PretrainedConfig") -> "PretrainedConfig":
    """Return the configuration of an encoder that is given by name, path, fields or configuration.

    Raises:
        OSError: neither the path, the hub nor its cache holds the encoder.
        ValueError: the fields name no ``model_type``, or the model also has a decoder.
    """
    from transformers import AutoConfig

    if isinstance(encoder, str):
        try:
            config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
        except OSError as error:
            raise OSError(
                f"the encoder {encoder!r} cannot be loaded: expected the path of a saved model, or a name on the hub "
                f"with access to the hub or its cache. HashedRidgeRegressor() needs no download. {error}"
            ) from error
    elif isinstance(encoder, Mapping):
        if "model_type" not in encoder:
            raise ValueError(f"expected the encoder's fields to name its model_type, such as 'bert', got {encoder}")
        config = AutoConfig.for_model(**encoder)
    else:
        config = copy.deepcopy(encoder)
    if config.is_encoder_decoder:
        raise ValueError(
            f"expected an encoder alone, got {config.model_type}, which also has a decoder: choose another"
        )
    return config


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Open a block with freshly seeded global generators, of CPU and of a CUDA ``device``, and restore them after it.

    Initialisation and dropout draw from the global generators and take no other.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
