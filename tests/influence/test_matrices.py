"""Which layers get factors, what they share, and how queries, keys and values are told apart."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from liveselect.influence.matrices import find_matrix_layers

VOCAB = 40
WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **WIDTH)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **WIDTH)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=0, **WIDTH)),
}


def find(model, **settings):
    ids = torch.arange(7)[None]
    return {layer.name: layer for layer in find_matrix_layers(model, lambda: model(ids), **settings)}


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_but_the_head_are_found(name):
    model = MODELS[name]()
    heads = {"lm_head", "embed_out"}
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"} - heads
    found = find(model)
    assert set(found) == expected
    parameters = dict(model.named_parameters())
    for layer in found.values():
        values = {part: torch.randn_like(parameters[part]) for part in layer.parameters}
        matrix = layer.matrix(values)
        assert matrix.shape == (layer.outputs, layer.inputs)
        again = layer.by_name(matrix)
        assert set(again) == set(values)
        assert all(torch.equal(again[part], values[part]) for part in values)


def test_layers_that_read_one_tensor_share_a_leader():
    found = find(MODELS["llama"]())
    layer = "model.layers.1."
    assert {found[f"{layer}self_attn.{part}_proj"].leader for part in "qkv"} == {f"{layer}self_attn.q_proj"}
    assert {found[f"{layer}mlp.{part}_proj"].leader for part in ("gate", "up")} == {f"{layer}mlp.gate_proj"}
    assert found[f"{layer}self_attn.o_proj"].leader == f"{layer}self_attn.o_proj"
    assert len({each.leader for each in found.values()}) == 2 * 4


def test_layers_with_and_without_bias_do_not_share_although_they_read_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCAB, 8)
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, ids):
            x = self.tokens(ids)
            return self.a(x) + self.b(x) + self.c(x)

    assert {name: layer.leader for name, layer in find(Two()).items()} == {"a": "a", "b": "b", "c": "a"}


@pytest.mark.parametrize("name", ["neox", "gpt2", "phi3"])
def test_blocks_hold_the_outputs_that_become_queries_keys_and_values(name):
    model = MODELS[name]()
    found = [layer for layer in find(model).values() if len(layer.blocks) > 1]
    assert len(found) == 2
    layer = found[0]
    assert torch.equal(torch.cat(layer.blocks).sort().values, torch.arange(layer.outputs))
    # tag every output with its place, and see where the model puts it
    tags = torch.arange(1.0, layer.outputs + 1)
    if name == "neox":
        parts = tags.view(1, 1, 4, 3 * 4).transpose(1, 2).chunk(3, dim=-1)
    elif name == "gpt2":
        parts = tags.split(16)
    else:
        parts = tags.split([16, 8, 8])
    for block, part in zip(layer.blocks, parts, strict=True):
        assert set((block + 1).tolist()) == set(part.flatten().int().tolist())


def test_fused_layers_stay_whole_on_request():
    assert all(layer.blocks == (None,) for layer in find(MODELS["gpt2"](), split_fused=False).values())


class Plain(nn.Module):
    """A model that nobody declares a head of; one inner layer has as many outputs as there are tokens."""

    def __init__(self, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 8)
        self.positions = nn.Embedding(24, 8)
        self.wide, self.narrow = nn.Linear(8, VOCAB), nn.Linear(VOCAB, 8)
        self.same = nn.Linear(8, 24)
        self.head = nn.Linear(8, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.narrow(self.wide(x)) + self.same(x)[..., :8]
        return self.head(x)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_known_by_its_place_and_not_by_its_width_alone(tied):
    assert set(find(Plain(tied))) == {"wide", "narrow", "same"}


def test_frozen_layers_and_biases_are_left_out():
    model = Plain()
    model.wide.requires_grad_(False)
    model.same.bias.requires_grad_(False)
    found = find(model)
    assert set(found) == {"narrow", "same"}
    assert found["same"].inputs == 8
    assert found["narrow"].inputs == VOCAB + 1


def test_patterns_choose_layers():
    model = MODELS["llama"]()
    assert all(".mlp." in name for name in find(model, include=["*.mlp.*"]))
    assert not any("down" in name for name in find(model, include=["*.mlp.*"], exclude=["*down_proj"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["*.ffn.*"]}, r"pattern '\*.ffn.\*' fits none of the linear layers \['lm_head', 'model"),
        ({"exclude": ["layers"]}, "pattern 'layers' fits none"),
        ({"include": ["lm_head"]}, r"no linear layer of LlamaForCausalLM is left.*\['lm_head'\] are output heads"),
        ({"exclude": ["*"]}, "is left to factorise"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        find(MODELS["llama"](), **settings)


def test_a_model_whose_weights_are_all_frozen_is_told_so():
    model = MODELS["llama"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer .* with a weight that is trained"):
        find(model)


def test_the_model_keeps_no_hook():
    model = MODELS["neox"]()

    def fails():
        raise KeyError("no")

    with pytest.raises(KeyError):
        find_matrix_layers(model, fails)
    assert not any(module._forward_pre_hooks for module in model.modules())
