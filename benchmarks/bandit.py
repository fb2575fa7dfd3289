"""How sensitive the bandit is: regret against alpha, against forgetting, and against the unit of rewards.

200 arms whose means are drawn from a normal, 10 pulled in each of 400 rounds, outcomes with an sd of 1 around them. The
regret of a pull is what the ten best arms give on average, less what it gave; random pulls lose 2.

The second table, alone with ``--beside``, sets this beside the means that a simulation written apart from this code
found, over twelve seeds and to two decimals. *sd* is the standard error of ours, *of 12* that of a mean over twelve
seeds, which theirs is.

In the third table the arms drift. In the fourth, outcomes are influence as a live run shows it: the same numbers on top
of a level that all arms share, or shrinking with the level and the scale of the gradients. There rewards are made by
the code that UCBSelector uses: told against 16 random candidates in each round, or without them in units of the running
root mean square of outcomes.

    python benchmarks/bandit.py
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liveselect.functional.bandit import top_arms
from liveselect.selectors.rewards import CONTROL, Rewards

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from bandit_play import pull_regret, simulate_pulls

ARMS, PULLS, ROUNDS, PROBES, CONTROLS = 200, 10, 400, 8, 16
ALPHAS = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0)

ELSEWHERE: list[tuple[float, dict[str, Any]]] = [
    (1.99, {"random": True}),
    (0.25, {"alpha": 0.1}),
    (0.19, {"alpha": 0.3}),
    (0.43, {"alpha": 1.0}),
    (0.88, {"alpha": 2.0}),
    (0.98, {"alpha": 0.0, "released": True}),
    (0.43, {"alpha": 0.3, "released": True}),
    (0.34, {"alpha": 1.0, "released": True}),
    (1.02, {"alpha": 1e-4, "released": True}),
    (0.91, {"alpha": 1e-4, "released": True, "scale": 1e-3}),
    *(
        (regret, {"alpha": 0.3, "discount": discount, "step": step})
        for discount, regrets in ((1.0, (0.25, 0.39, 0.75)), (0.99, (0.40, 0.46, 0.62)), (0.95, (1.04, 1.03, 1.08)))
        for step, regret in zip((0.02, 0.05, 0.10), regrets, strict=True)
    ),
]

# level of influence at the start and at the end, scale at the end; the first third of the rounds covers most of the way
WORLDS = {
    "as it is": (0.0, 0.0, 1.0),
    "level 5": (5.0, 5.0, 1.0),
    "level 5 to 0": (5.0, 0.0, 1.0),
    "scale 1 to 0.1": (0.0, 0.0, 0.1),
    "both": (5.0, 0.0, 0.1),
}


def drifting_means(generator: torch.Generator, step: float = 0.0) -> Tensor:
    """Return arm means ``(rounds, K)`` that follow an AR(1) process of unit variance."""
    rows = [torch.randn(ARMS, generator=generator, dtype=torch.float64)]
    for _ in range(ROUNDS - 1):
        noise = torch.randn(ARMS, generator=generator, dtype=torch.float64) if step else 0.0
        rows.append(math.sqrt(1 - step**2) * rows[-1] + step * noise)
    return torch.stack(rows)


def simulated(seed: int, step: float = 0.0, scale: float = 1.0, random: bool = False, **settings: Any) -> float:
    """Play against arms that give what they are; outcomes are told in units of ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    means = drifting_means(generator, step)
    if random:
        pulled = torch.stack([torch.randperm(ARMS, generator=generator)[:PULLS] for _ in range(ROUNDS)])
    else:
        pulled = simulate_pulls(means * scale, PULLS, generator=generator, noise=scale, **settings)
    return float(pull_regret(means, pulled).mean())


def live(seed: int, alpha: float, world: str, has_controls: bool) -> float:
    """Play against arms whose influence has a level and a scale that change."""
    first, last, shrunk = WORLDS[world]
    generator = torch.Generator().manual_seed(seed)
    means = drifting_means(generator)
    rewards = Rewards(ARMS, PROBES, has_controls)
    spread = math.sqrt(PROBES)  # of single candidates, so that the mean of a pull has an sd of 1
    pulled = []
    for index, truth in enumerate(means):
        left = math.exp(-3 * index / ROUNDS)
        level, scale = last + (first - last) * left, shrunk + (1 - shrunk) * left
        arms = top_arms(rewards.means + rewards.bonus(alpha), PULLS, generator)
        asked = arms.repeat_interleave(PROBES)
        if has_controls:
            drawn = torch.randint(ARMS, (CONTROLS,), generator=generator)
            asked = torch.cat([drawn, asked])
        noise = spread * torch.randn(len(asked), generator=generator, dtype=torch.float64)
        influence = level + scale * (truth[asked] + noise)
        if has_controls:
            asked[:CONTROLS] = CONTROL
        rewards.credit(asked, influence)
        pulled.append(arms)
    return float(pull_regret(means, torch.stack(pulled)).mean())


def row(name: str, values: list[float]) -> None:
    print(f"{name:<34}" + "".join(f"{value:>8.2f}" for value in values))


def beside_another(seeds: range) -> None:
    print(f"\n{'beside a simulation written apart':<50}{'theirs':>8}{'ours':>8}{'sd':>8}{'of 12':>8}{'off by':>8}")
    for theirs, settings in ELSEWHERE:
        found = [simulated(seed, **settings) for seed in seeds]
        ours, spread = statistics.mean(found), statistics.stdev(found)
        errors = f"{spread / math.sqrt(len(found)):>8.3f}{spread / math.sqrt(12):>8.3f}"
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{name:<50}{theirs:>8.2f}{ours:>8.3f}{errors}{100 * (ours / theirs - 1):>7.0f}%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--beside", action="store_true", help="print the second table alone")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    torch.set_num_threads(1)
    if arguments.beside:
        beside_another(seeds)
        return

    def mean(play: Callable[..., float], *arguments: Any, **settings: Any) -> float:
        return statistics.mean(play(seed, *arguments, **settings) for seed in seeds)

    print(f"mean regret of a pull, {len(seeds)} seeds\n")
    print(f"{'alpha':<34}" + "".join(f"{alpha:>8}" for alpha in ALPHAS))
    row("upper confidence bound", [mean(simulated, alpha=alpha) for alpha in ALPHAS])
    row("released form", [mean(simulated, alpha=alpha, released=True) for alpha in ALPHAS])
    beside_another(seeds)
    print("\nforgetting, alpha 0.3: arms that drift by a step of")
    steps = (0.0, 0.02, 0.05, 0.10)
    print(f"{'discount':<34}" + "".join(f"{step:>8}" for step in steps))
    for discount in (1.0, 0.99, 0.98, 0.95):
        row(f"{discount}", [mean(simulated, step, alpha=0.3, discount=discount) for step in steps])
    print("\nthe unit of rewards")
    print(f"{'alpha':<34}" + "".join(f"{alpha:>8}" for alpha in ALPHAS))
    for world in WORLDS:
        for has_controls, unit in ((True, "against controls"), (False, "root mean square")):
            row(f"{world}, {unit}", [mean(live, alpha, world, has_controls) for alpha in ALPHAS])


if __name__ == "__main__":
    main()
