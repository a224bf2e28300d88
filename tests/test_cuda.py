# SPDX-License-Identifier: MIT
"""What only a GPU can show. Skipped where there is none."""
import pytest
import torch

from models_mixmim import mixmim_tiny
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.preparation import BatchPreparation
from util.steps import autocast, optimizer_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def build(device):
    torch.backends.cuda.enable_cudnn_sdp(False)      # as in training
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
@pytest.mark.parametrize("execution", [{}, {"grad_checkpointing": True}, {"compile_mode": "default"}])
def test_a_gpu_computes_what_the_cpu_computes(amp, tolerance, execution):
    loss, gradients = loss_and_gradients(CPU, "off")
    found, found_gradients = loss_and_gradients(GPU, amp, **execution)
    assert found == pytest.approx(loss, rel=tolerance)
    assert (found_gradients - gradients).norm() < tolerance * gradients.norm()


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
