import subprocess
import sys

import torch

from liveselect.functional.features import adam_feature
from liveselect.functional.sketches import CountSketch

CPU = torch.device("cpu")


def unit(shape, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return value / value.norm()


def test_inner_products_of_unit_vectors_are_kept():
    d = 1024
    sketch = CountSketch({"a": torch.Size([300, 100])}, d, 0, CPU)
    for seed in range(20):
        first, second = unit((300, 100), seed), unit((300, 100), 100 + seed)
        second = 0.6 * first + 0.8 * second
        found = float(sketch({"a": first}) @ sketch({"a": second}))
        assert abs(found - float((first * second).sum())) < 4 / d**0.5


def test_the_map_is_linear_and_names_are_placed_apart():
    shapes = {"a": torch.Size([50]), "b": torch.Size([50])}
    sketch = CountSketch(shapes, 64, 1, CPU)
    x, y = unit((50,), 0), unit((50,), 1)
    torch.testing.assert_close(sketch({"a": x, "b": y}), sketch({"a": x}) + sketch({"b": y}))
    torch.testing.assert_close(sketch({"a": 3 * x}), 3 * sketch({"a": x}))
    assert not torch.equal(sketch({"a": x}), sketch({"b": x}))
    assert not torch.equal(sketch({"a": x}), CountSketch(shapes, 64, 2, CPU)({"a": x}))


def test_the_map_is_the_same_in_another_process():
    code = (
        "import torch; from liveselect.functional.sketches import CountSketch; "
        "sketch = CountSketch({'a': torch.Size([40])}, 16, 3, torch.device('cpu')); "
        "print(sketch({'a': torch.arange(40.)}).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = CountSketch({"a": torch.Size([40])}, 16, 3, CPU)({"a": torch.arange(40.0)})
    assert done.stdout.strip() == str(mine.tolist())


def test_adams_feature_is_the_one_computed_by_hand():
    g, m, v = torch.tensor(1.0), torch.tensor(0.1), torch.tensor(0.01)
    assert abs(adam_feature(g, m, v, (0.9, 0.999), 1e-8).item() - 1.812402) < 1e-6
    cold = adam_feature(torch.tensor([5.0, -2.0]), torch.zeros(2), torch.zeros(2), (0.9, 0.999), 1e-8)
    torch.testing.assert_close(cold, torch.tensor([3.1623, -3.1623]), atol=1e-3, rtol=0)


def test_adams_own_form_is_the_step_that_torch_takes():
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        parameter.grad = torch.randn(5, generator=generator)
        optimizer.step()
    state = optimizer.state[parameter]
    before, gradient = parameter.detach().clone(), torch.randn(5, generator=generator)
    mean, square, steps = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), int(state["step"])
    expected = adam_feature(gradient, mean, square, (0.9, 0.999), 1e-8, steps=steps)
    parameter.grad = gradient
    optimizer.step()
    torch.testing.assert_close(before - parameter.detach(), expected)
