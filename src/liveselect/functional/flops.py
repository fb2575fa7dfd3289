"""Floating point operations as they are run: every matrix product, convolution and attention of a stretch of code.

One multiply-add counts as 2. Products count in full, whatever a mask hides afterwards, unless a kernel skips what is
hidden (FlexAttention's blocks, FlashAttention's windows and packed documents). Elementwise work (norms, softmax,
activations, look-ups, most optimizers) does not count, as usual.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], tuple[float, float]]
"""Maps arguments, keyword arguments and output of an operation to its FLOPs, and those of them that repeat earlier ones
because their results were not kept."""


@dataclass
class Flops:
    """What a stretch of code has computed.

    Attributes:
        total: floating point operations, repeated ones included.
        repeated: of the total, those that recompute what had been dropped to save memory; utilisation leaves them out.
            Means nothing for backwards that are to be differentiated again.
        uncounted: by name, how often something ran of which no count is known.
    """

    total: float = 0.0
    repeated: float = 0.0
    uncounted: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, times: int = 1) -> None:
        """Note that something was not counted."""
        self.uncounted[name] = self.uncounted.get(name, 0) + times

    def times(self, factor: float) -> "Flops":
        """Return the same for ``factor`` as much work."""
        return Flops(self.total * factor, self.repeated * factor, dict(self.uncounted))


@contextmanager
def flops_counted(model: nn.Module | None = None) -> Iterator[Flops]:
    """Count the block's FLOPs, on this thread and in the backwards that it runs.

    Results do not change, but every operation passes through Python, so count a piece of work once and remember it.
    Compiled parts run eagerly meanwhile. A block inside of another is left out of the outer one's count.

    Args:
        model: its modules that compute with weights, and run nothing that is counted, are named.
    """
    with ExitStack() as stack:
        counter = _Counter()
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(flops_set_aside(counter))
        if model is not None:
            _watch_modules(model, counter, stack)
        stack.enter_context(counter)
        yield counter.flops


@contextmanager
def flops_set_aside(owner: object = None) -> Iterator[None]:
    """Leave the block out of what is being counted around it: its FLOPs are known otherwise."""
    _open.append(owner)
    try:
        yield
    finally:
        _open.pop()


_open: list[object] = []
"""Who counts, the innermost last."""


class _Counter(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = Flops()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)  # how a sharded tensor finds out shapes: nothing is computed
        if any(issubclass(kind, Tensor) and kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # a sharded tensor computes with plain ones, which come by again
        if isinstance(func, torch._ops.HigherOrderOperator):
            out = func(*args, **kwargs)
            self._count(f"higher_order.{func.name()}", None, args, kwargs, out)
            return out
        name = str(func._overloadpacket).rstrip("_")  # in place it is the same work
        if name not in _FORMULAS and func._overloadpacket not in flop_registry:
            with self:  # an operation that is made of others
                out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        self._count(name, func._overloadpacket, args, kwargs, out)
        return out

    def _count(self, name: str, packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        if _open[-1] is not self:
            return
        formula = _FORMULAS.get(name)
        try:
            if formula is not None:
                total, repeated = formula(args, kwargs, out)
            elif packet in flop_registry:
                total, repeated = float(flop_registry[packet](*args, **kwargs, out_val=out)), 0.0
            else:
                if _may_be_a_product(name):
                    self.flops.note(name)
                return
        except (IndexError, AttributeError, TypeError, ValueError, KeyError):  # arguments of another version of torch
            self.flops.note(name)
            return
        self.flops.total += total
        # a backward enables gradients only where a checkpointed part is run again, or for second derivatives
        again = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        self.flops.repeated += total if again else repeated


_NO_FLOPS = {"aten", "prims", "prim", "profiler", "c10d", "c10d_functional", "_c10d_functional", "fsdp", "symm_mem"}
_NO_FLOPS |= {"_c10d_functional_autograd", "debugprims", "inductor", "_dtensor"}
"""Namespaces of operations without a product, but for those of aten that are looked at by name."""

_PRODUCT_WORDS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "mv", "addmv", "dot", "vdot", "linear", "einsum"}
_PRODUCT_WORDS |= {"convolution", "conv", "conv1d", "conv2d", "conv3d", "attention", "rnn", "lstm", "gru", "trilinear"}
_PRODUCT_WORDS |= {"linalg", "cholesky", "eigh", "svd", "qr", "solve", "fft", "cdist", "ormqr", "geqrf", "int4pack"}
_PRODUCT_WORDS |= {"int8pack", "qlinear", "qconv", "householder"}
_ELEMENTWISE = {"aten._thnn_fused_lstm_cell", "aten._thnn_fused_lstm_cell_backward_impl", "aten.linalg_vector_norm"}
_ELEMENTWISE |= {"aten._thnn_fused_gru_cell", "aten._thnn_fused_gru_cell_backward", "aten._linalg_check_errors"}
_ELEMENTWISE |= {"aten.linalg_cross", "aten.linalg_diagonal", "aten._convert_weight_to_int4pack"}


def _may_be_a_product(name: str) -> bool:
    space, _, own = name.partition(".")
    if space not in _NO_FLOPS:
        return True
    return space == "aten" and name not in _ELEMENTWISE and not _PRODUCT_WORDS.isdisjoint(own.split("_"))


# ---- formulas ----------------------------------------------------------------------------------------------------


def _product(place: int) -> Formula:
    """Of a matrix product whose left factor is the argument at ``place``."""

    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        return 2.0 * out.numel() * args[place].shape[-1], 0.0

    return formula


def _summed_products(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    return 2.0 * args[1].numel() * args[2].shape[-1], 0.0


def _grouped(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    left, right = args[:2]
    if left.dim() == right.dim() == 2:  # the groups share out what is summed over
        return 2.0 * left.numel() * right.shape[-1], 0.0
    return 2.0 * out.numel() * left.shape[-1], 0.0


def _convolved(x: Tensor, weight: Tensor, out_numel: int, transposed: bool) -> float:
    return 2.0 * (x.numel() if transposed else out_numel) * weight[0].numel()  # the weight holds each group's part


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    return _convolved(args[0], args[1], out.numel(), transposed=bool(args[6])), 0.0


def _convolution_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    gradient, x, weight, wanted = args[0], args[1], args[2], args[10]
    return (wanted[0] + wanted[1]) * _convolved(x, weight, gradient.numel(), transposed=bool(args[7])), 0.0


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    """Of queries, keys and values ``(B, H, T, D)``; grouped keys and values serve all heads of the queries."""
    query, key, value = args[:3]
    return 2.0 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]), 0.0


def _attention_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    """Five products; the first one repeats the forward's."""
    _, query, key, value = args[:4]
    pairs = 2.0 * query[..., 0].numel() * key.shape[-2]
    return pairs * (3 * query.shape[-1] + 2 * value.shape[-1]), pairs * query.shape[-1]


