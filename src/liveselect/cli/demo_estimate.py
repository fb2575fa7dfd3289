"""How long the demo will take on this machine, told before it starts."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from liveselect.cli.model import build_model
from liveselect.losses import causal_lm_loss
from liveselect.seeding import generator_for

SELECTION = {"mates": 0.45, "quad": 0.35, "pds": 0.8}
"""What selection takes beside one run's training, scoring and its proxy included, as measured on two cores."""

AROUND = 30.0
"""Seconds for texts, pool, validation and report, as measured there."""

WARM_UP, TIMED = 2, 5


def seconds_of_a_step(model: Mapping[str, Any], batch_size: int) -> float:
    """Return the median time of training steps of a network of this configuration, on made-up tokens."""
    network = build_model(dict(model), {}, pretrained=False, seed=0)
    optimizer = torch.optim.AdamW(network.parameters())
    shape = (batch_size, model["max_position_embeddings"])
    tokens = torch.randint(0, model["vocab_size"], shape, generator=generator_for(0, 0, "tokens of an estimate"))
    batch = {"input_ids": tokens, "labels": tokens}
    times = []
    for _ in range(WARM_UP + TIMED):
        began = time.perf_counter()
        causal_lm_loss(network, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return sorted(times[WARM_UP:])[TIMED // 2]


def demo_seconds(settings: Mapping[str, Any], method: str, steps: int | None) -> float:
    """Return how long the demo of ``method`` takes with the ``settings`` of its config, in seconds."""
    whole = settings["trainer"]["max_steps"]
    step = seconds_of_a_step(settings["model"]["init_args"]["config"], settings["data"]["init_args"]["batch_size"])
    return AROUND + (2 + SELECTION[method]) * (steps or whole) * step


def told(seconds: float) -> str:
    """Return a duration as roughly as it is known."""
    minutes = seconds / 60
    return "about a minute" if minutes < 1.25 else f"about {round(minutes * 2) / 2:g} minutes"
