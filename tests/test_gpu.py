"""What depends on the device: random states, precisions, attention kernels, sharding, compiling.

The same tests run on the CPU by default and on a GPU with ``pytest -m gpu``, with every estimator.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_runs import ESTIMATORS, CompiledLM, EagerLM, LlamaLM, regression, sharded_alone, trained
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_ranks import on_lightning_ranks
from small_run import ProbingUniform, SmallLM
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.callbacks.random_state import random_state, set_random_state
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.selectors import UniformSelector

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
    ),
]
PRECISIONS = ["32-true", "bf16-mixed"]
SOME = [
    pytest.param(name, marks=() if name in ("one step", "hooks") else pytest.mark.slow, id=name) for name in ESTIMATORS
]
"""A CPU tries two by default: what differs from device to device are kernels, which all estimators call alike."""


def cosine(one, other) -> float:
    return float(torch.cosine_similarity(torch.as_tensor(one), torch.as_tensor(other), dim=0))


def influence(folder, device, estimator, **settings) -> torch.Tensor:
    """What the estimator measures before the first step."""
    probing = ProbingUniform()
    trained(folder, device, probing, estimator, max_steps=1, **settings)
    return torch.cat(probing.influence)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


def test_random_states_of_the_device_come_back(device):
    state = random_state()
    first = torch.rand(5, device=device)
    set_random_state(state)
    assert torch.equal(torch.rand(5, device=device), first)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_with_dropout_on_the_device_resumes_to_the_bit(tmp_path, device, precision):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="middle", save_top_k=-1)
    whole, rounds = trained(
        tmp_path / "whole", device, regression(), OneStepInfluence(), callbacks=[keep], precision=precision
    )
    path = tmp_path / "middle.ckpt"
    resumed, again = trained(
        tmp_path / "resumed", device, regression(), OneStepInfluence(), ckpt_path=path, precision=precision
    )
    assert resumed == whole[3:]
    assert [record.influence for record in again] == [record.influence for record in rounds]


@pytest.fixture(scope="module", params=PRECISIONS)
def without_measuring(request, device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("off")
    return request.param, trained(folder, device, UniformSelector(), precision=request.param)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_with_measuring_equals_training_without(tmp_path, device, without_measuring, name):
    precision, off = without_measuring
    probing = ProbingUniform()
    on, _ = trained(tmp_path, device, probing, ESTIMATORS[name](), precision=precision)
    assert on == off
    assert all(values.isfinite().all() and values.std() > 0 for values in probing.influence)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_gpu_finds_the_influence_that_a_cpu_finds(tmp_path, name):
    found = [influence(tmp_path / each, each, ESTIMATORS[name](), dropout=0.0) for each in ("cpu", "cuda")]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("name", SOME)
def test_half_precision_ranks_candidates_as_single_does(tmp_path, device, name):
    single, half = (
        influence(tmp_path / precision, device, ESTIMATORS[name](), dropout=0.0, precision=precision)
        for precision in PRECISIONS
    )
    # one step on one example moves the loss by little more than what bfloat16 resolves
    assert cosine(single, half) > (0.5 if name in ("one step", "central difference") else 0.95)


@pytest.mark.parametrize("name", SOME)
def test_fused_attention_measures_what_plain_attention_does(tmp_path, device, name):
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        found = influence(tmp_path / "fused", device, ESTIMATORS[name](), module=LlamaLM)
    plain = influence(tmp_path / "plain", device, ESTIMATORS[name](), module=EagerLM)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("name", SOME)
def test_a_compiled_model_is_measured_like_an_eager_one(tmp_path, device, name):
    compiled, eager = (
        influence(tmp_path / module.__name__, device, ESTIMATORS[name](), module=module, dropout=0.0)
        for module in (CompiledLM, SmallLM)
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))


def test_a_step_is_heard_on_the_device(tmp_path, device):
    selection = trained(tmp_path, device, regression(), FirstOrderInfluence(), dropout=0.0, overhear=1)
    for record in selection[1]:
        assert len(record.overheard) == 2
        assert torch.tensor(record.overheard_influence).isfinite().all()


def test_fsdp2_on_one_device_measures_and_chooses_as_without(tmp_path, device):
    if device == "cpu":
        (found,) = on_lightning_ranks(sharded_alone, 1, tmp_path, device)
    else:  # a fork cannot use a GPU that its parent has used
        command = [sys.executable, str(Path(__file__).parent / "device_runs.py"), str(tmp_path), device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
    for estimator in ("one step", "hooks", "K-FAC"):
        (ids, sharded), (expected, whole) = found[f"sharded, {estimator}"], found[f"whole, {estimator}"]
        assert ids == expected
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(whole), rtol=1e-3, atol=1e-4)
