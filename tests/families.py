"""The smallest models of the families that people pretrain, by name: two layers, a width of 16."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.autograd.function import once_differentiable

VOCABULARY = 50

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SHORT = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
_DEEPSEEK = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
}
_STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2}


def _but(*left_out: str, **settings: object) -> dict[str, object]:
    return {name: value for name, value in _COMMON.items() if name not in left_out} | settings


CONFIGURATIONS: dict[str, tuple[str, dict[str, object]]] = {
    "Llama": ("Llama", _COMMON),
    "Llama, tied": ("Llama", _but("pad_token_id", tie_word_embeddings=True)),
    "Qwen2": ("Qwen2", _COMMON),
    "Qwen3": ("Qwen3", _but(head_dim=8)),
    "Gemma 2": ("Gemma2", _but(head_dim=8, query_pre_attn_scalar=8, pad_token_id=None)),
    "Gemma 3": ("Gemma3Text", _but(head_dim=8, sliding_window=4, pad_token_id=None)),
    "GPT-2": ("GPT2", {**_SHORT, "n_embd": 16, "n_positions": 64, **_SPECIAL}),
    "GPT-NeoX": ("GPTNeoX", _but("num_key_value_heads")),
    "OPT": (
        "OPT",
        _but(
            "intermediate_size", "num_key_value_heads", "initializer_range",
            ffn_dim=32, word_embed_proj_dim=16, pad_token_id=None,
        ),
    ),
    "BLOOM": ("Bloom", {**_SHORT, "hidden_size": 16}),
    "Phi-3": ("Phi3", _COMMON),
    "OLMo 2": ("Olmo2", _COMMON),
    "SmolLM3": ("SmolLM3", _COMMON),
    "Mixtral": ("Mixtral", _but(num_local_experts=4, num_experts_per_tok=2)),
    "Qwen2-MoE": ("Qwen2Moe", _but(**_EXPERTS, shared_expert_intermediate_size=8)),
    "Qwen3-MoE": ("Qwen3Moe", _but(head_dim=8, **_EXPERTS)),
    "OLMoE": ("Olmoe", _but(num_experts=4, num_experts_per_tok=2)),
    "gpt-oss": ("GptOss", _but(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)),
    "DeepSeek-V3": ("DeepseekV3", _but(**_DEEPSEEK)),
    "Mamba": ("Mamba", {**_STATE_SPACE, "time_step_rank": 2, "pad_token_id": 0}),
    "Mamba-2": (
        "Mamba2",
        {**_STATE_SPACE, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 4, "pad_token_id": 0, **_SPECIAL},
    ),
    "RWKV": (
        "Rwkv",
        _but(
            "num_attention_heads", "num_key_value_heads", "initializer_range", "max_position_embeddings",
            attention_hidden_size=16, context_length=64,
        ),
    ),
    "Falcon-H1": (
        "FalconH1",
        _but(
            mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4,
            head_dim=8,
        ),
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        _but(
            head_dim=8, **_EXPERTS, shared_expert_intermediate_size=8, linear_num_value_heads=2,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "LFM2": ("Lfm2", _but(layer_types=["conv", "full_attention"], pad_token_id=None)),
    "RecurrentGemma": (
        "RecurrentGemma",
        _but(num_hidden_layers=3, head_dim=8, lru_width=16, attention_window_size=8, conv1d_width=4, pad_token_id=None),
    ),
}  # fmt: skip
"""Name: the first part of the class in transformers, and what its configuration gets."""


class NanoGPT(nn.Module):
    """The form of nanoGPT's forward: without targets it returns the logits of the last position only."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = _transformers("GPT-2")

    def forward(self, idx, targets=None):
        hidden = self.inside.transformer(idx, use_cache=False)[0]
        if targets is None:
            return self.inside.lm_head(hidden[:, [-1]]), None
        logits = self.inside.lm_head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class ListOfExperts(nn.Module):
    """Experts as a list of layers, each called with the tokens that chose it, as before they were fused."""

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        hidden = hidden + hidden.cumsum(1) / 4
        flat = hidden.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return self.head(hidden + out.view_as(hidden))


class TimeFirst(nn.Module):
    """Computes with time before the batch, and with all tokens as rows."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.inner, self.head = nn.Linear(width, width), nn.Linear(width, VOCABULARY)

    def forward(self, input_ids):
        hidden = self.embed(input_ids).transpose(0, 1)
        rows = self.inner(hidden.flatten(0, 1)).tanh().view_as(hidden)
        return self.head((hidden + rows.cumsum(0)).transpose(0, 1))


class TiedByHand(nn.Module):
    """Uses the embedding as its head, past the layer that holds it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)

    def forward(self, input_ids):
        hidden = self.inner(self.embed(input_ids)).tanh().cumsum(1)
        return hidden @ self.embed.weight.t()


def _transformers(name: str) -> nn.Module:
    kind, settings = CONFIGURATIONS[name]
    causal = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, causal)(getattr(transformers, f"{kind}Config")(**settings))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


BY_HAND: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": NanoGPT,
    "a list of experts": ListOfExperts,
    "time first": TimeFirst,
    "tied by hand": TiedByHand,
}
FAMILIES = [*CONFIGURATIONS, *BY_HAND]


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a model with weights of its own, away from zeros and ones, at which mistakes hide."""
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        model = BY_HAND[name]() if name in BY_HAND else _transformers(name)
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the default computes in 32 bits at most
        model = model.to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Kernel(torch.autograd.Function):
    """Has neither a forward-mode nor a second derivative, as kernels written by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        return delta * (1 - ctx.saved_tensors[0].square())
