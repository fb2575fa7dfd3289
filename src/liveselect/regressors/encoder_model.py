"""The network of the encoder regressor: an encoder, masked mean pooling over chunks, a linear head."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from liveselect.regressors.chunks import Chunks

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class InfluenceNetwork(nn.Module):
    """Maps the chunks of texts to one number for each text.

    Args:
        encoder: takes ``input_ids`` and ``attention_mask``, returns ``last_hidden_state`` (C, L, D).
        dropout: probability of dropping a pooled feature.
    """

    def __init__(self, encoder: nn.Module, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        # told explicitly: training may have another default type
        self.head = nn.Linear(self.config.hidden_size, 1, dtype=torch.float32)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> "PretrainedConfig":
        """The configuration of the encoder."""
        return self.encoder.config  # type: ignore[return-value]

    def forward(self, chunks: Chunks) -> Tensor:
        """Return ``(texts,)`` float32; a text without tokens gets what the head says of zeros."""
        if len(chunks.input_ids):
            hidden = self.encoder(input_ids=chunks.input_ids, attention_mask=chunks.mask.long()).last_hidden_state
        else:
            hidden = self.head.weight.new_zeros(0, 0, self.head.in_features)
        with torch.autocast(hidden.device.type, enabled=False):  # pooling and head stay in float32
            return self.head(self.dropout(mean_over_tokens(hidden.float(), chunks))).squeeze(-1)


def mean_over_tokens(hidden: Tensor, chunks: Chunks) -> Tensor:
    """Return the mean of ``hidden (C, L, D)`` over the tokens of all chunks of each text, ``(texts, D)``.

    A text without chunks gets zeros. Padding has no part in value or gradient.
    """
    summed = (hidden * chunks.mask.unsqueeze(-1)).sum(dim=1)
    # a product with 0/1 instead of index_add, whose order of summation changes from call to call on GPUs
    belongs = (chunks.owner == torch.arange(chunks.texts, device=hidden.device)[:, None]).to(hidden.dtype)
    tokens = belongs @ chunks.mask.sum(dim=1, keepdim=True).to(hidden.dtype)
    return belongs @ summed / tokens.clamp(min=1)


def encoder_config(encoder: "str | dict[str, Any] | PretrainedConfig") -> "PretrainedConfig":
    """Return the configuration of an encoder that is given by name, path, fields or configuration.

    Raises:
        OSError: nothing is to be had under the name.
        ValueError: the fields name no ``model_type``, or the model also has a decoder.
    """
    from transformers import AutoConfig

    if isinstance(encoder, str):
        try:
            config = AutoConfig.from_pretrained(encoder)
        except OSError as error:
            raise OSError(
                f"the encoder {encoder!r} cannot be loaded: expected the path of a saved model, or a name on the hub "
                f"with a way to the hub or its cache. HashedRidgeRegressor() needs no download. {error}"
            ) from error
    elif isinstance(encoder, dict):
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


def build_network(
    encoder: "str | dict[str, Any] | PretrainedConfig", config: "PretrainedConfig", dropout: float, pretrained: bool
) -> InfluenceNetwork:
    """Return the network in float32 and training mode, on CPU; ``pretrained`` loads the weights of a named encoder."""
    from transformers import AutoModel

    if pretrained and isinstance(encoder, str):
        body = AutoModel.from_pretrained(encoder, config=config, dtype=torch.float32)
    else:
        body = AutoModel.from_config(config, dtype=torch.float32)
    return InfluenceNetwork(body, dropout).train()  # from_pretrained leaves the encoder in eval mode


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Open a block with freshly seeded global generators, of CPU and of a CUDA ``device``, and put them back after.

    Initialisation and dropout draw from the global generators and take no other.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else [], device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
