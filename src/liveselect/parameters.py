"""The parameters of a live model as one object, whether each rank holds all of them or a part (FSDP2, FSDP1)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional import sharding
from liveselect.functional.updates import Vector, Whole

T = TypeVar("T")


class ParameterView:
    """Verbs on parameters and on tensors laid out like them.

    Where ranks hold parts, forward and backward are collectives: all ranks must do as many of them in the same order.
    The verbs that hand out work (:meth:`in_step`, :meth:`share`, :meth:`gather`) and those that add up results
    (:meth:`sum`, :meth:`dot`, :meth:`norm`) take care of that, and do nothing special where parameters are whole.

    Args:
        module: the live model.

    Attributes:
        in_parts: whether ranks hold different parts of the parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.in_parts = sharding.is_sharded(module)

    # ---- tensors ---------------------------------------------------------------------------------------------------

    @staticmethod
    def local(tensor: Tensor) -> Tensor:
        """Return the part that this rank holds, detached, in the same storage; all of it where it is whole."""
        return sharding.local(tensor)

    @staticmethod
    def whole(tensor: Tensor) -> Tensor:
        """Return all of a tensor on every rank; a collective where ranks hold parts."""
        return distributed.whole(tensor)

    def lay_out(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, by parameter name, on the devices and in the parts of the parameters."""
        parameters = {name: self._module.get_parameter(name) for name in wholes}
        return {
            name: sharding.part_of(value.to(parameters[name].device), parameters[name])
            for name, value in wholes.items()
        }

    def spread(self, parts: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Vector:
        """Return the parts that this rank holds as tensors laid out as the ``parameters`` of the same names."""
        return {name: sharding.like(part, parameters[name]) for name, part in parts.items()}

    def dot(self, first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
        """Return the inner product of two lists of tensors laid out like parameters, equal on all ranks."""
        return self._total(
            (one, (self.local(one).double() * self.local(other)).sum())
            for one, other in zip(first, second, strict=True)
        )

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """Return the Euclidean length of tensors laid out like parameters, equal on all ranks."""
        norms = torch._foreach_norm([self.local(tensor) for tensor in tensors]) if tensors else ()
        return self._total(zip(tensors, (norm.double().square() for norm in norms), strict=True)) ** 0.5

    def _total(self, numbers: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the sum of numbers of this rank's parts, each beside the tensor that it is of."""
        ranks = distributed.world_size()
        parts = [number / sharding.copies(tensor, ranks) if self.in_parts else number for tensor, number in numbers]
        if not parts:
            return 0.0
        return float(self.sum(torch.stack([part.to(parts[0].device) for part in parts]).sum()))

    def adding_up(self, parameters: Mapping[str, Tensor]) -> Whole | None:
        """Return a function that adds up numbers of parts, by parameter name, over ranks; None where all is whole."""
        if not self.in_parts:
            return None

        def whole(numbers: Vector) -> Vector:
            ranks = distributed.world_size()
            parts = [v.double().cpu() / sharding.copies(parameters[name], ranks) for name, v in numbers.items()]
            totals = distributed.sum_over_ranks(torch.stack(parts))
            return {name: total.to(value) for (name, value), total in zip(numbers.items(), totals, strict=True)}

        return whole

    # ---- model -----------------------------------------------------------------------------------------------------

    def reshard(self) -> None:
        """Free the whole parameters that a forward leaves behind, so that the next one sees later writes."""
        if self.in_parts:
            sharding.reshard(self._module)

    def gradients(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Return the gradients of a loss, None where it does not depend on a parameter; ``.grad`` stays None.

        Where ranks hold parts it is the mean over the losses of all ranks: give all of them that of the same example.
        """
        self.refuse_switched(parameters)
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that is trained: expected loss_fn to compute with gradients "
                "(no torch.no_grad, no detach) from the model that the optimizer trains"
            )
        if self.in_parts:
            return sharding.backward(loss, parameters)
        # not backward(): it would run hooks on the accumulation of gradients, which may communicate or step
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    def refuse_switched(self, trained: Sequence[nn.Parameter]) -> None:
        """Raise TypeError where a forward has switched ``requires_grad`` off for parameters that were trained."""
        switched = {id(parameter) for parameter in trained if not parameter.requires_grad}
        if switched:
            names = [name for name, parameter in self._module.named_parameters() if id(parameter) in switched]
            raise TypeError(
                f"the forward of {type(self._module).__name__} switches requires_grad off for {', '.join(names[:3])}"
                f"{' and others' if len(names) > 3 else ''}: which parameters are trained must not depend on the mode "
                "or the number of forwards. Switch it between training steps, in a hook of the module or a callback"
            )

    def summed_gradient(self, losses: Iterable[Tensor], parameters: Mapping[str, nn.Parameter]) -> Vector:
        """Return the gradient of the sum of all ranks' losses, as this rank's parts of the named ``parameters``.

        It is float32 or finer, and whole where parameters are. In parts, all ranks must give as many losses.
        """
        self.reshard()  # else the module would show whole parameters that are not the optimizer's
        sums = {
            name: torch.zeros_like(self.local(parameter), dtype=torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in parameters.items()
        }
        names = {id(parameter): name for name, parameter in parameters.items()}
        # backward leaves gradients in all trained parameters: those of others must be freed as well
        trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        reached = trained if self.in_parts else list(parameters.values())
        ranks = distributed.world_size()
        for loss in losses:
            for parameter, gradient in zip(reached, self.gradients(loss, reached), strict=True):
                if gradient is not None and id(parameter) in names:
                    times = ranks if sharding.is_part(parameter) else 1  # backward has taken the mean over ranks
                    sums[names[id(parameter)]].add_(self.local(gradient), alpha=times)
        # one by one: there may be no room for all of them twice
        for name, parameter in parameters.items():
            if not sharding.is_part(parameter):
                sums[name] = distributed.sum_over_ranks(sums[name])
        return sums

    @staticmethod
    def inner_loss(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the user's loss, without the wrapper that lets it see the whole parameters of FSDP1."""
        return loss_fn.loss_fn if isinstance(loss_fn, sharding.ThroughRoot) else loss_fn

    @staticmethod
    def with_loss(loss_fn: Callable[..., Tensor], other: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return ``other`` as ``loss_fn`` is called: inside of the wrapper for FSDP1, if it has it."""
        return sharding.ThroughRoot(other) if isinstance(loss_fn, sharding.ThroughRoot) else other

    def refuse_parts(self, message: str) -> None:
        """Raise TypeError with this message where ranks hold parts."""
        if self.in_parts:
            raise TypeError(message)

    def refuse_flat(self, name: str) -> None:
        """Raise TypeError for the flattened parameters of FSDP1, with which ``name`` cannot work."""
        sharding.refuse_flat(self._module, name)

    def refuse_short_casts(self) -> None:
        """Raise TypeError where parameters are cast to 16 bits before they compute, in every precision context."""
        cast = sharding.shortest_cast(self._module)
        if cast is not None:
            raise TypeError(
                f"the model's parameters compute in {cast} (MixedPrecisionPolicy), in which small changes of gradients "
                'are lost: leave param_dtype out of fully_shard, and train with precision="bf16-mixed"'
            )

    # ---- work shared by ranks --------------------------------------------------------------------------------------

    def in_step(self, items: Iterable[T], spare: Callable[[], T]) -> Iterator[tuple[T, bool]]:
        """Yield this rank's items and whether each counts; in parts ``spare()`` stands in for missing ones."""
        return distributed.in_step(items, spare, self.in_parts)

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """Return this rank's share of items that all ranks hold, and whether each counts.

        In parts, ranks share the items out evenly; whole, each rank computes all of them by itself.
        """
        return distributed.even_share(items) if self.in_parts else [(item, True) for item in items]

    def take_share(self, rows: Tensor) -> Tensor:
        """Return this rank's share of ``rows (n, ...)`` to take gradients of; all where ranks take each together."""
        return rows if self.in_parts else rows[distributed.shard(len(rows))]

    def sum_shares(self, value: Tensor) -> Tensor:
        """Return the sum over ranks of results on each :meth:`take_share`; in parts the value itself."""
        return value if self.in_parts else distributed.sum_over_ranks(value)

    def gather(self, value: T) -> tuple[list[T], int]:
        """Return the values of all ranks that must be worked on together, and the place of this rank's among them."""
        return (distributed.gather_objects(value), distributed.rank()) if self.in_parts else ([value], 0)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks that hold parts; the value itself where parameters are whole."""
        return distributed.sum_over_ranks(value) if self.in_parts else value

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank that must work in step with this one."""
        return distributed.any_rank(flag) if self.in_parts else flag
