# SPDX-License-Identifier: MIT
"""What only a GPU can show. Skipped where there is none."""

import json
from functools import partial

import pytest
import torch

import main_pretrain
import models_mixmim_seg
from batch_preparation import BatchPreparation, PixelPreparation
from benchmarks.random_store import write_random_store
from engine_segment import pixel_loss, probabilities
from models_mixmim import mixmim_tiny
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.listing import IGNORED
from tests.helpers.runs import log_of
from util.optimization import autocast, optimizer_step
from util.sliding import Windows, blended

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def build(device):
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
    torch.manual_seed(0)
    return mixmim_tiny(norm_pix_loss=True).to(device)


def half_mask(model, seed):
    return model.draw_mask(0.5, torch.Generator().manual_seed(seed))


def loss_and_gradients(device, amp, **execution):
    model = build(device)
    model.execute_with(**execution)
    x, weights = torch.randn(8, 2, 128, 128, generator=torch.Generator().manual_seed(1)), torch.ones(8, 2, 128, 128)
    with autocast(device, amp):
        loss = model(x.to(device), weights.to(device), mask=half_mask(model, 2))[0]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("amp, tolerance", [("off", 1e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
@pytest.mark.parametrize(
    "execution", [{}, {"grad_checkpointing": True}, {"compile_mode": "default"}, {"attention": "plain"}]
)
def test_a_gpu_computes_what_the_cpu_computes(amp, tolerance, execution):
    loss, gradients = loss_and_gradients(CPU, "off")
    found, found_gradients = loss_and_gradients(GPU, amp, **execution)
    assert found == pytest.approx(loss, rel=tolerance)
    assert (found_gradients - gradients).norm() < tolerance * gradients.norm()


def test_evaluation_waits_for_its_first_batch_only():
    """That batch is read back, to see that it is dB."""
    prepare = BatchPreparation(128, BigEarthNetv2.MEAN, BigEarthNetv2.STD).to(GPU)
    images = torch.randn(8, 2, 120, 120, device=GPU) - 15
    for _ in range(2):
        with pytest.raises(ValueError, match="never negative"):
            prepare(10 ** (images / 10))
    prepare(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepare(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp, tolerance, compile_mode", [("off", 1e-3, None), ("bf16", 3e-2, "default")])
def test_fused_and_plain_attention_compute_the_same(amp, tolerance, compile_mode):
    fused = loss_and_gradients(GPU, amp, attention="fused")
    plain = loss_and_gradients(GPU, amp, attention="plain", compile_mode=compile_mode)
    assert fused[0] == pytest.approx(plain[0], rel=tolerance)
    assert (fused[1] - plain[1]).norm() < tolerance * plain[1].norm()


def test_without_flags_a_run_is_timed_compiled_and_eager_its_data_go_to_the_gpu_and_it_goes_on_as_it_chose(
    tmp_path, program
):
    write_random_store(tmp_path / "store", "benv2", {"train": 32, "val": 16})
    short = "--model mixmim_tiny --batch_size 8 --epochs 2 --warmup_epochs 0 --save_epochs 99 --resume auto"
    flags = ("--data_path", tmp_path / "store", "--output_dir", tmp_path / "run", short)
    status, out, err = program(main_pretrain, flags, "--stop_epoch 1")
    assert status == 0, err
    assert "--data_cache auto: the images of split train_val are on the GPU" in out and "is the fastest" in out
    first = json.loads((tmp_path / "run" / "run.json").read_text())["execution"]
    assert len(first["ms"]) == 4 and min(first["ms"], key=first["ms"].get).endswith(f"{first['attention']} attention")
    status, out, err = program(main_pretrain, flags)
    assert status == 0 and "as in the run that is continued" in out, err
    again = json.loads((tmp_path / "run" / "run.json").read_text())["execution"]
    assert again == {name: first[name] for name in ("compile", "attention")}
    assert [entry["epoch"] for entry in log_of(tmp_path / "run")] == [0, 1]


def test_no_step_waits_for_the_gpu():
    """Preparation, mask, forward, backward, norm and optimizer are all handed over without reading anything back."""
    model, prepare = build(GPU), BatchPreparation(128, BigEarthNetv2.MEAN, BigEarthNetv2.STD).to(GPU)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cuda", enabled=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    images, ids = torch.randn(8, 2, 120, 120, device=GPU) - 15, torch.arange(8, device=GPU)

    def step(number):
        x, weights = prepare(images, ids, 0)
        with autocast(GPU, "bf16"):
            loss = model(x, weights, mask=half_mask(model, number))[0]
        loss.backward()
        return optimizer_step(parameters, optimizer, scaler, 1.0)

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp, tolerance", [("off", 2e-3), ("bf16", 5e-2)])
def test_a_gpu_segments_as_the_cpu_does(amp, tolerance):
    torch.manual_seed(0)
    model = models_mixmim_seg.mixmim_tiny(img_size=64, num_classes=3).eval()
    prepare = PixelPreparation(64, BigEarthNetv2.MEAN, BigEarthNetv2.STD)
    image = torch.randn(2, 100, 150) * 5 - 15
    image[:, :10, :20] = torch.nan
    found = {}
    for device, precision in ((CPU, "off"), (GPU, amp)):
        predict = partial(probabilities, model.to(device), prepare.to(device), amp=precision)
        found[device] = blended(image.to(device), predict, Windows(64, 0.25, 4)).cpu()
    torch.testing.assert_close(found[GPU], found[CPU], atol=tolerance, rtol=0, equal_nan=True)


def test_crops_and_losses_of_masks_wait_for_nothing():
    prepare = PixelPreparation(64, BigEarthNetv2.MEAN, BigEarthNetv2.STD).to(GPU)
    images, masks = torch.randn(4, 2, 96, 96, device=GPU) - 15, torch.ones(4, 96, 96, dtype=torch.uint8, device=GPU)
    logits, ids = torch.randn(4, 3, 64, 64, device=GPU, requires_grad=True), torch.arange(4).to(GPU)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, cropped = prepare(images, masks, ids, 0)
        pixel_loss(logits, cropped, 1.0, IGNORED).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
