import torch

from liveselect.seeding import derive_seed, generator_for


def test_the_same_names_give_the_same_draws_and_other_names_give_others():
    draws = {
        name: tuple(torch.randint(0, 2**62, (4,), generator=generator_for(*name)).tolist())
        for name in [(0, 0, "probe"), (0, 0, "noise"), (0, 1, "probe"), (1, 0, "probe"), (0, 10, "probe")]
    }
    assert len(set(draws.values())) == len(draws)
    again = torch.randint(0, 2**62, (4,), generator=generator_for(0, 1, "probe")).tolist()
    assert tuple(again) == draws[0, 1, "probe"]


def test_names_cannot_run_into_each_other():
    assert derive_seed(1, 11, "x") != derive_seed(11, 1, "x")
    assert derive_seed(1, 2, "3/x") != derive_seed(1, 23, "x")


def test_deriving_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator_for(0, 0, "probe"))
    assert torch.equal(torch.get_rng_state(), before)
