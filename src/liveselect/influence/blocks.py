"""The curvature of all layers: averages of factors over refreshes, shared out over ranks by layer."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.functional.factors import MatrixLayer, Sums, key
from liveselect.functional.kronecker import (
    Curvature,
    Eigen,
    diagonal,
    eigen,
    ekfac,
    identity,
    kfac,
    mirrored,
    output_only,
)
from liveselect.grammar import NotMeasurableError, State

Variant = Literal["kfac", "ekfac", "output_only", "diagonal", "identity"]

_SUMS_BY_PASS: dict[str, tuple[tuple[str, ...], ...]] = {
    "kfac": (("inputs", "outputs"),),
    "ekfac": (("inputs", "outputs"), ("squares",)),
    "output_only": (("trace", "outputs"),),
    "diagonal": (("squares",),),
    "identity": (),
}


class Blocks:
    """Keeps the factors of the layers that this rank owns, and makes curvature from them.

    Averages are exponential over refreshes: with decay b the k-th last refresh weighs in proportion to b^k. The
    eigenvalues of ``ekfac`` belong to one eigenbasis and are measured again with it. All means are over tokens, so that
    every variant approximates the Fisher matrix of one token, and damping and scores are of one scale.

    Args:
        variant: the form of curvature.
        decay: weight of the past at a refresh.
    """

    def __init__(self, variant: Variant, decay: float) -> None:
        self._variant = variant
        self._decay = decay
        # by leader, of the layers that this rank owns: decayed sums of means over tokens, and of 1 as "weight"
        self._means: Sums = {}
        self._eigen: dict[tuple[str, str], Eigen] = {}
        self._bases: dict[tuple[str, int], Curvature] = {}  # of all layers, while squares are measured
        self._device = torch.device("cpu")  # where factors are measured

    @property
    def passes(self) -> tuple[tuple[str, ...], ...]:
        """The kinds of sums of each pass over the examples."""
        return _SUMS_BY_PASS[self._variant]

    def take(self, layers: Sequence[MatrixLayer], sums: Sums, kinds: tuple[str, ...]) -> float:
        """Add up the sums of all ranks from one pass, and mix them in; returns the tokens of all ranks.

        Every rank must call it, with sums of the same layers and kinds. The sums are emptied.
        """
        owners = self.owners(layers)
        first, last = kinds == self.passes[0], kinds == self.passes[-1]
        self._eigen.clear()
        if first:
            self._means = {name: group for name, group in self._means.items() if owners.get(name) == distributed.rank()}
        tokens: dict[str, float] = {}
        for leader in list(sums):
            group = sums.pop(leader)
            self._device = group["tokens"].device
            tokens[leader] = _tokens_seen(leader, group)
            means: dict[str, Tensor] = {}
            for name in list(group):
                means[name] = distributed.sum_at(group.pop(name), owners[leader]) / max(tokens[leader], 1.0)
            if owners[leader] == distributed.rank() and tokens[leader] > 0:
                self._mix(leader, means, averaged=first)
        self._bases = {} if last else self._share_bases([layer for layer in layers if tokens[layer.leader] > 0], owners)
        return max(tokens.values())

    def basis(self, layer: str, block: int) -> Curvature:
        """Return the basis in which a block's squares are measured; the identity where it has none of its own."""
        return self._bases.get((layer, block)) or identity(torch.ones(()))

    def curvature(self, layer: MatrixLayer, block: int, device: torch.device) -> Curvature | None:
        """Return the curvature of a block of a layer that this rank owns, None when it has seen no token."""
        if layer.leader not in self._means:
            return None
        squares = key("squares", layer.name, block)
        if self._variant == "diagonal":
            return diagonal(self._mean(layer.leader, squares, device))
        outputs = self._eigen_of(layer.leader, key("outputs", layer.name, block), device)
        if self._variant == "output_only":
            return output_only(outputs, float(self._mean(layer.leader, "trace", device)) / layer.inputs)
        inputs = self._eigen_of(layer.leader, "inputs", device)
        if self._variant == "ekfac":
            return ekfac(inputs, outputs, self._means[layer.leader][squares].to(device))
        return kfac(inputs, outputs)

    def owners(self, layers: Sequence[MatrixLayer]) -> dict[str, int]:
        """Return for each leader the rank that keeps its factors: the costliest first, each to the least busy rank."""
        cost: dict[str, float] = {}
        for layer in layers:
            heights = [layer.outputs if index is None else len(index) for index in layer.blocks]
            inputs = float(layer.inputs) ** 3 if layer.leader == layer.name else 0.0
            cost[layer.leader] = cost.get(layer.leader, 0.0) + inputs + sum(float(height) ** 3 for height in heights)
        load = [0.0] * distributed.world_size()
        owners: dict[str, int] = {}
        for leader in sorted(cost, key=lambda name: (-cost[name], name)):
            owners[leader] = load.index(min(load))
            load[owners[leader]] += cost[leader]
        return owners

    def state_dict(self) -> State:
        """Return the factors of all ranks as tensors and builtins; every rank must call it."""
        means: Sums = {}
        for part in distributed.gather_objects(_on_cpu(self._means)):
            means |= part
        return {"means": means}

    def load_state_dict(self, state: State) -> None:
        """Restore the factors, on any number of ranks; those of other ranks are dropped at the next refresh."""
        self._means = _on_cpu(state["means"])
        self._eigen.clear()
        self._bases.clear()

    def _mix(self, leader: str, fresh: Mapping[str, Tensor], averaged: bool) -> None:
        group = self._means.setdefault(leader, {"weight": torch.zeros((), dtype=torch.float64)})
        if not averaged:
            group.update(fresh)
            return
        group["weight"] = self._decay * group["weight"] + (1 - self._decay)
        for name, mean in fresh.items():
            past = group[name].to(mean.device) * self._decay if name in group else torch.zeros_like(mean)
            group[name] = past.add_(mean, alpha=1 - self._decay)

    def _mean(self, leader: str, name: str, device: torch.device) -> Tensor:
        group = self._means[leader]
        return group[name].to(device) / float(group["weight"])

    def _eigen_of(self, leader: str, name: str, device: torch.device) -> Eigen:
        if (leader, name) not in self._eigen:
            self._eigen[leader, name] = eigen(mirrored(self._mean(leader, name, device)))
        return self._eigen[leader, name]

    def _share_bases(
        self, layers: Sequence[MatrixLayer], owners: Mapping[str, int]
    ) -> dict[tuple[str, int], Curvature]:
        """Return the eigenvectors of all layers on every rank: each rank measures its own examples in them."""
        inputs: dict[str, Tensor] = {}
        bases: dict[tuple[str, int], Curvature] = {}
        for layer in layers:
            if layer.leader not in inputs:
                inputs[layer.leader] = self._vectors(layer.leader, "inputs", owners[layer.leader])
            for block in range(len(layer.blocks)):
                outputs = self._vectors(layer.leader, key("outputs", layer.name, block), owners[layer.leader])
                bases[layer.name, block] = Curvature(outputs.new_ones(1, 1), outputs, inputs[layer.leader])
        return bases

    def _vectors(self, leader: str, name: str, owner: int) -> Tensor:
        mine = self._means[leader][name] if owner == distributed.rank() else None
        vectors = None if mine is None else self._eigen_of(leader, name, mine.device).vectors
        return distributed.copy_from(vectors, owner, self._device)


def _tokens_seen(leader: str, group: dict[str, Tensor]) -> float:
    """Take the number of tokens out of a layer's sums, over all ranks; raise on every rank where one is not finite."""
    count = group.pop("tokens")
    broken = sum(1.0 for value in group.values() if not value.isfinite().all())
    tokens, broken = distributed.sum_over_ranks(torch.tensor([float(count), broken], dtype=torch.float64)).tolist()
    if broken:
        raise NotMeasurableError(
            f"the inputs or gradients of layer {leader!r} are not finite on some of the candidates that curvature is "
            "measured on: look for candidates without a finite loss, or measure in a wider number format"
        )
    return tokens


def _on_cpu(groups: Sums) -> Sums:
    return {leader: {name: value.cpu() for name, value in group.items()} for leader, group in groups.items()}