def _flex(backward: bool) -> Formula:
    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        plain = _attention_backward if backward else _attention
        mask = next(each for each in args if isinstance(each, tuple) and len(each) > 8)
        total, repeated = plain((None, *args[:3]) if backward else args, kwargs, out)
        share = _visited_share(mask, args[0].shape[-2], args[1].shape[-2])
        return share * total, share * repeated

    return formula


def _visited_share(mask: tuple[Any, ...], queries: int, keys: int) -> float:
    """Return the share of all pairs that lie in blocks which the kernel of FlexAttention visits."""
    tensors = [each for each in mask if isinstance(each, Tensor)]
    sizes = [each for each in mask if isinstance(each, int)][-2:]
    partial = tensors[0]
    full = tensors[2] if len(tensors) > 2 and tensors[2].shape == partial.shape else None
    visited = float(partial.sum()) + (0.0 if full is None else float(full.sum()))
    return min(1.0, visited * sizes[0] * sizes[1] / (partial[..., 0].numel() * queries * keys))


def _flash(backward: bool, varlen: bool) -> Formula:
    """Of the flash-attn package: ``(B, T, H, D)``, or packed ``(tokens, H, D)`` with where each sequence begins."""

    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        names = ["q", "k", "v"] if not backward else ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
        names += ["cu_seqlens_q", "cu_seqlens_k"] if varlen else []
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        query, key, value = given["q"], given["k"], given["v"]
        if varlen:
            lengths = [given[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        else:
            lengths = [[query.shape[1]] * len(query), [key.shape[1]] * len(key)]
        left, right = given.get("window_size_left", -1), given.get("window_size_right", -1)
        window = left + max(right, 0) + 1 if left >= 0 else None
        pairs = float(sum(q * (k if window is None else min(k, window)) for q, k in zip(*lengths, strict=True)))
        size = 2.0 * query.shape[-2] * pairs
        if backward:
            return size * (3 * query.shape[-1] + 2 * value.shape[-1]), size * query.shape[-1]
        return size * (query.shape[-1] + value.shape[-1]), 0.0

    return formula


def _encoder_layer(*weights: int) -> Formula:
    """Of a fused layer with self-attention; ``weights`` are the places of its matrices."""

    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        rows, width, features = args[0].shape
        matrices = sum(args[place].numel() for place in weights)
        return 2.0 * rows * width * matrices + 4.0 * rows * width**2 * features, 0.0

    return formula


def _recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
    weights = args[1] if isinstance(args[1], list | tuple) else args[1:5]
    matrices = sum(weight.numel() for weight in weights if weight.dim() > 1)
    return 2.0 * args[0].shape[0] * args[0].shape[1] * matrices, 0.0


def _decomposition(cubes: float) -> Formula:
    """Of a matrix (or several) with n the shorter side and m the longer: ``cubes`` times ``m n^2``."""

    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        *several, rows, columns = args[0].shape
        return cubes * torch.Size(several).numel() * max(rows, columns) * min(rows, columns) ** 2, 0.0

    return formula


def _solve(cubes: float, per_column: float, matrix: int = 0, right: int = 1) -> Formula:
    def formula(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[float, float]:
        n = args[matrix].shape[-1]
        return cubes * n * args[matrix].numel() + per_column * n * args[right].numel(), 0.0

    return formula


_FORMULAS: dict[str, Formula] = {
    "aten.mm": _product(0),
    "aten.bmm": _product(0),
    "aten.mv": _product(0),
    "aten.dot": _product(0),
    "aten.vdot": _product(0),
    "aten.addmm": _product(1),
    "aten._addmm_activation": _product(1),
    "aten.addmv": _product(1),
    "aten.baddbmm": _product(1),
    "aten.addbmm": _summed_products,
    "aten._int_mm": _product(0),
    "aten._scaled_mm": _product(0),
    "aten._weight_int4pack_mm": _product(0),
    "aten._weight_int8pack_mm": _product(0),
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.convolution_overrideable": _convolution,
    "aten.convolution_backward": _convolution_backward,
    "aten._transformer_encoder_layer_fwd": _encoder_layer(3, 5, 14, 16),
    "aten._native_multi_head_attention": _encoder_layer(5, 7),
    "aten._cudnn_rnn": _recurrent,
    "aten.mkldnn_rnn_layer": _recurrent,
    "aten._linalg_eigh": _decomposition(9),
    "aten._linalg_svd": _decomposition(25),
    "aten._linalg_eig": _decomposition(25),
    "aten.linalg_eig": _decomposition(25),
    "aten.linalg_qr": _decomposition(4 / 3 * 2),
    "aten.linalg_cholesky_ex": _decomposition(1 / 3),
    "aten.linalg_inv_ex": _decomposition(2),
    "aten.linalg_lu_factor_ex": _decomposition(2 / 3),
    "aten.cholesky_inverse": _decomposition(2 / 3),
    "aten._linalg_solve_ex": _solve(2 / 3, 2),
    "aten.linalg_solve_triangular": _solve(0, 1),
    "aten.cholesky_solve": _solve(0, 2, matrix=1, right=0),
    "higher_order.flex_attention": _flex(backward=False),
    "higher_order.flex_attention_backward": _flex(backward=True),
    "flash_attn._flash_attn_forward": _flash(backward=False, varlen=False),
    "flash_attn._flash_attn_varlen_forward": _flash(backward=False, varlen=True),
    "flash_attn._flash_attn_backward": _flash(backward=True, varlen=False),
    "flash_attn._flash_attn_varlen_backward": _flash(backward=True, varlen=True),
}
for _kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
    _FORMULAS[f"aten._scaled_dot_product_{_kind}"] = _attention
    _FORMULAS[f"aten._scaled_dot_product_{_kind}_backward"] = _attention_backward
_FORMULAS["aten._scaled_dot_product_fused_attention_overrideable"] = _attention
_FORMULAS["aten._scaled_dot_product_fused_attention_overrideable_backward"] = _attention_backward
_FORMULAS["aten._scaled_dot_product_attention_math_for_mps"] = _attention


# ---- kernels that no dispatcher sees -------------------------------------------------------------------------------


def _watch_modules(model: nn.Module, counter: _Counter, stack: ExitStack) -> None:
    """Name the modules that hold matrices and run nothing that is counted: their kernels pass torch by."""
    started: dict[int, float] = {}

    def before(module: nn.Module, _: object) -> None:
        started[id(module)] = counter.flops.total

    def after(name: str, module: nn.Module, _: object, __: object) -> None:
        if counter.flops.total == started.get(id(module)):
            counter.flops.note(f"the weights of {name or 'the model'} ({type(module).__name__})")

    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "A_log" in own and own["A_log"].is_cuda and "mamba_ssm" in sys.modules:
            counter.flops.note(f"the fused scan of {name} ({type(module).__name__})")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or all(each.dim() < 2 for each in own.values()):
            continue
        if type(module).__name__.endswith(("Embedding", "Embeddings")):
            continue  # positions and the like are looked up or added
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(lambda m, i, o, name=name: after(name, m, i, o)).remove)


# ---- plans -----------------------------------------------------------------------------------------------------------


def matmul_parameters(model: nn.Module) -> int:
    """Return the number of weights of ``model`` in linear layers: an estimate for a model that cannot be run.

    Every use counts: a module registered under two names is counted twice, and an output head counts although its
    weight may be tied to an embedding.
    """
    return sum(_matmul_weights(module) for _, module in model.named_modules(remove_duplicate=False))


def _matmul_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features  # a sharded weight would report its local size
    if isinstance(module, nn.MultiheadAttention):  # its output projection is an nn.Linear, counted above
        inputs = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return sum(weight.numel() for weight in inputs if isinstance(weight, Tensor))
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return weight.numel()
    return 0
