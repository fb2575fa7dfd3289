"""Counts by hand, and those of torch's own counter where it is right.

torch's counter knows no attention on CPUs (hence eager attention here), no grouped products of experts (hence experts
one by one), and takes groups of a convolution's backward for full products.
"""

import pytest
import torch
import transformers
from torch import library, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from liveselect.functional.flops import flops_counted, flops_set_aside, matmul_parameters

SIZE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MODELS = {
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101, "bos_token_id": 0, "eos_token_id": 0},
    "OPT": {"vocab_size": 101, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 64},
    "GPTNeoX": {**SIZE, "eos_token_id": 0},
    "Phi": SIZE,
    "Llama": {**SIZE, "num_key_value_heads": 2},
    "Mistral": {**SIZE, "num_key_value_heads": 2, "sliding_window": 8},
    "Gemma2": {**SIZE, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "Qwen3": {**SIZE, "num_key_value_heads": 2, "head_dim": 16},
    "Olmo2": SIZE,
    "Mixtral": {**SIZE, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {**SIZE, **EXPERTS, "num_key_value_heads": 4, "shared_expert_intermediate_size": 48},
    "Qwen3Moe": {**SIZE, **EXPERTS, "num_key_value_heads": 4, "head_dim": 16},
    "DeepseekV3": {**SIZE, **LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                   "moe_intermediate_size": 48, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "Mamba": {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2},
    "Mamba2": {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
               "n_groups": 1, "state_size": 16, "chunk_size": 16},
}  # fmt: skip


def counted(run, model=None):
    with flops_counted(model) as flops:
        run()
    return flops


def by_torch(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def language_model(name, **settings):
    torch.manual_seed(0)  # noqa: TID251 - the initial weights
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **settings)


def tokens(rows=2, width=32):
    return torch.randint(0, 101, (rows, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_architectures_cost_what_torch_counts(name):
    model, ids = language_model(name), tokens()
    if "Moe" in name or name in ("Mixtral", "DeepseekV3"):
        model.set_experts_implementation("eager")

    def forward():
        with torch.no_grad():
            model(ids, use_cache=False)

    flops = counted(forward, model)
    assert flops.total == pytest.approx(by_torch(forward), rel=0.01)
    assert not flops.uncounted
    if "Mamba" in name:
        return

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()

    assert counted(step).total == pytest.approx(by_torch(step), rel=0.01)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_of_fused_experts_the_active_ones_count(name):
    model, ids = language_model(name), tokens()
    active = 2 * 3 * 64 * (96 if name == "Mixtral" else 48)  # two of eight, gated
    dense = matmul_parameters(model) + 2 * 8 * 64  # routers are bare parameters
    flops = counted(lambda: model(ids, use_cache=False), model)
    expected = 2 * ids.numel() * (dense + 2 * active) + 2 * 4 * 2 * 32**2 * 64
    assert flops.total == pytest.approx(expected, rel=1e-3)
    assert not flops.uncounted


def test_layers_by_hand():
    x, layer = torch.randn(8, 16), nn.Linear(16, 32)
    assert counted(lambda: layer(x)).total == 8_192
    assert counted(lambda: layer(x).sum().backward()).total == 16_384  # the input needs no gradient
    assert counted(lambda: layer(x.clone().requires_grad_()).sum().backward()).total == 24_576
    mlp = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False))
    assert counted(lambda: mlp(x)).total == 12_288
    assert counted(lambda: mlp(x).sum().backward()).total == 28_672
    weights = {name: each.detach() for name, each in mlp.named_parameters()}

    def loss(weights, row):
        return torch.func.functional_call(mlp, weights, (row[None],)).sum()

    assert counted(lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)).total == 28_672
    assert counted(lambda: torch.func.jvp(lambda w: loss(w, x[0]), (weights,), (weights,))).total == 36_864 / 8
    with torch.inference_mode():
        assert counted(lambda: mlp(x)).total == 12_288
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: mlp(x).sum().backward()).total == 28_672


