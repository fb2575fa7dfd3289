"""How many floating point operations a model costs, from its matrix shapes."""

import torch
from torch import nn


def matmul_parameters(model: nn.Module) -> int:
    """Return the number of weights of ``model`` that take part in matrix products with every token.

    Every use counts: a module registered under two names is counted twice, and an output head counts although its
    weight may be tied to an embedding. Embeddings, norms and biases do not count. Counted are ``nn.Linear`` and its
    subclasses, ``nn.MultiheadAttention``, and the transposed linear layer of Hugging Face GPT-2 (``Conv1D``). A module
    that its parent calls several times in one forward is counted once.
    """
    return sum(_matmul_weights(module) for _, module in model.named_modules(remove_duplicate=False))


def forward_flops(model: nn.Module, tokens: int) -> float:
    """Return the FLOPs of one forward over ``tokens`` tokens, one multiply-add counted as 2.

    The product of queries and keys is left out: it is small while the context is short against the width (Kaplan et
    al. 2020, arXiv 2001.08361, section 2.1). A backward costs twice as much, a training step three times.
    """
    return 2.0 * matmul_parameters(model) * tokens


def _matmul_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features  # a sharded weight would report its local size
    if isinstance(module, nn.MultiheadAttention):  # its output projection is an nn.Linear, counted above
        inputs = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return sum(weight.numel() for weight in inputs if isinstance(weight, torch.Tensor))
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), torch.Tensor):
        return weight.numel()
    return 0
