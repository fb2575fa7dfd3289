"""The proxy model of ``liveselect score``: its weights, its optimizer, its clipping, and its cost."""

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from torch import nn

from liveselect.cost import Cost
from liveselect.grammar import InfluenceEstimator, State
from liveselect.influence import PMPInfluence
from liveselect.ledger import Ledger

log = logging.getLogger("liveselect")


def training_cost(checkpoint: State) -> Cost:
    """Return the cost of the training of a checkpoint, as far as its DataSelection callback recorded it."""
    selection = (checkpoint.get("callbacks") or {}).get("DataSelection")
    if not selection:
        return {}
    ledger = Ledger()
    ledger.load_state_dict(selection["run"]["ledger"])
    seconds, flops = ledger.training_seconds + ledger.selection_seconds, ledger.training_flops + ledger.selection_flops
    return {"seconds": {"train the proxy": seconds}, "flops": {"train the proxy": flops}}


def load_proxy(model: pl.LightningModule, path: Path | None) -> State:
    """Load a checkpoint into the proxy and return it; without one the proxy stays as it was built."""
    model.configure_model()
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint of the proxy at {path}, found no file there (--ckpt_path)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint {path} cannot be read: {str(error).splitlines()[0]}. It may be cut short, or hold objects "
            "other than tensors; of those only state_dict, optimizer_states and global_step are needed here"
        ) from error
    if "state_dict" not in checkpoint:
        raise ValueError(f"expected a checkpoint of the Trainer at {path}, found the keys {sorted(checkpoint)[:5]}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint {path} does not fit the model section of the configuration: {error}. Pass the "
            "configuration that the proxy was trained with"
        ) from error
    return dict(checkpoint)


def proxy_optimizer(
    model: pl.LightningModule, estimator: InfluenceEstimator | None, checkpoint: State
) -> torch.optim.Optimizer:
    """Return the proxy's optimizer with the moments of the checkpoint, or plain SGD for an estimator that uses none."""
    if isinstance(estimator, PMPInfluence) and estimator.dynamics == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1.0)  # only its list of parameters is used
    try:
        configured = model.configure_optimizers()
    except RuntimeError as error:  # Lightning's, when the module asks for its trainer
        raise ValueError(
            f"{type(model).__name__}.configure_optimizers needs a Trainer ({error}): build the proxy without a "
            'schedule that depends on the length of training, or unroll plain SGD, --estimator.init_args.dynamics="sgd"'
        ) from error
    if isinstance(configured, Mapping):
        configured = configured["optimizer"]
    while isinstance(configured, (list, tuple)):
        configured = configured[0]
    optimizer = cast(torch.optim.Optimizer, configured)
    states = checkpoint.get("optimizer_states") or []
    if states:
        optimizer.load_state_dict(states[0])
    elif checkpoint and isinstance(estimator, PMPInfluence):
        log.warning("the checkpoint holds no optimizer_states: the unroll begins with moments of zero")
    return optimizer


def clipping_of(trainer: Namespace) -> Callable[[list[nn.Parameter]], None]:
    """Return the clipping that the Trainer section asks for."""
    limit = trainer.gradient_clip_val
    by_value = str(trainer.gradient_clip_algorithm or "norm").endswith("value")

    def clip(parameters: list[nn.Parameter]) -> None:
        if limit and by_value:
            nn.utils.clip_grad_value_(parameters, float(limit))
        elif limit:
            nn.utils.clip_grad_norm_(parameters, float(limit))

    return clip