class TinyLM(nn.Module):
    """A language model as plain modules: untied head, eager attention, no biases."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, i, o in SHAPES}) for _ in range(2)
        )
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in layer["qkv"](x).chunk(3, dim=-1))
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
            weights = (q @ k.transpose(-1, -2) / 2 + mask).softmax(-1)
            x = x + layer["out"]((weights @ v).transpose(1, 2).flatten(2))
            x = x + layer["down"](layer["up"](x).relu())
        return self.head(x)


SHAPES = (("qkv", 8, 24), ("out", 8, 8), ("up", 8, 16), ("down", 16, 8))


def test_a_tiny_language_model_by_hand():
    model, ids = TinyLM(), tokens(3, 5) % 11
    assert matmul_parameters(model) == 1_112
    assert counted(lambda: model(ids), model).total == 38_160
    assert counted(lambda: model(ids).sum().backward()).total == 114_480


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank 4."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(32, 32, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_frozen_layers_and_adapters_by_hand():
    model, x = nn.Sequential(Adapted(), Adapted(), Adapted()), torch.randn(8, 32)
    assert counted(lambda: model(x)).total == 61_440
    # twice the frozen and three times the trained weights, less the gradients in the first layer's input
    assert counted(lambda: model(x).sum().backward()).total == 4 * 3072 * 8 + 6 * 768 * 8 - 18_432
    top = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(4)])
    top[:3].requires_grad_(False)
    assert counted(lambda: top(torch.randn(8, 16)).sum().backward()).total == 2 * 8 * 256 * (4 + 1)


@pytest.mark.parametrize(("reentrant", "again"), [(True, 16_384), (False, 8_192)])
def test_what_is_computed_again_is_told_apart(reentrant, again):
    mlp = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False))
    x = torch.randn(8, 16, requires_grad=True)
    plain = counted(lambda: mlp(x).sum().backward())
    flops = counted(lambda: checkpoint(mlp, x, use_reentrant=reentrant).sum().backward())
    assert plain.repeated == 0
    assert flops.repeated == again  # without reentrance the second product is not needed again
    assert flops.total - flops.repeated == plain.total


def test_fused_attention_counts_its_products_and_those_it_repeats():
    q, k, v = (torch.randn(2, 4, 12, size, requires_grad=True) for size in (8, 8, 6))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    pairs = 2 * 2 * 4 * 12 * 12
    assert counted(attend).total == pairs * (8 + 6)
    flops = counted(lambda: attend().sum().backward())
    assert flops.total - flops.repeated == 3 * pairs * (8 + 6)
    assert flops.repeated in (0, pairs * 8)  # whether this machine's kernel keeps the scores
    grouped = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], k[:, :2], enable_gqa=True))
    assert grouped.total == pairs * 16


def test_flex_attention_counts_the_blocks_that_it_visits():
    q = torch.randn(1, 2, 512, 16)
    whole = 4 * 2 * 512 * 512 * 16
    assert counted(lambda: flex_attention(q, q, q)).total == whole

    def share(visible):
        mask = create_block_mask(visible, 1, 1, 512, 512, device="cpu")
        return counted(lambda: flex_attention(q, q, q, block_mask=mask)).total / whole

    assert share(lambda b, h, i, j: i >= j) == 10 / 16  # of 4 times 4 blocks
    assert share(lambda b, h, i, j: (i >= j) & (i - j < 64)) == 7 / 16  # a window
    assert share(lambda b, h, i, j: (i >= j) & (i // 128 == j // 128)) == 4 / 16  # packed documents


def test_layers_of_torch_itself():
    x = torch.randn(3, 5, 16)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    expected = 2 * 15 * (3 * 256 + 256 + 2 * 512) + 4 * 3 * 25 * 16
    with torch.no_grad():
        assert counted(lambda: encoder(x), encoder).total == expected  # one fused operation
    assert counted(lambda: encoder(x)).total == expected
    assert counted(lambda: nn.LSTM(16, 8, 2, batch_first=True)(x)).total == 2 * 15 * (32 * 24 + 32 * 16)
    depthwise, rows = nn.Conv1d(16, 16, 4, groups=16), torch.randn(2, 16, 10, requires_grad=True)
    assert counted(lambda: depthwise(rows).sum().backward()).total == 3 * 2 * 2 * 7 * 16 * 4


def test_products_in_place_and_into_a_given_tensor_count_as_well():
    a, b, c = torch.randn(4, 5), torch.randn(5, 6), torch.zeros(4, 6)
    once = 2 * 4 * 5 * 6
    assert counted(lambda: c.addmm_(a, b)).total == once
    assert counted(lambda: torch.mm(a, b, out=c)).total == once
    assert counted(lambda: c.addbmm_(a.expand(3, 4, 5), b.expand(3, 5, 6))).total == 3 * once
    assert counted(lambda: torch.mv(b, torch.zeros(6))).total == 2 * 5 * 6
    assert counted(lambda: torch.linalg.multi_dot([a, b, torch.zeros(6, 2)])).total == 2 * (5 * 6 * 2 + 4 * 5 * 2)


def test_decompositions_have_their_usual_counts():
    a = torch.eye(6) + torch.ones(6, 6)
    assert counted(lambda: torch.linalg.eigh(a)).total == 9 * 6**3
    assert counted(lambda: torch.linalg.cholesky(a)).total == 6**3 / 3
    assert counted(lambda: torch.linalg.solve(a, a[:, :2])).total == pytest.approx(2 / 3 * 6**3 + 2 * 36 * 2)
    assert counted(lambda: torch.einsum("ij,kj->ik", a, a)).total == 2 * 6**3


def test_what_cannot_be_counted_is_named_and_elementwise_work_is_not():
    a = torch.randn(6, 6)
    assert counted(lambda: torch.fft.fft(a)).uncounted == {"aten._fft_r2c": 1}
    assert counted(lambda: nn.Bilinear(6, 6, 3)(a, a)).uncounted == {"aten._trilinear": 1}

    @library.custom_op("counted_in_tests::product", mutates_args=())
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    assert counted(lambda: product(a)).uncounted == {"counted_in_tests.product": 1}
    layer = nn.Linear(6, 6)

    def elementwise():
        norm = nn.functional.layer_norm(a, (6,)).softmax(-1).relu().gelu() if hasattr(a, "gelu") else a.softmax(-1)
        torch.linalg.vector_norm(norm)
        layer.weight.grad = torch.ones(6, 6)
        torch.optim.AdamW(layer.parameters()).step()

    nothing = counted(elementwise)
    assert (nothing.total, nothing.uncounted) == (0, {})


def test_modules_whose_kernels_pass_torch_by_are_named():
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy())

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return Kernel.apply(x, self.weight)

    model = nn.Sequential(nn.Linear(4, 4), Fused(), nn.LayerNorm(4), nn.Linear(4, 4))
    flops = counted(lambda: model(torch.randn(2, 4)), model)
    assert flops.uncounted == {"the weights of 1 (Fused)": 1}
    assert flops.total == 2 * 2 * 2 * 16
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_inner_count_is_left_out_of_the_outer_one():
    layer, x, inner = nn.Linear(4, 4), torch.randn(2, 4), []

    def outer():
        layer(x)
        inner.append(counted(lambda: layer(x)))
        with flops_set_aside():
            layer(x)

    assert counted(outer).total == inner[0].total == 2 * 2 * 16


def test_counting_changes_no_bit_of_a_forward_and_draws_no_number():
    model, ids = language_model("Llama").train(), tokens()
    with torch.no_grad():
        plain, state = model(ids).logits, torch.get_rng_state()
        with flops_counted(model):
            seen = model(ids).logits
    assert torch.equal(plain, seen)
    assert torch.equal(state, torch.get_rng_state())


def test_llama_2_7b_costs_what_palm_s_formula_says():
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.zeros(1, 2048, dtype=torch.int64)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 6_738_415_616
    with torch.no_grad():
        flops = counted(lambda: model(ids))
    looked_up = total - matmul_parameters(model)  # embeddings and norms, which the formula takes for products
    assert 3 * flops.total / 2048 + 6 * looked_up == pytest.approx(4.36517e10, rel=1e-3)
    assert 3 * (flops.total / 2048) == pytest.approx(6 * matmul_parameters(model) + 12 * 4096 * 32 * 2048, rel=1e-3)


def test_products_of_selection_by_hand():
    # K-FAC factors of a layer of 5 to 6 over 4 x 7 tokens, and the gradients of its examples one by one
    inputs, outputs = torch.randn(28, 5), torch.randn(28, 6)
    assert counted(lambda: (inputs.T @ inputs, outputs.T @ outputs)).total == 2 * 28 * (25 + 36) == 3_416
    rows = inputs.view(4, 7, 5), outputs.view(4, 7, 6)
    assert counted(lambda: rows[0].transpose(1, 2) @ rows[1]).total == 1_680
    ghost = counted(lambda: (inputs @ inputs.T, outputs @ outputs.T))
    assert ghost.total == 17_248
