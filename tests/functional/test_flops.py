import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaConfig

from liveselect.functional.flops import forward_flops, matmul_parameters

SIZE = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def models():
    gpt2 = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    llama = LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=64)
    return {
        "gpt2, tied head": AutoModelForCausalLM.from_config(gpt2),
        "llama, untied head": AutoModelForCausalLM.from_config(llama),
        "bert": BertModel(BertConfig(**SIZE, max_position_embeddings=64), add_pooling_layer=False),
    }


@pytest.mark.parametrize("name", models())
def test_forward_flops_are_what_torch_counts_outside_of_attention(name):
    model = models()[name].eval()
    tokens = torch.randint(0, 101, (3, 16), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens)
    matmuls = ("mm", "addmm")
    counted = sum(f for op, f in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in matmuls)
    assert forward_flops(model, tokens.numel()) == counted


def test_a_module_used_under_two_names_is_counted_twice_and_an_embedding_never():
    shared = nn.Linear(4, 5)
    model = nn.ModuleDict({"a": shared, "b": shared, "embedding": nn.Embedding(9, 4), "norm": nn.LayerNorm(4)})
    assert matmul_parameters(model) == 2 * 20


def test_attention_of_torch_counts_its_four_projections():
    assert matmul_parameters(nn.MultiheadAttention(8, 2)) == 4 * 64
    assert matmul_parameters(nn.MultiheadAttention(8, 2, kdim=6, vdim=5)) == 64 + 48 + 40 + 64
