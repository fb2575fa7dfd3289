"""Projections keep inner products, and are the same everywhere."""

import pytest
import torch

from liveselect.functional.flops import flops_counted
from liveselect.functional.sketches import CountSketch, DenseSketch, LowRankSketch

SHAPES = {"w": torch.Size([24, 40]), "b": torch.Size([24]), "deep": torch.Size([6, 4, 10])}
CPU = torch.device("cpu")


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    norm = sum(each.square().sum() for each in made.values()).sqrt()
    return {name: each / norm for name, each in made.items()}


def inner(first, second):
    return float(sum((first[name] * second[name]).sum() for name in SHAPES))


@pytest.mark.parametrize("kind", [CountSketch, DenseSketch, LowRankSketch])
def test_inner_products_are_right_on_average_and_as_near_as_the_dimensions_say(kind):
    first, second = gradients(0), gradients(1)
    mixed = {name: 0.8 * first[name] + 0.6 * second[name] for name in SHAPES}
    errors = []
    for seed in range(60):
        sketch = kind(SHAPES, 300, seed, CPU)
        assert len(sketch(first)) == sketch.dimensions <= 300
        errors.append(float(sketch(first) @ sketch(mixed)) - inner(first, mixed))
    found = torch.tensor(errors)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 60**0.5
    assert float(found.std()) < 4 / 300**0.5


@pytest.mark.parametrize("kind", [CountSketch, DenseSketch, LowRankSketch])
def test_a_projection_is_linear_the_same_each_time_and_takes_what_is_missing_for_zero(kind):
    first, second = gradients(0), gradients(1)
    sketch, again = kind(SHAPES, 64, 7, CPU), kind(dict(reversed(SHAPES.items())), 64, 7, CPU)
    assert torch.equal(sketch(first), again(first))
    both = sketch({name: 2 * first[name] - second[name] for name in SHAPES})
    torch.testing.assert_close(both, 2 * sketch(first) - sketch(second), atol=1e-5, rtol=1e-4)
    part = {"w": first["w"]}
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    torch.testing.assert_close(sketch(part), sketch(zeros | part))
    assert not torch.equal(sketch(first), kind(SHAPES, 64, 8, CPU)(first))


@pytest.mark.parametrize("kind", [DenseSketch, LowRankSketch])
def test_the_flops_of_a_projection_are_its_products(kind):
    sketch = kind(SHAPES, 64, 0, CPU)
    with flops_counted() as flops:
        sketch(gradients(0))
    assert flops.total == sketch.flops


def test_a_map_without_room_for_every_parameter_is_refused():
    with pytest.raises(ValueError, match="one dimension for each of 3 parameters"):
        LowRankSketch(SHAPES, 2, 0, CPU)
