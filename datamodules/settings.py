"""The settings that users pass to the datamodules, and the rank that these serve."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from liveselect import distributed
from liveselect.arguments import check_plain, of_python
from liveselect.datamodules.reference import ReferenceSet
from liveselect.datamodules.rows.columns import check_columns

OnOverlap = Literal["refuse", "drop", "allow"]
OnOther = Literal["refuse", "allow"]


@dataclass(frozen=True)
class ServingSettings:
    """How a pool and its reference set are served: the arguments that all datamodules with selection share.

    Args:
        reference: what selection aims to improve: a :class:`~liveselect.datamodules.ReferenceSet`, or a source for
            one: a prepared pool, a file or folder of text, a list, a dataset, a ``DataLoader``. A dict of names and
            these is a mixture: each set counts with its ``weight``, and its loss is recorded by its name.
        batch_size: rows in the training batch of one rank; by default that of the wrapped module.
        validation: the validation set, in the same forms as ``reference``; by default the reference set, or the
            validation set of the wrapped module.
        probe_batch_size: rows of a batch of candidates; by default ``batch_size``.
        reference_tokens: tokens of a reference batch, padding included.
        pack_reference: put several reference examples into one row. Only for models that keep them apart by their
            ``position_ids``, others are refused; needs a loss function that passes these on without a cache, as the
            default one does. Without it padding is small: 3% of the tokens on LAMBADA.
        epoch_examples: examples of an epoch, all ranks together; by default the size of the pool. It sets how often
            epoch hooks run, and does not change the training data.
        columns: where rows of the pool have their token ids, if not in ``input_ids``: ``{"input_ids": "tokens"}``, or
            places in a tuple, ``{"input_ids": 0, "targets": 1}``. ``labels`` stand at their own tokens, ``targets`` at
            the tokens before them, as nanoGPT's y does. Bare tensors and pairs (x, y) of tokens need no columns.
        groups: column of the dataset that names each row's group. For a prepared pool ``clusters``, or the ``--name``
            passed to `liveselect cluster`; by default its sources. For ``TokenFiles``, ``file``.
        tokenizer: name, path or Hugging Face tokenizer, or one with ``encode`` and ``decode``, as tiktoken,
            SentencePiece and litgpt have them; by default the one inside the prepared pool, or the
            ``tokenizer`` of the wrapped module.
        other_tokenizer: what to do with a tokenizer that is not the one that made the pool, as far as can be seen:
            ``refuse`` it, or ``allow`` it, for a model that reads the ids of both.
        overlap: what to do with reference records that are in the pool: ``refuse`` them, ``drop`` them from the
            reference set with a warning that lists them, or ``allow`` them without looking.
        further_sets: further sets by name, in the same forms as ``reference``, at which selection does not aim: a
            verdict says how it does on them.
        seed: seed of the dataset's random draws from torch, numpy and random, which depend on it and on the place of
            each row in the plan.

    Raises:
        ValueError: a size is below 1, or ``overlap`` or ``other_tokenizer`` is none of its values.
    """

    reference: str | ReferenceSet | Any
    batch_size: int | None = None
    validation: str | ReferenceSet | Any = None
    probe_batch_size: int | None = None
    reference_tokens: int = 8192
    pack_reference: bool = False
    epoch_examples: int | None = None
    columns: dict[str, Any] | None = None
    groups: str | None = None
    tokenizer: str | Any = None
    other_tokenizer: OnOther = "refuse"
    overlap: OnOverlap = "refuse"
    further_sets: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_plain(ServingSettings, vars(self))
        sizes = {
            "batch_size": self.batch_size,
            "probe_batch_size": self.probe_batch_size,
            "epoch_examples": self.epoch_examples,
            "reference_tokens": self.reference_tokens,
        }
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
            object.__setattr__(self, name, of_python(value))
        check_columns(self.columns, "the pool's rows")
        if self.other_tokenizer not in get_args(OnOther):
            raise ValueError(f"expected other_tokenizer to be one of {get_args(OnOther)}, got {self.other_tokenizer!r}")
        if self.overlap not in get_args(OnOverlap):
            raise ValueError(f"expected overlap to be one of {get_args(OnOverlap)}, got {self.overlap!r}")


@dataclass(frozen=True)
class Place:
    """The rank that batches are served on.

    Attributes:
        rank: index of the rank.
        world_size: number of ranks.
        accumulate: batches of one optimizer step.
        pin_memory: whether batches go to a CUDA device.
    """

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    pin_memory: bool = False

    @classmethod
    def of(cls, trainer: pl.Trainer | None, accumulate: int = 1) -> "Place":
        """Return the place of this process in a Trainer; in another loop, whose steps are of ``accumulate`` batches."""
        if trainer is None:
            return cls(distributed.rank(), distributed.world_size(), accumulate)
        on_cuda = trainer.strategy.root_device.type == "cuda"
        return cls(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches, on_cuda)
