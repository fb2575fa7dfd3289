import time

import pytest

from liveselect.cost import CostMeter, SilentProgress, tracked_phase


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

    meter, display = CostMeter(), Display()
    with pytest.raises(KeyError), tracked_phase(meter, display, "probe", 1, "candidates"):
        raise KeyError
    assert display.stopped
    with meter.phase("next"):
        meter.add_flops(1)
    assert dict(meter.flops) == {"next": 1}
