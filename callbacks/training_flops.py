"""What training steps compute, and how much the devices could."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor

from liveselect.functional.flops import Flops, flops_counted, matmul_parameters
from liveselect.functional.layer_pass import count_rows
from liveselect.grammar import Batch, LiveModel
from liveselect.influence.reference import split_rows
from liveselect.preserve import measuring

_PEAKS = {"h200": {torch.bfloat16: 9.895e14, torch.float16: 9.895e14, torch.float32: 4.945e14}}
"""FLOPs per second, dense, of devices that Lightning's table lacks; float32 is that of TF32."""
_FLOAT32_PEAKS = {"h200": 6.7e13}
"""The same where TF32 is not used."""


@dataclass(frozen=True)
class _Growth:
    """FLOPs of a row: ``per_token`` for each token, and ``per_pair`` for each pair of them."""

    per_token: float
    per_pair: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> "_Growth":
        """Return the one that goes through one or two pairs of a width and the FLOPs of a row of it."""
        if len(points) == 1:
            width, flops = points[0]
            return cls(flops / width, 0.0)
        (short, less), (long, more) = points
        per_pair = (more / long - less / short) / (long - short)
        return cls(more / long - per_pair * long, per_pair)

    def of(self, rows: int, width: int) -> float:
        return rows * (self.per_token * width + self.per_pair * width**2)


class TrainingFlops:
    """What a forward and backward of the training loss compute, over the batches of a fit.

    Counted on one row of the first batch, and on half of it, with the loss that selection uses: what grows with the
    tokens (matrices) and what with their pairs (attention) follow from the two. Frozen parameters, adapters, and
    activations that are computed again count as they run. Optimizer steps do not count.

    Attributes:
        uncounted: by name, how often something ran of which no count is known.
    """

    def __init__(self) -> None:
        self.uncounted: dict[str, int] = {}
        self._total: _Growth | None = None
        self._repeated: _Growth | None = None

    @property
    def known(self) -> bool:
        """Whether a batch was looked at."""
        return self._total is not None

    def look_at(self, model: LiveModel, batch: Batch) -> float:
        """Find out from a batch, and return the FLOPs that it took; training is left as it is.

        Every rank must call it.
        """
        batch = _by_name(batch)
        width = _width(batch)
        try:
            points = [(width, _step_flops(model, _row(batch, width)))]
        except Exception as error:  # a loss that selection never needs may not fit the model; training matters more
            name = f"all but the linear layers in training steps ({type(error).__name__}: {error})"
            self.uncounted[name[:200]] = 1
            self._total, self._repeated = _Growth(6.0 * matmul_parameters(model.module), 0.0), _Growth(0.0, 0.0)
            return 0.0
        if width > 1 and not model.view.in_parts:
            with suppress(Exception):  # a loss that takes batches of one width only
                points.insert(0, (width // 2, _step_flops(model, _row(batch, width // 2))))
        elif width > 1:  # a rank that fails alone would leave the others waiting
            points.insert(0, (width // 2, _step_flops(model, _row(batch, width // 2))))
        self.uncounted = dict(points[-1][1].uncounted)
        self._total = _Growth.through([(each, flops.total) for each, flops in points])
        self._repeated = _Growth.through([(each, flops.repeated) for each, flops in points])
        return sum(flops.total for _, flops in points)

    def of(self, batch: object) -> Flops:
        """Return the FLOPs of the forward and backward of a batch; nothing where it is no batch of tensors."""
        try:
            rows, width = count_rows(batch), _width(batch)
        except ValueError:
            return Flops()
        if self._total is None or self._repeated is None:
            return Flops()
        return Flops(self._total.of(rows, width), self._repeated.of(rows, width))


def peak_flops(trainer: pl.Trainer) -> float | None:
    """Return the FLOPs per second that all devices of a run could do in its precision, None where that is not known."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    name = torch.cuda.get_device_name(device).lower()
    own = next((table for key, table in _PEAKS.items() if key in name.split()), None)
    if own is not None:
        slow = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        peak: float | None = next(v for k, v in _FLOAT32_PEAKS.items() if k in name) if slow else own[dtype]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a device is not in the table is no news to a user
            peak = get_available_flops(device, dtype)
    return None if peak is None else float(peak) * trainer.world_size


def _by_name(batch: object) -> Batch:
    """Return a batch as a mapping: a bare tensor, or the first of a pair (x, y), holds its token ids."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return {"input_ids": first} if isinstance(first, Tensor) else cast("Batch", batch)


def _width(batch: object) -> int:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def _row(batch: Batch, width: int) -> dict[str, Tensor]:
    """Return the first row of a batch, cut to a width, with a target at every position, as training computes it."""
    row, full = split_rows(batch, 1)[0], _width(batch)

    def cut(value: Tensor) -> Tensor:
        return value[:, :width] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == full else value

    row = {key: cut(value) for key, value in row.items()}
    return {**row, "labels": row["input_ids"]} if "labels" in row and "input_ids" in row else row


def _step_flops(model: LiveModel, row: Batch) -> Flops:
    module = model.module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = {part: part.training for part in module.modules()}
    with measuring(module, model.optimizer):
        for part, flag in training.items():  # in eval mode nothing would be checkpointed
            part.training = flag
        with flops_counted(module) as flops, model.autocast():
            model.view.gradients(model.losses(model.to_device(row)).sum(), trained)
        for parameter in trained:
            parameter.grad = None
        model.view.reshard()
    return flops
