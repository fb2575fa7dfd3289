"""What each method of ``liveselect score --method`` costs, how it ranks, and what training on its choice gains.

The model, the texts and the run are those of ``benchmarks/fidelity.py``: a small language model on the mixed pool of
``liveselect demo``, at one step of its training. Every method scores the same pool in a process of its own:

``s/Mtok``     processor seconds for a million tokens of the pool, fitting included
``TFLOP``      floating point operations that the code reported for a million tokens, in 10^12; 0 where it has none
``MB``         by how much the process grew
``Spearman``   of its scores with the exact one-step probe, over the candidates that the probe measured
``top``        mean influence of the best fifth of these, in standard deviations of the influence
``gain``       how much lower the loss on held-out reference text is after some steps on the best fifth of the pool
               than after as many on random rows; mean and standard deviation over seeds, in nats per token

    OMP_NUM_THREADS=1 python benchmarks/cheap.py
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fidelity import BATCH, Source, add_options, context_at, exact_influence, make_source, rank_correlation, train
from torch import Tensor, nn

from liveselect.cli.score_method import MethodJob
from liveselect.cli.score_methods import METHODS, NEEDS_MODEL, build
from liveselect.losses import causal_lm_loss
from liveselect.pool import CandidatePool

SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "ngram-ratio": {"ngram-ratio": {}},
    "dsir": {"dsir, ids": {}, "dsir, words": {"terms": "words"}},
    "bm25": {"bm25, ids": {}, "bm25, words": {"terms": "words"}},
    "embed": {"embed, hashed": {}},
    "near-duplicates": {"near-duplicates": {}},
    "semantic-duplicates": {"semantic-duplicates": {}},
    "perplexity": {f"perplexity, {band}": {"band": band} for band in ("low", "middle", "high")},
    "rho": {"rho": {"learning_rate": 1e-3}},
    "tap": {"tap": {"learning_rate": 1e-3}},
    "less": {"less": {}},
}


def scored(name: str, settings: dict[str, object], source: Source, options: argparse.Namespace, folder: Path) -> Path:
    """Score the pool, and keep the scores and their cost in a file."""
    context = context_at(options.at, source, options, folder)
    round_ = replace(context.round, candidates=torch.arange(source.pool.size))
    method = build(name, settings, source)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory() as out:
        model = context.live if name in NEEDS_MODEL else None
        scores = MethodJob(model=model, round=round_, method=method, folder=Path(out) / "scores").run()
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    file = folder / "scored.pt"
    flops = sum(scores.about["cost"].get("flops", {}).values())
    torch.save({"values": scores.values.clone(), "seconds": seconds, "flops": flops, "megabytes": grown}, file)
    return file


def gain(source: Source, held: Tensor, chosen: Tensor, seed: int, options: argparse.Namespace, folder: Path) -> float:
    """Return the loss on held-out reference text after training on rows drawn from ``chosen``."""
    context = context_at(options.at, source, options, folder)
    model, optimizer = context.model, context.optimizer
    generator = torch.Generator().manual_seed(seed)
    order = chosen[torch.randperm(len(chosen), generator=generator)]
    for step in range(options.train_steps):
        ids = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        causal_lm_loss(model, {"input_ids": source.tokens[ids]}).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float(causal_lm_loss(model, {"input_ids": held}).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--at", type=int, default=300, help="step of the run at which the pool is scored")
    parser.add_argument("--pool", type=int, default=4096, help="rows of the pool")
    parser.add_argument("--train-steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(SETTINGS))
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoint and what the probe measured")
    options = parser.parse_args()
    options.steps = [options.at]
    wanted, options.references = options.references, 2 * options.references
    everything = make_source(options)
    options.references = wanted
    held = everything.references[wanted:]
    source = Source(everything.tokens, everything.references[:wanted])
    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    train(source, options, folder)
    context = context_at(options.at, source, options, folder)
    exact = exact_influence(context, "in_batch", folder / f"exact-{options.at}-in_batch.pt")
    influence = exact.influence.double()
    unit = (influence - influence.mean()) / influence.std()

    source.tokens = source.tokens[: options.pool]
    source.pool = CandidatePool(len(source.tokens), "cheap")
    seeds = range(options.seeds)
    rows = torch.arange(options.pool)
    base = torch.tensor([gain(source, held, rows, seed, options, folder) for seed in seeds])
    tokens = source.tokens.numel() / 1e6
    per_row = 1e6 / source.tokens.shape[1]
    print(f"pool of {tokens:.2f} M tokens, step {options.at}, {len(influence)} candidates probed")
    head = f"{'s/Mtok':>10}{'TFLOP':>9}{'MB':>7}{'Spearman':>10}{'top':>7}{'gain':>16}"
    print(f"{'method':<20}{head}")
    print(f"{'random':<20}{0:>10.2f}{0:>9.3f}{0:>7.0f}{'–':>10}{'–':>7}{0:>9.3f} ± {float(base.std()):.3f}")
    fifth = influence.topk(len(influence) // 5).indices
    probe = f"{'exact probe':<20}{exact.seconds * per_row:>10.0f}{'–':>9}{'–':>7}{1:>10.2f}"
    print(f"{probe}{float(unit[fifth].mean()):>7.2f}{'–':>9}")
    for name in options.methods:
        for label, settings in SETTINGS[name].items():
            arguments = (name, settings, source, options, folder)
            process = multiprocessing.get_context("fork").Process(target=scored, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{label} failed")
            found = torch.load(folder / "scored.pt")
            values = found["values"]
            mine = values[: len(influence)].nan_to_num(neginf=float(values[values.isfinite()].min()) - 1)
            best = mine.topk(len(mine) // 5).indices
            # ties, as in a band, are drawn at random
            noise = torch.rand(len(values), generator=torch.Generator().manual_seed(0))
            order = torch.from_numpy(np.lexsort((noise.numpy(), values.numpy())).copy())
            chosen = order[-(len(order) // 5) :]
            losses = torch.tensor([gain(source, held, chosen, seed, options, folder) for seed in seeds])
            gained = base - losses
            print(
                f"{label:<20}{found['seconds'] / tokens:>10.2f}{found['flops'] / tokens / 1e12:>9.3f}"
                f"{found['megabytes']:>7.0f}{rank_correlation(mine, influence):>10.2f}{float(unit[best].mean()):>7.2f}"
                f"{float(gained.mean()):>9.3f} ± {float(gained.std()):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
