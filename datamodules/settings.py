"""What the datamodules are given by their users, checked when it is given."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from liveselect.datamodules.reference import ReferenceSet

OnOverlap = Literal["refuse", "drop", "allow"]


@dataclass(frozen=True)
class ServingSettings:
    """How a pool and its reference set are served: the arguments that all datamodules with selection share.

    Args:
        reference: what selection aims to improve: a :class:`~liveselect.datamodules.ReferenceSet`, or anything that
            one can be made of: a prepared pool, a file or folder of text, a list, a dataset, a ``DataLoader``.
        batch_size: rows in the training batch of one rank; by default that of the wrapped module.
        validation: what ``val_dataloader`` serves, in the same forms as ``reference``; by default the reference set,
            or what the wrapped module validates on.
        probe_batch_size: rows of a batch of candidates; by default ``batch_size``.
        reference_tokens: tokens of a reference batch, padding included.
        pack_reference: put several reference examples into one row. Only for models that keep them apart by their
            ``position_ids``, others are refused; needs a loss function that passes these on without a cache, as the
            default one does. Without it padding is small: 3% of the tokens on LAMBADA.
        epoch_examples: examples of an epoch, all ranks together; by default the size of the pool. It sets how often
            epoch hooks run, not what is trained on.
        groups: column of the dataset that names each row's group. For a prepared pool ``clusters``, or the name that
            `liveselect cluster` was given; by default its sources.
        tokenizer: name, path or Hugging Face tokenizer; by default the one inside the prepared pool, or the
            ``tokenizer`` of the wrapped module.
        overlap: what to do with reference records that stand in the pool: ``refuse`` them, ``drop`` them from the
            reference set with a warning that lists them, or ``allow`` them without looking.
        seed: seeds what the dataset draws: each row draws what its place in the plan says, from torch, numpy and
            random.

    Raises:
        ValueError: a size is below 1, or ``overlap`` is none of the three.
    """

    reference: str | ReferenceSet | Any
    batch_size: int | None = None
    validation: str | ReferenceSet | Any = None
    probe_batch_size: int | None = None
    reference_tokens: int = 8192
    pack_reference: bool = False
    epoch_examples: int | None = None
    groups: str | None = None
    tokenizer: str | Any = None
    overlap: OnOverlap = "refuse"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {
            "batch_size": self.batch_size,
            "probe_batch_size": self.probe_batch_size,
            "epoch_examples": self.epoch_examples,
            "reference_tokens": self.reference_tokens,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if self.overlap not in get_args(OnOverlap):
            raise ValueError(f"expected overlap to be one of {get_args(OnOverlap)}, got {self.overlap!r}")


@dataclass(frozen=True)
class Place:
    """Where batches are served: one rank of a Trainer.

    Attributes:
        rank: index of the rank.
        world_size: number of ranks.
        accumulate: batches of one optimizer step.
        pin_memory: whether batches move on to a CUDA device.
    """

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    pin_memory: bool = False

    @classmethod
    def of(cls, trainer: pl.Trainer | None) -> "Place":
        """Return the place of this process in a Trainer; without one, it is alone."""
        if trainer is None:
            return cls()
        on_cuda = trainer.strategy.root_device.type == "cuda"
        return cls(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches, on_cuda)
