import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import forked

from liveselect.functional import sampling
from liveselect.functional.sampling import gumbel_topk, released_bottomk, uniform_subset


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def plackett_luce_inclusion(weights, k):
    """Inclusion probabilities by enumeration of all ordered draws without replacement."""
    inclusion = [0.0] * len(weights)
    for draw in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for i in draw:
            probability *= weights[i] / left
            left -= weights[i]
        for i in draw:
            inclusion[i] += probability
    return inclusion


def exact_inclusion(form, scores, k, temperature):
    if form is gumbel_topk:
        return plackett_luce_inclusion([math.exp(s / temperature) for s in scores], k)
    rest = plackett_luce_inclusion([math.exp(-s / temperature) for s in scores], len(scores) - k)
    return [1.0 - p for p in rest]


def frequencies(form, scores, k, temperature, draws):
    scores = torch.tensor(scores, dtype=torch.float64)
    generator, counts = seeded(0), torch.zeros(len(scores))
    for _ in range(draws):
        counts[form(scores, k, temperature, generator)] += 1
    return (counts / draws).tolist()


def by_brute_force(scores, k, temperature, generator, sign=1.0):
    """All keys at once, sorted: what the bracketed pass must equal."""
    seed = sampling._draw_seed(generator)
    noise = np.concatenate(
        [
            sampling._gumbel(seed, (0, start // sampling._CHUNK_ROWS), stop - start)
            for start, stop in sampling._chunks(len(scores))
        ]
    )
    keys = scores.double().numpy() + sign * temperature * noise
    return np.sort(np.lexsort((np.arange(len(keys)), -keys))[:k]).tolist()


# the most draws where they have to tell the two forms apart
CASES = [
    ([1.0, 0.5, 0.0, -0.5, -1.0], 2, 0.5, 3000),
    ([1.0, 0.5, 0.0, -0.5, -1.0], 2, 1.0, 3000),
    ([1.0, 0.8, 0.6, 0.4], 2, 0.1, 2000),
    ([2.0, 2.0, 2.0, 2.0, 2.0], 3, 0.7, 2000),
]


@pytest.mark.long
@pytest.mark.parametrize("form", [gumbel_topk, released_bottomk])
@pytest.mark.parametrize(("scores", "k", "temperature", "draws"), CASES)
def test_inclusion_frequencies_are_those_of_enumerated_plackett_luce(form, scores, k, temperature, draws):
    exact = exact_inclusion(form, scores, k, temperature)
    assert sum(exact) == pytest.approx(k)
    for seen, expected in zip(frequencies(form, scores, k, temperature, draws), exact, strict=True):
        assert abs(seen - expected) < 4.5 * math.sqrt(expected * (1 - expected) / draws) + 1e-12


@pytest.mark.parametrize(
    ("form", "temperature", "published"),
    [
        (gumbel_topk, 0.5, [0.91926, 0.67640, 0.26705, 0.10019, 0.03710]),
        (released_bottomk, 0.5, [0.89578, 0.72274, 0.30147, 0.07113, 0.00888]),
        (gumbel_topk, 1.0, [0.73124, 0.54724, 0.35780, 0.22481, 0.13891]),
        (released_bottomk, 1.0, [0.73600, 0.58536, 0.38122, 0.20599, 0.09143]),
    ],
)
def test_enumeration_gives_the_probabilities_derived_for_both_forms(form, temperature, published):
    assert exact_inclusion(form, CASES[0][0], 2, temperature) == pytest.approx(published, abs=1e-5)


def test_the_released_form_keeps_the_smallest_of_loss_over_temperature_plus_noise():
    loss, temperature, k = torch.randn(50, generator=seeded(1), dtype=torch.float64), 0.5, 10
    noise = sampling._gumbel(sampling._draw_seed(seeded(2)), (0, 0), 50)
    expected = np.sort(np.argsort(loss.numpy() / temperature + noise)[:k]).tolist()
    assert released_bottomk(-loss, k, temperature, seeded(2)).tolist() == expected


@pytest.mark.parametrize("n", [200_000, 300_001])
@pytest.mark.parametrize("share", [1e-5, 0.2, 0.9, 0.99999])
def test_the_bracketed_pass_equals_sorting_all_keys(n, share):
    scores = torch.randn(n, generator=seeded(3))
    for seed in range(2):
        k = round(share * n)
        drawn = gumbel_topk(scores, k, 0.5, seeded(seed)).tolist()
        assert drawn == by_brute_force(scores, k, 0.5, seeded(seed))
        drawn = released_bottomk(scores, k, 0.5, seeded(seed)).tolist()
        assert drawn == by_brute_force(scores, k, 0.5, seeded(seed), sign=-1.0)


def test_a_bracket_that_misses_is_widened_until_the_draw_is_exact(monkeypatch):
    monkeypatch.setattr(sampling, "_BRACKET_DEVIATIONS", 1e-3)
    monkeypatch.setattr(sampling, "_CHUNK_ROWS", 512)
    margins, bracket = [], sampling._bracket
    monkeypatch.setattr(sampling, "_bracket", lambda *arguments: margins.append(arguments[-1]) or bracket(*arguments))
    scores = torch.randn(5_000, generator=seeded(4))
    for seed in range(5):
        expected = by_brute_force(scores, 1_000, 1.0, seeded(seed))
        assert gumbel_topk(scores, 1_000, 1.0, seeded(seed)).tolist() == expected
    assert len(margins) > 5
    assert max(margins) > 1e-3


@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [-math.inf, 0.0, 1.0]])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_ties_are_drawn_exactly_and_never_held_all_at_once(monkeypatch, values, temperature):
    n, k = 1_000_000, 250_000
    scores = torch.tensor(values)[torch.randint(len(values), (n,), generator=seeded(6))]
    sizes, partition = [], np.partition
    monkeypatch.setattr(sampling.np, "partition", lambda keys, at: sizes.append(len(keys)) or partition(keys, at))
    drawn = gumbel_topk(scores, k, temperature, seeded(7)).tolist()
    assert max(sizes) < 0.2 * n
    monkeypatch.undo()
    assert drawn == by_brute_force(scores, k, temperature, seeded(7))


