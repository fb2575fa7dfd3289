"""Finds the linear layers inside a model that get Kronecker factors, and how they belong together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from liveselect.functional.factors import MatrixLayer
from liveselect.functional.layers import linear_dot, rule_for, transposed_linear_dot
from liveselect.losses import output_head

_FUSED_LAYER_NAMES = ("qkv", "query_key_value", "c_attn")  # parts of names of layers that make all three at once
_INTERLEAVED_LAYER_NAME = "query_key_value"  # orders outputs by head; the others all queries, all keys, all values


def find_matrix_layers(
    model: nn.Module,
    run: Callable[[], object],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    split_fused: bool = True,
) -> list[MatrixLayer]:
    """Return the trainable linear layers inside a model, grouped by shared inputs.

    Output heads are left out, also where they are included by name: the covariance of their gradients has the size of
    the vocabulary, squared. A head is what the model calls its output embedding, a layer whose weight is used
    elsewhere too, or the layer called last if it has as many outputs as an embedding has entries.

    Args:
        model: where to look.
        run: calls the model, on one short example; it is called once, without gradients.
        include: patterns of module names as in a shell; a layer must match one.
        exclude: patterns of the same form; a layer must match none.
        split_fused: treat queries, keys and values that one layer makes as blocks of their own.

    Raises:
        ValueError: there is no layer, a pattern fits none, or none is left.
    """
    found = dict(_linear_layers(model, split_fused))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer (nn.Linear, or Conv1D of Hugging Face GPT-2) with a weight "
            "that is trained, and factors are those of linear layers: unfreeze some, or take FirstOrderInfluence"
        )
    received = _received(model, found, run)
    heads = _heads(model, found, received)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(f"the pattern {pattern!r} fits none of the linear layers {sorted(found)}")
    chosen = [
        layer
        for name, layer in found.items()
        if name not in heads
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise ValueError(
            f"no linear layer of {type(model).__name__} is left to factorise: found {sorted(found)}, of which "
            f"{sorted(heads)} are output heads; included {tuple(include)}, excluded {tuple(exclude)}"
        )
    leaders: dict[tuple[int, ...], str] = {}
    return [_led(layer, received.get(layer.name, []), leaders) for layer in chosen]


def _linear_layers(model: nn.Module, split_fused: bool) -> Iterator[tuple[str, MatrixLayer]]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        rule = None if weight is None or not weight.requires_grad else rule_for(module)
        if weight is None or rule not in (linear_dot, transposed_linear_dot):
            continue
        transposed = rule is transposed_linear_dot
        outputs, width = reversed(weight.shape) if transposed else weight.shape
        has_bias = bias is not None and bias.requires_grad
        prefix = f"{name}." if name else ""
        yield (
            name,
            MatrixLayer(
                name=name,
                weight=f"{prefix}weight",
                bias=f"{prefix}bias" if has_bias else None,
                transposed=transposed,
                outputs=outputs,
                inputs=width + has_bias,
                leader=name,
                blocks=_fused_blocks(modules, name, outputs, width) if split_fused else (None,),
            ),
        )


def _received(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, list[object]]:
    """Return the inputs of all calls by layer, for layers that were called, in the order of their last calls."""
    modules = dict(model.named_modules())
    received: dict[str, list[object]] = {}  # holds the tensors, so that no two of them share an id

    def note(name: str, module: nn.Module, inputs: tuple[object, ...]) -> None:
        received[name] = [*received.pop(name, []), *inputs[:1]]

    handles = [modules[name].register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return received


def _heads(model: nn.Module, layers: Mapping[str, MatrixLayer], received: Mapping[str, list[object]]) -> set[str]:
    modules = dict(model.named_modules())
    uses: dict[int, int] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    declared = output_head(model)
    heads = {name for name in layers if modules[name] is declared or uses[id(modules[name]._parameters["weight"])] > 1}
    vocabularies = {module.num_embeddings for module in modules.values() if isinstance(module, nn.Embedding)}
    last = list(received)[-1:]
    return heads | {name for name in last if layers[name].outputs in vocabularies}


def _led(layer: MatrixLayer, received: list[object], leaders: dict[tuple[int, ...], str]) -> MatrixLayer:
    """Return the layer with its leader: layers that receive one tensor have one covariance of inputs."""
    if not received:
        return layer
    identity = (layer.bias is None, *(id(tensor) for tensor in received))
    return replace(layer, leader=leaders.setdefault(identity, layer.name))


def _fused_blocks(modules: Mapping[str, nn.Module], name: str, outputs: int, width: int) -> tuple[Tensor | None, ...]:
    """Return the output rows of queries, keys and values where one layer makes all three, else one block."""
    last = name.rsplit(".", 1)[-1].lower()
    if not any(mark in last for mark in _FUSED_LAYER_NAMES):
        return (None,)
    queries, keys = _attention_heads(modules, name, outputs, width)
    if not queries or outputs % (queries + 2 * keys):
        return (None,)
    rows = torch.arange(outputs).view(queries + 2 * keys, -1)
    if last == _INTERLEAVED_LAYER_NAME:  # for each key: its queries, the key, the value
        grouped = rows.view(keys, queries // keys + 2, -1)
        return grouped[:, :-2].flatten(), grouped[:, -2].flatten(), grouped[:, -1].flatten()
    return tuple(part.flatten() for part in rows.split([queries, keys, keys]))


def _attention_heads(modules: Mapping[str, nn.Module], name: str, outputs: int, width: int) -> tuple[int, int]:
    """Return the numbers of query and key heads from the nearest configuration, else (1, 1) for three equal parts."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        config = getattr(modules.get(parent), "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            return heads, getattr(config, "num_key_value_heads", None) or heads
    return (1, 1) if outputs == 3 * width else (0, 0)
