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

pytestmark = pytest.mark.long

VOCAB = 40
REFERENCES, CANDIDATES, LENGTH = 6, 24, 12


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


def decoder(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return Decoder().to(dtype)


def tokens_of(rows, seed):
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def labels_of(tokens, ragged):
    """The tokens; on request, every third row ends early."""
    labels = tokens.clone()
    if ragged:
        for row in range(0, len(labels), 3):
            labels[row, 4 + row % 5 :] = -100
    return labels


def counting(labels):
    """The tokens left of the last target, ``(B, T)``."""
    return F.pad((labels[:, 1:] != -100).int(), (0, 1))


def summed_loss(model, batch):
    tokens, labels = batch
    return F.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def kronfluence_scores(model, strategy, damping, folder, ragged=False, aggregate=True):
    """Scores ``(queries, n)`` of the candidates: summed losses, factors over tokens, positive is helpful.

    The queries are the reference sequences, or one sum of them. Everything is computed in the model's own precision.
    """
    analysis = pytest.importorskip("kronfluence.analyzer")
    task_module = pytest.importorskip("kronfluence.task")
    arguments = pytest.importorskip("kronfluence.arguments")
    dtype = next(model.parameters()).dtype

    class Task(task_module.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return summed_loss(model, batch)

        def compute_measurement(self, batch, model):
            return summed_loss(model, batch)

        def get_influence_tracked_modules(self):
            return [
                name for name, module in decoder().named_modules() if isinstance(module, nn.Linear) and name != "head"
            ]

        def get_attention_mask(self, batch):
            return counting(batch[1])  # the last token predicts nothing

    logging.disable(logging.INFO)
    try:
        task = Task()
        prepared = analysis.prepare_model(copy.deepcopy(model), task)
        analyzer = analysis.Analyzer("parity", prepared, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        tokens, references = tokens_of(CANDIDATES, 1), tokens_of(REFERENCES, 2)
        candidates = TensorDataset(tokens, labels_of(tokens, ragged))
        analyzer.fit_all_factors(
            "factors",
            candidates,
            per_device_batch_size=8,
            factor_args=arguments.FactorArguments(
                strategy=strategy,
                use_empirical_fisher=True,
                activation_covariance_dtype=dtype,
                gradient_covariance_dtype=dtype,
                per_sample_gradient_dtype=dtype,
                lambda_dtype=dtype,
            ),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=TensorDataset(references, references),
            train_dataset=candidates,
            per_device_query_batch_size=REFERENCES,
            per_device_train_batch_size=8,
            score_args=arguments.ScoreArguments(
                damping_factor=damping,
                aggregate_query_gradients=aggregate,
                per_sample_gradient_dtype=dtype,
                precondition_dtype=dtype,
                score_dtype=dtype,
            ),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]
    finally:
        logging.disable(logging.NOTSET)


def our_scores(model, strategy, ragged=False):
    """What KFACInfluence finds, brought to kronfluence's conventions, ``(n,)``.

    Its gradients are of sums over tokens, ours of means; its EK-FAC and diagonal curvature are of sequences. So its
    scores are ours times the tokens of a candidate, times the tokens of the reference set, and for those two curvatures
    divided by the mean number of tokens of a sequence.
    """
    tokens, references = tokens_of(CANDIDATES, 1), tokens_of(REFERENCES, 2)
    labels = labels_of(tokens, ragged)
    context = fake_context(FakeSource(tokens, references, labels=labels), model=model)
    estimator = KFACInfluence(strategy, factor_examples=CANDIDATES)
    context.fit(estimator)
    found = context.score(estimator, next(iter(context.round.batches(torch.arange(CANDIDATES)))))
    targets = counting(labels).sum(dim=1)
    of_sequences = targets.double().mean() if strategy in {"ekfac", "diagonal"} else 1.0
    return (targets * REFERENCES * (LENGTH - 1) * found.double() / of_sequences).float()


def assert_the_same(ours, theirs, share=1e-5):
    assert spearmanr(ours, theirs).statistic >= 0.999999
    assert (ours - theirs).norm() <= share * theirs.norm()


@pytest.mark.parametrize(
    ("strategy", "ragged"),
    [("identity", False), ("diagonal", True), ("kfac", False), ("kfac", True), ("ekfac", False), ("ekfac", True)],
)
def test_scores_are_those_of_kronfluence(strategy, ragged, tmp_path):
    """Damping is a tenth of each layer's mean eigenvalue in both; biases are columns of their layers."""
    model = decoder()
    theirs = kronfluence_scores(model, strategy, None, tmp_path, ragged)
    assert_the_same(our_scores(model, strategy, ragged), theirs.flatten())


@pytest.mark.parametrize("damping", [1e-4, 1e-8])
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_scores_are_those_of_kronfluence_under_an_absolute_damping_too(strategy, damping, tmp_path, monkeypatch):
    """It is added to the eigenvalues; where those are of sequences, ours are smaller by their tokens, and so is it.

    Under so little of it, the inverse of what float32 makes of the smallest eigenvalues is noise: in float64.
    """
    model = decoder(torch.float64)
    theirs = kronfluence_scores(model, strategy, damping, tmp_path)
    ours = damping / (LENGTH - 1 if strategy in {"ekfac", "diagonal"} else 1)
    monkeypatch.setattr(
        "liveselect.influence.kfac.relative_damping", lambda curvature, share: torch.tensor(ours, dtype=torch.float64)
    )
    found = our_scores(model, strategy)
    assert_the_same(found, theirs.flatten())
    monkeypatch.undo()
    assert (our_scores(model, strategy) - theirs.flatten()).norm() > 1e-2 * theirs.norm()  # the damping is what tells


def test_scores_are_the_sum_of_those_that_kronfluence_gives_for_each_reference_sequence(tmp_path):
    model = decoder()
    theirs = kronfluence_scores(model, "kfac", None, tmp_path, aggregate=False)
    assert theirs.shape == (REFERENCES, CANDIDATES)
    assert_the_same(our_scores(model, "kfac"), theirs.sum(dim=0))


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


class Logits(nn.Module):
    """The model as curvlinops wants it: logits ``(B, V, T)``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens).transpose(1, 2)


def test_the_direction_in_a_language_model_is_that_of_curvlinops(monkeypatch):
    """Every token is a sample of its own (expand); the last of a sequence predicts nothing and is not fed."""
    curvlinops = pytest.importorskip("curvlinops")
    model, damping = decoder(torch.float64), 1e-3
    names = [name for name, _ in model.named_parameters() if name.startswith("blocks") and "norm" not in name]
    parameters = [dict(model.named_parameters())[name] for name in names]
    tokens, references = tokens_of(CANDIDATES, 1), tokens_of(REFERENCES, 2)
    operator = curvlinops.KFACLinearOperator(
        Logits(model),
        nn.CrossEntropyLoss(reduction="mean"),
        parameters,
        [(tokens[:, :-1], tokens[:, 1:])],
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)
    loss = F.cross_entropy(model(references)[:, :-1].flatten(0, 1), references[:, 1:].flatten())
    theirs = dict(zip(names, inverse @ list(torch.autograd.grad(loss, parameters)), strict=True))
    monkeypatch.setattr(
        "liveselect.influence.kfac.relative_damping",
        lambda curvature, share: torch.tensor(damping, dtype=torch.float64),
    )
    estimator = KFACInfluence(factor_examples=CANDIDATES)
    fake_context(FakeSource(tokens, references), model=model).fit(estimator)
    assert set(estimator.direction()) == set(names)
    for name, value in estimator.direction().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11)
