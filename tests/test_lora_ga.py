"""LoRA-GA (https://arxiv.org/abs/2407.05000): its start against the SVD of the dense gradient.

LoRA-One, which shares how the gradient is read, is in test_lora_one.py.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.codecs import Dense
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import GradientStart, LoRAGA
from llm_lowrank.methods.lora_one import LoRAOne
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks
from tests.test_calibration import dense_gradients
from tests.test_limits import ROWS, argv, model_folder
from tests.tiny import CALIBRATION, Trainee

R, SAMPLES = 3, 6
PAIRS = dict(rank=R, samples=SAMPLES, svd_niter=6)
METHODS = {"lora_ga": LoRAGA(**PAIRS), "lora_one": LoRAOne(**PAIRS)}


def started(method: GradientStart, dtype: str = "fp32") -> Trainee:
    return Trainee(method, "plain", dtype, samples=SAMPLES, num_hidden_layers=1)


def svd(t: Trainee) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """U, S, V of the gradient of the calibration samples, by autograd over the dense weights as they are stored."""
    gradients = dense_gradients(t.weights(), CALIBRATION, SAMPLES, num_hidden_layers=1)
    triplets = {name: torch.linalg.svd(g.double(), full_matrices=False) for name, g in gradients.items()}
    return {name: (u, s, vt.T) for name, (u, s, vt) in triplets.items()}


def cosines(found: Tensor, wanted: Tensor) -> Tensor:
    """Of the angles between two subspaces, given by their columns, the smallest last."""
    return torch.linalg.svdvals(torch.linalg.qr(found)[0].T @ torch.linalg.qr(wanted)[0])


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_the_start_is_the_papers_by_the_svd_of_the_dense_gradient(dtype):
    """Over nf4 the gradient is that of the decoded model."""
    t = started(METHODS["lora_ga"], dtype)
    for adapter, (u, s, v) in zip(t.adapters, svd(t).values(), strict=True):
        m, _ = adapter.shape
        c = m**0.25 / 16**0.5
        a, b = adapter.A.detach().double(), adapter.B.detach().double()
        identity = c**2 * torch.eye(R, dtype=torch.float64)
        assert torch.allclose(a @ a.T, identity, atol=1e-5) and torch.allclose(b.T @ b, identity, atol=1e-5)
        assert cosines(a.T, v[:, :R]).min() > 0.99999 and cosines(b, u[:, R : 2 * R]).min() > 0.9999, adapter.name
        # the directions themselves, in their order, where the singular values tell them apart
        for k in range(R):
            if s[k] > 1.05 * s[k + 1] and (k == 0 or s[k - 1] > 1.05 * s[k]):
                assert abs(a[k] @ v[:, k]) / c > 0.9999, (adapter.name, k)
        energy = float((u[:, : 2 * R].T @ b).norm() ** 2 / b.norm() ** 2)
        assert energy > 0.9999


def test_the_first_step_moves_w_along_the_best_update_of_twice_the_rank():
    """The theorem of the paper: A and B after a small step of plain gradient descent change W + s B A by -rate s^2 c^2
    times the gradient cut to its 2 r largest directions.
    """
    t = started(METHODS["lora_ga"])
    t.forward_backward(CALIBRATION)
    for adapter, (u, s, v) in zip(t.adapters, svd(t).values(), strict=True):
        c, scale = adapter.shape[0] ** 0.25 / 16**0.5, adapter.scale
        a, b = (p.detach().double() for p in (adapter.A, adapter.B))
        moved = scale * (adapter.B.grad.double() @ a + b @ adapter.A.grad.double())  # per unit of -rate
        best = scale**2 * c**2 * u[:, : 2 * R] * s[: 2 * R] @ v[:, : 2 * R].T
        assert (moved - best).norm() <= 2e-3 * best.norm(), adapter.name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
def test_w_is_not_touched_and_the_bank_takes_away_what_the_pairs_add(dtype):
    t, lora = started(METHODS["lora_ga"], dtype), Trainee(LoRA(rank=R), "plain", dtype, num_hidden_layers=1)
    for adapter, plain in zip(t.adapters, lora.adapters, strict=True):
        assert torch.equal(adapter.bank_A, adapter.A) and torch.equal(adapter.bank_B, -adapter.B)
        assert adapter.B.any() and not adapter.ledger and adapter.taken == 0
        assert all(torch.equal(one, other) for one, other in zip(adapter.parts(), plain.parts(), strict=True))
    torch.testing.assert_close(t.logits(), lora.logits(), rtol=0, atol=2e-2 if dtype == "bf16" else 1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_module_that_the_samples_do_not_reach_starts_as_lora_does(method, monkeypatch):
    monkeypatch.setattr("tests.tiny.calibrate_on", lambda *_: None)
    t, lora = started(method), Trainee(LoRA(rank=R), "plain", num_hidden_layers=1)
    method.calibrate(t.adapters, t.engine, lambda: None)
    for adapter, plain in zip(t.adapters, lora.adapters, strict=True):
        assert torch.equal(adapter.A, plain.A) and not adapter.B.any()


def start_of(method: GradientStart, engine: str) -> dict[str, Tensor]:
    return Trainee(method, engine, samples=SAMPLES, num_hidden_layers=1).values()


@pytest.mark.parametrize("name", METHODS)
def test_the_start_does_not_depend_on_the_engine(name):
    wanted = ranks.run(1, start_of, METHODS[name], "plain")[0]
    for engine, world in (("plain", 3), ("zero3", 2), ("fsdp", 3)):
        answers = ranks.run(world, start_of, METHODS[name], engine)
        for key, value in wanted.items():
            assert (answers[0][key] - value).norm() <= 1e-3 * value.norm(), (engine, key)
            assert all(torch.equal(other[key], answers[0][key]) for other in answers)


def test_what_cannot_be_is_refused():
    for settings, complaint in (
        (dict(samples=0), "method.samples must be at least 1, not 0"),
        (dict(gamma=0.0), "method.gamma must be positive, not 0.0"),
        (dict(svd_niter=-1), "method.svd_niter must be at least 0, not -1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            LoRAGA(**settings)
    with pytest.raises(ValueError, match=r"2 x method.rank = 14 is more than min\(m, n\) = 12 of its 13 x 12 weight"):
        LoRAGA(rank=7).build("layer", nn.Linear(12, 13), Dense(torch.float32), 0)


def test_the_defaults_are_the_papers():
    ga, one = LoRAGA(), LoRAOne()
    assert (ga.rank, ga.samples, ga.gamma, ga.svd_niter) == (8, 128, 16, 4)
    assert (one.rank, one.samples, one.gamma, one.svd_niter) == (8, 8, 128, 16)
    assert ga.scale == one.scale == 16 / 8**0.5  # rsLoRA


# --- whole runs -------------------------------------------------------------------------------------------------------


def run(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str], rows: list[dict] = ROWS, **changes: object
) -> str:
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "method.rank": 2,
        "method.samples": 6,
        "method.svd_niter": 1,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    train(parse(argv(folder, model, rows, **{k: v for k, v in settings.items() if v is not None})))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_calibrated_once_and_resumes_bitwise_without(name, tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    live = partial(run, tmp_path / "one", model, capsys, **{"method.type": name})
    said = live()
    assert "calibrated on 6 samples with " in said and ": 4 passes forward and backward in " in said
    first, before = load_file(tmp_path / "one/out/adapter/adapter_model.safetensors"), said.count("before training")
    assert before == 2, "the evaluation before training is that of the untouched model"
    shutil.rmtree(tmp_path / "one/out/adapter")
    shutil.rmtree(tmp_path / "one/out/checkpoints/step-000004")
    said = live(resume_from_checkpoint="auto")
    assert "calibrated on" not in said and "resuming from" in said
    again = load_file(tmp_path / "one/out/adapter/adapter_model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(again[key], value) for key, value in first.items())
    config = json.loads((tmp_path / "one/out/adapter/adapter_config.json").read_text())
    assert config["r"] <= (4 if name == "lora_ga" else 2)


def test_a_stream_and_packed_rows_are_calibrated_on(tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    one = {"method.type": "lora_one", "save_steps": 0}
    rows = [*ROWS[:4], {"prompt": "none", "completion": ""}, *ROWS[4:]]
    settings = {**one, "data.streaming": True, "data.bad_rows": "drop", "max_steps": 5}  # all of it is read once
    said = run(tmp_path / "stream", model, capsys, rows, **settings, **{"method.samples": 18})
    assert "calibrated on 18 samples" in said
    lora = {"method.type": "lora", "method.samples": None, "method.svd_niter": None}
    plain = run(tmp_path / "plain", model, capsys, rows, **settings | lora)
    counts = [re.findall(r"of the stream.*dropped (\{.*\})", text) for text in (said, plain)]
    assert counts[0] == counts[1] != [], "a row is counted once, though it is read twice"
    said = run(tmp_path / "packed", model, capsys, **one, **{"data.packing": True, "data.max_length": 48})
    assert "calibrated on " in said
