import time

import pytest
import torch
from torch import nn

from liveselect.cost import CostMeter, SilentProgress, Stopwatch


def test_nested_phases_are_charged_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 6.0])  # outer opens, inner opens, inner closes, outer closes
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = CostMeter()
    with meter.phase("outer"), meter.phase("inner"):
        meter.add_flops(7)
    assert dict(meter.seconds) == {"outer": 1.0 + 2.0, "inner": 3.0}
    assert dict(meter.flops) == {"inner": 7}


def test_a_phase_that_fails_is_closed_and_its_display_stopped():
    class Display(SilentProgress):
        stopped = False

        def stop(self):
            self.stopped = True

    display = Display()
    meter = CostMeter(display)
    with pytest.raises(KeyError), meter.tracked("probe", 1, "candidates"):
        raise KeyError
    assert display.stopped
    with meter.phase("next"):
        meter.add_flops(1)
    assert dict(meter.flops) == {"next": 1}


def test_a_stopwatch_adds_up_its_laps_those_that_fail_too(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch, device = Stopwatch(), torch.device("cpu")
    with watch.lap(device):
        pass
    with pytest.raises(KeyError), watch.lap(device):
        raise KeyError
    assert watch.read() == watch.read() == 1.0 + 2.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_laps_of_a_gpu_take_no_longer_than_what_surrounds_them():
    watch, device = Stopwatch(), torch.device("cuda")
    large = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        with watch.lap(device):
            large = large @ large * 1e-4
    assert 0.0 < watch.read() <= time.perf_counter() - began


def test_work_is_counted_once_and_charged_every_time_to_the_open_phase():
    layer, x, meter, trials = nn.Linear(4, 4), torch.randn(2, 4), CostMeter(), []

    def run():
        trials.append(layer(x).sum().backward())

    for _ in range(3):
        with meter.phase("a"), meter.counting(layer, "forward", x.shape):
            layer(x)
    with meter.phase("b"), meter.counting(layer, "backward", trial=run):
        pass
    with meter.phase("b"), meter.counting(layer, "backward", trial=run):
        pass
    with meter.phase("c"), meter.counting():
        layer(x)
        torch.fft.fft(x)
    assert dict(meter.flops) == {"a": 3 * 64, "b": 2 * 2 * 64, "c": 64}
    assert len(trials) == 1
    assert dict(meter.uncounted) == {"aten._fft_r2c": 1}
    assert meter.spent()["uncounted"] == {"aten._fft_r2c": 1.0}


def test_another_shape_and_another_model_are_counted_anew():
    layer, meter = nn.Linear(4, 4), CostMeter()
    for rows in (2, 3, 2):
        with meter.counting(layer, rows):
            layer(torch.randn(rows, 4))
    other = nn.Linear(4, 8)
    with meter.counting(other, 2):
        other(torch.randn(2, 4))
    assert sum(meter.flops.values()) == 32 * (2 + 3 + 2) + 2 * 64


def test_a_trial_moves_no_random_state_and_a_failed_block_is_not_remembered():
    layer, meter, state = nn.Linear(4, 4), CostMeter(), torch.get_rng_state()
    with meter.counting(layer, "draws", trial=lambda: torch.randn(3)):
        pass
    assert torch.equal(state, torch.get_rng_state())

    def broken():
        with meter.counting(layer, "broken"):
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert meter.recall(layer, "broken") is None
    assert meter.recall(layer, "draws") is not None


def test_forwards_that_another_library_calls_are_charged_however_it_calls_them():
    network, other = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), nn.Linear(16, 2)
    each = 2 * 16 * 32 + 2 * 32 * 4
    meter = CostMeter()
    with meter.phase("encode"), meter.forwards(network, other), torch.inference_mode():
        first = network(torch.ones(3, 16))
        network.forward(torch.ones(3, 16))  # sentence-transformers calls it so
        network(torch.ones(5, 16))
        torch.ones(9, 9) @ torch.ones(9, 9)  # no forward of these
    assert meter.flops == {"encode": (3 + 3 + 5) * each}
    assert torch.equal(first, network(torch.ones(3, 16)))
    assert "forward" not in vars(network)
    with pytest.raises(RuntimeError), meter.forwards(other):
        other(torch.ones(2, 3))
    assert "forward" not in vars(other)