def test_temperature_zero_takes_the_largest_and_of_equals_the_first():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert gumbel_topk(scores, 3, 0.0, seeded(0)).tolist() == [1, 2, 3]
    assert released_bottomk(scores, 4, 0.0, seeded(0)).tolist() == [1, 2, 3, 4]
    many = torch.randint(5, (20_000,), generator=seeded(1)).float()
    assert gumbel_topk(many, 7_000, 0.0, seeded(0)).tolist() == by_brute_force(many, 7_000, 0.0, seeded(0))


def test_a_cold_draw_takes_the_best_and_a_hot_one_every_candidate_equally_often():
    scores = list(torch.randn(8, generator=seeded(8)).tolist())
    best = sorted(sorted(range(8), key=lambda i: -scores[i])[:3])
    assert gumbel_topk(torch.tensor(scores), 3, 1e-6, seeded(0)).tolist() == best
    for seen in frequencies(gumbel_topk, scores, 2, 1e9, 4000):
        assert abs(seen - 2 / 8) < 4.5 * math.sqrt(0.25 * 0.75 / 4000)


def test_the_noise_is_gumbel_distributed_in_every_chunk():
    from scipy.stats import kstest

    for chunk in (0, 1, 12345):
        assert kstest(sampling._gumbel(9, (0, chunk), 50_000), "gumbel_r").pvalue > 1e-3


def test_large_draws_include_each_score_as_often_as_the_limit_says():
    # n -> inf: inclusion(i) = 1 - exp(-w_i kappa), with kappa such that the sum is k
    from scipy.optimize import brentq

    n, k = 400_000, 80_000
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    which = torch.randint(4, (n,), generator=seeded(10))
    chosen = gumbel_topk(values[which], k, 1.0, seeded(11))
    size, seen = torch.bincount(which).double(), torch.bincount(which[chosen]).double()
    weights = values.double().exp()
    kappa = brentq(lambda x: float((size * (1 - torch.exp(-weights * x))).sum()) - k, 0.0, 100.0)
    expected = 1 - torch.exp(-weights * kappa)
    assert ((seen / size - expected).abs() < 5 * (expected * (1 - expected) / size).sqrt()).all()


def test_uniform_subsets_hold_every_candidate_and_every_pair_equally_often():
    draws, generator, counts = 6000, seeded(12), dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for _ in range(draws):
        counts[tuple(uniform_subset(5, 2, generator).tolist())] += 1
    for count in counts.values():
        assert abs(count / draws - 0.1) < 4.5 * math.sqrt(0.1 * 0.9 / draws)


