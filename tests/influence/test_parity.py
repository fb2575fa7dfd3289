"""The same numbers as kronfluence and curvlinops, packages of their own making, under the conventions stated here."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from fakes import FakeSource, fake_context
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import TensorDataset

from liveselect.functional.kronecker import eigen, ekfac, kfac, rotated_squares, solve
from liveselect.influence import KFACInfluence

VOCAB = 40
REFERENCES, CANDIDATES, LENGTH = 6, 24, 12


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Decoder(nn.Module):
    """A small causal language model of plain linear layers; kronfluence ignores embeddings, norms and the head."""

    def __init__(self, width=16, layers=2, heads=2):
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    **{name: nn.Linear(width, width) for name in "qkvo"},
                    "up": nn.Linear(width, 3 * width, bias=False),
                    "down": nn.Linear(3 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            y = block["norm"](x)
            q, k, v = (block[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["o"](mixed)
            x = x + block["down"](F.gelu(block["up"](x)))
        return self.head(x)


def decoder():
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Decoder()


def tokens_of(rows, seed):
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def summed_loss(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def kronfluence_scores(model, strategy, damping, folder):
    """Aggregated scores ``(n,)`` of the candidates: summed losses, factors over tokens, positive is helpful."""
    analysis = pytest.importorskip("kronfluence.analyzer")
    task_module = pytest.importorskip("kronfluence.task")
    arguments = pytest.importorskip("kronfluence.arguments")

    class Task(task_module.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return summed_loss(model, batch[0])

        def compute_measurement(self, batch, model):
            return summed_loss(model, batch[0])

        def get_influence_tracked_modules(self):
            return [
                name for name, module in decoder().named_modules() if isinstance(module, nn.Linear) and name != "head"
            ]

        def get_attention_mask(self, batch):
            mask = torch.ones_like(batch[0])
            mask[:, -1] = 0  # the last token predicts nothing
            return mask

    logging.disable(logging.INFO)
    try:
        task = Task()
        prepared = analysis.prepare_model(copy.deepcopy(model), task)
        analyzer = analysis.Analyzer("parity", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        candidates, references = TensorDataset(tokens_of(CANDIDATES, 1)), TensorDataset(tokens_of(REFERENCES, 2))
        analyzer.fit_all_factors(
            "factors",
            candidates,
            per_device_batch_size=8,
            factor_args=arguments.FactorArguments(strategy=strategy, use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=references,
            train_dataset=candidates,
            per_device_query_batch_size=REFERENCES,
            per_device_train_batch_size=8,
            score_args=arguments.ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].flatten()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
def test_scores_are_those_of_kronfluence(strategy, tmp_path):
    """Its gradients are of sums over tokens, ours of means; its EK-FAC and diagonal curvature are of sequences.

    So its scores are ours times tokens of a candidate, times tokens of the reference set, and for those two curvatures
    divided by the tokens of a sequence. Damping is a tenth of each layer's mean eigenvalue in both.
    """
    model = decoder()
    theirs = kronfluence_scores(model, strategy, None, tmp_path)
    source = FakeSource(tokens_of(CANDIDATES, 1), tokens_of(REFERENCES, 2))
    context = fake_context(source, model=model)
    ours = KFACInfluence(strategy, factor_examples=CANDIDATES)
    ours.fit(context)
    found = ours.score(context, next(iter(context.candidate_batches(torch.arange(CANDIDATES)))))
    targets = LENGTH - 1
    scale = targets * (REFERENCES * targets) / (targets if strategy in {"ekfac", "diagonal"} else 1)
    assert spearmanr(found, theirs).statistic >= 0.999999
    assert (scale * found - theirs).norm() <= 1e-5 * theirs.norm()


def network():
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_preconditioned_gradients_are_those_of_curvlinops(kind):
    """An MLP without tokens, mean loss, empirical Fisher, the bias a column of its layer, exact damping."""
    curvlinops = pytest.importorskip("curvlinops")
    model, damping = network(), 0.03
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (30,), generator=generator)
    parameters = list(model.parameters())
    operator = {"kfac": curvlinops.KFACLinearOperator, "ekfac": curvlinops.EKFACLinearOperator}[kind](
        model,
        nn.CrossEntropyLoss(reduction="mean"),
        parameters,
        [(x, y)],
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    theirs = inverse @ list(gradient)

    hidden = model[0](x)
    outputs = model[2](hidden.tanh())
    deltas = torch.autograd.grad(F.cross_entropy(outputs, y, reduction="sum"), [hidden, outputs])
    ones = torch.ones(30, 1, dtype=torch.float64)
    for index, inputs in enumerate((x, hidden.tanh().detach())):
        inputs, delta = torch.cat([inputs, ones], dim=1), deltas[index]
        curvature = kfac(eigen(inputs.t() @ inputs / 30), eigen(delta.t() @ delta / 30))
        if kind == "ekfac":
            squares = rotated_squares(curvature, inputs.unsqueeze(1), delta.unsqueeze(1)) / 30
            curvature = ekfac(eigen(inputs.t() @ inputs / 30), eigen(delta.t() @ delta / 30), squares)
        weight, bias = gradient[2 * index : 2 * index + 2]
        found = solve(curvature, torch.cat([weight, bias.unsqueeze(1)], dim=1), damping)
        expected = torch.cat([theirs[2 * index], theirs[2 * index + 1].unsqueeze(1)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
