"""What only a GPU can show:  pytest -m gpu tests/gpu      (one GPU, or several: the sharded tests use all there are)

bitsandbytes' CUDA kernels, NCCL on packed bytes, pinned transfers. Not run by the ordinary test command, which has no
GPU; nothing here has been measured yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_lowrank.codecs import Int8, Nf4
from llm_lowrank.data import Batches, Example
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.run.ahead import Ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ROOT = Path(__file__).parents[2]
GPUS = torch.cuda.device_count()
CODECS = [
    Nf4(torch.bfloat16),
    Nf4(torch.bfloat16, double_quant=True),
    Int8(torch.bfloat16),
    Nf4(torch.float32),
    Int8(torch.float32),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


@every_codec
@pytest.mark.parametrize("m, n", [(43, 42), (7, 130), (1, 64), (4096, 4096)])
def test_cuda_codes_decode_as_on_the_cpu(codec, m, n):
    """Codes may differ where a value lies on the edge between two levels; what they decode to may then differ by one
    level.
    """
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    parts, wanted = codec.encode(w.cuda()), codec.encode(w)
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}
    assert all(v.is_cuda for v in parts.values())
    found = codec.decode(parts, n).cpu().float()
    # the same bytes, decoded by either device
    moved = codec.decode({k: v.cuda() for k, v in wanted.items()}, n).cpu().float()
    assert torch.allclose(moved, codec.decode(wanted, n).float(), rtol=2**-7, atol=1e-6)
    differ = (found != moved).float().mean()
    assert differ < 1e-3


@every_codec
def test_rows_are_independent_on_cuda(codec):
    w = torch.randn(96, 320, device="cuda")
    whole, part = codec.encode(w), codec.encode(w[32:64])
    assert all(torch.equal(whole[k][32:64], part[k]) for k in whole)
    assert torch.equal(codec.decode(whole, 320)[32:64], codec.decode(part, 320))


@every_codec
def test_views_at_odd_offsets_decode_alike(codec):
    """ZeRO-3 and FSDP2 gather several parts into one buffer of bytes."""
    parts = codec.encode(torch.randn(8, 128, device="cuda"))
    shifted = {}
    for k, v in parts.items():
        buffer = torch.empty(v.numel() + 3, dtype=v.dtype, device="cuda")
        buffer[3:].copy_(v.flatten())
        shifted[k] = buffer[3:].view(v.shape)
    assert torch.equal(codec.decode(shifted, 128), codec.decode(parts, 128))


@every_codec
def test_the_fused_linear_over_codes_equals_the_dense_one(codec):
    torch.manual_seed(0)
    m, n, r = 96, 128, 4
    parts = codec.encode(torch.randn(m, n, device="cuda") / n**0.5)
    w = codec.decode(parts, n)
    a, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((r, n), (m, r)))
    x = torch.randn(5, n, device="cuda", dtype=codec.dtype, requires_grad=True)
    y = adapter_linear(
        x,
        tuple(parts.values()),
        decode=lambda *found: codec.decode(dict(zip(parts, found, strict=True)), n),
        products=[Product(a, b)],
        scale=0.5,
    )
    wanted = x @ w.T + 0.5 * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    tolerance = 2**-6 if codec.dtype == torch.bfloat16 else 1e-5
    assert (y - wanted).norm() <= tolerance * wanted.norm()
    for one, two in zip(
        torch.autograd.grad(y.sum(), (x, a, b)), torch.autograd.grad(wanted.sum(), (x, a, b)), strict=True
    ):
        assert (one - two).norm() <= tolerance * two.norm()


@pytest.mark.parametrize("codec", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero3_offload", "fsdp", "fsdp_offload"])
def test_the_demo_trains_on_every_gpu(engine, codec, tmp_path):
    """NCCL on packed bytes, pinned transfers; the run compares the gathered bytes of a coded weight itself before it
    trains.
    """
    sharding = {
        "fsdp": ["--engine", "fsdp"],
        "fsdp_offload": ["--engine", "fsdp", "--fsdp.cpu_offload", "true"],
    }.get(engine, ["--deepspeed", f"ds_configs/{engine}.json"])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={GPUS}",
        str(ROOT / "launch/train.py"),
    ]
    settings = (
        f"--codec {codec} --dtype bfloat16 --max_steps 12 --save_merged false --output_dir {tmp_path / 'out'}".split()
    )
    done = subprocess.run(
        [*command, *sharding, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


def test_batches_made_ahead_are_pinned_and_arrive_whole():
    device = torch.device("cuda", GPUS - 1)
    examples = [Example(list(range(k, k + 50)), list(range(k, k + 50))) for k in range(64)]
    batches = Batches(examples, 4, pad_id=0, pack=200)
    with Ahead(batches, 8, device) as ahead:
        for t in range(8):
            (micro,), (wanted,) = ahead.step(t), batches.step(t)
            assert micro.input_ids.is_pinned() and micro.labels.is_pinned() and micro.position_ids.is_pinned()
            found = micro.inputs(device)
            assert {name: tensor.cpu().tolist() for name, tensor in found.items()} == {
                name: tensor.tolist() for name, tensor in wanted.inputs(torch.device("cpu")).items()
            }