def test_large_uniform_subsets_are_distinct_ascending_and_spread_out():
    n, k = 500_000, 100_000
    ids = uniform_subset(n, k, seeded(13))
    assert len(ids) == k
    assert (ids.diff() > 0).all()
    tenths = torch.bincount(ids * 10 // n) / (k / 10)
    assert ((tenths - 1).abs() < 0.05).all()


@pytest.mark.parametrize("form", [gumbel_topk, released_bottomk])
def test_a_score_of_minus_infinity_is_never_drawn(form):
    scores = torch.tensor([-math.inf, 1.0, -math.inf, 0.0, 2.0])
    generator = seeded(14)
    for k in range(4):
        for temperature in (0.0, 1.0, 1e300):
            assert not {0, 2} & set(form(scores, k, temperature, generator).tolist())
    with pytest.raises(ValueError, match="cannot draw 4 candidates: 2 of 5 have the score -inf"):
        form(scores, 4, 1.0, generator)


@pytest.mark.parametrize("form", [gumbel_topk, released_bottomk])
def test_what_cannot_be_drawn_is_refused_with_the_reason(form):
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="got 2 NaN and 1 \\+inf among 4"):
        form(torch.tensor([math.nan, math.inf, 0.0, math.nan]), 1, 1.0, seeded(0))
    with pytest.raises(ValueError, match="cannot draw 4 of 3 candidates"):
        form(good, 4, 1.0, seeded(0))
    with pytest.raises(ValueError, match="cannot draw -1 of 3"):
        form(good, -1, 1.0, seeded(0))
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"expected a temperature in 0\.\."):
            form(good, 1, temperature, seeded(0))
    with pytest.raises(ValueError, match=r"expected scores \(n,\)"):
        form(torch.zeros(2, 2), 1, 1.0, seeded(0))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        form(torch.zeros(3, dtype=torch.int64), 1, 1.0, seeded(0))
    with pytest.raises(ValueError, match="cannot draw 4 of 3"):
        uniform_subset(3, 4, seeded(0))


def test_none_and_all_can_be_drawn():
    assert gumbel_topk(torch.randn(5), 0, 1.0, seeded(0)).tolist() == []
    assert gumbel_topk(torch.randn(5), 5, 1.0, seeded(0)).tolist() == [0, 1, 2, 3, 4]
    assert uniform_subset(0, 0, seeded(0)).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_draws_like_its_value_in_double(dtype):
    scores = torch.randn(1000, generator=seeded(15)).to(dtype)
    assert torch.equal(gumbel_topk(scores, 99, 1.0, seeded(16)), gumbel_topk(scores.double(), 99, 1.0, seeded(16)))


def test_draws_depend_on_the_generator_alone_and_advance_it():
    scores = torch.zeros(1000)
    state = torch.get_rng_state()
    generator = seeded(17)
    first, second = (gumbel_topk(scores, 100, 1.0, generator) for _ in range(2))
    assert torch.equal(first, gumbel_topk(scores, 100, 1.0, seeded(17)))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def _on_threads(rank, ranks, folder):
    torch.set_num_threads((1, 4)[rank])
    return torch.get_num_threads(), gumbel_topk(torch.randn(300_000, generator=seeded(1)), 60_000, 0.5, seeded(2))


def test_the_number_of_threads_does_not_change_a_draw():
    (one, drawn), (four, drawn_by_four) = forked(_on_threads, 2)
    assert (one, four) == (1, 4)
    assert torch.equal(drawn, drawn_by_four)


def run_python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


PEAK = """
import pathlib, resource, sys, torch
from liveselect.functional.sampling import gumbel_topk

def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the size of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

n, temperature = int(sys.argv[1]), float(sys.argv[2])
gumbel_topk(torch.randn(200_000), 1000, 0.5, torch.Generator())
before = peak()
scores = torch.empty(n).normal_() if temperature else torch.zeros(n)
ids = gumbel_topk(scores, n // 5, temperature, torch.Generator().manual_seed(0))
assert len(ids) == n // 5 and (ids.diff() > 0).all()
print((peak() - before) / (4 * n))
"""


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.5, 0.0])
@pytest.mark.parametrize("n", [8_000_000, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_scores_and_draw_together_take_less_than_two_and_a_half_times_the_scores(n, temperature):
    assert 1.0 < float(run_python(PEAK, str(n), str(temperature))) < 2.5


def test_the_noise_is_that_of_the_generators_raw_bits():
    """Plans of runs that were cut off must come out again: whatever NumPy makes of its bits, these numbers stay."""
    for seed, place, size in ((5, (0, 3), 70_000), (2**60, (1, 0), 3)):
        bits = np.random.SFC64(np.random.SeedSequence((seed, *place))).random_raw(size)
        expected = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        assert np.array_equal(sampling._uniform(seed, place, size), expected)
        assert np.array_equal(sampling._uniform(seed, place, size, np.empty(1 << 17)), expected)


def capped_by_hand(keys, groups, k, most):
    taken, spare, filled = [], [], {}
    for i in sorted(range(len(keys)), key=lambda i: -keys[i]):
        filled[groups[i]] = filled.get(groups[i], 0) + 1
        (taken if filled[groups[i]] <= most else spare).append(i)
    return sorted((taken + spare)[:k])


@pytest.mark.parametrize(("k", "most"), [(10, 3), (25, 1), (40, 40), (0, 1)])
def test_a_capped_draw_is_the_greedy_one_by_hand(k, most):
    keys, groups = torch.randn(40, generator=seeded(1)), torch.randint(0, 5, (40,), generator=seeded(2))
    found = sampling.capped_topk(keys, groups, k, most).tolist()
    assert found == capped_by_hand(keys.tolist(), groups.tolist(), k, most)
