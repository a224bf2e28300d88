# SPDX-License-Identifier: MIT
"""The GPU memory that a training step takes, estimated from measurements. Imports only the standard library."""

import math
from typing import NamedTuple


class StepMemory(NamedTuple):
    """What a training step in 16 bits takes, measured with benchmarks.memory (docs/PERFORMANCE.md).

    parameters: millions. kept, kept_checkpointing: MB kept for an image from forward to backward, without and with
    --grad_checkpointing. block: MB within the block that keeps most.
    """

    parameters: float
    kept: float
    kept_checkpointing: float
    block: float


STEP_MEMORY = {
    "mixmim_tiny": StepMemory(2.7, 5.0, 1.0, 2.0),
    "mixmim_base": StepMemory(113.7, 42.7, 3.8, 4.7),
    "mixmim_large": StepMemory(222.3, 61.7, 5.5, 7.1),
    "mixmim_huge": StepMemory(683.0, 109.2, 9.5, 13.0),
}
MEASURED_SIZE = 128  # of the images of that table, pixels a side
PARAMETER_BYTES = 18  # weight, gradient and two moments in float32, and the weight in 16 bits
# The estimate is multiplied by MARGIN, and RESERVE is added, for what is not counted: workspaces, fragmentation, NCCL.
MARGIN = 4 / 3
RESERVE = 2e9  # bytes


def step_bytes(config, images_per_sample=1):
    """Estimated bytes of a training step with this configuration, with a margin."""
    memory = STEP_MEMORY[config.model]
    kept = memory.kept_checkpointing + memory.block if config.grad_checkpointing else memory.kept
    each = kept * 1e6 * (2 if config.amp == "off" else 1)
    images = config.batch_size * images_per_sample * (config.input_size / MEASURED_SIZE) ** 2
    return int(MARGIN * (memory.parameters * 1e6 * PARAMETER_BYTES + images * each) + RESERVE)


def fits(model, images, gpu_mb):
    """Whether a micro-batch of `images` images of 128 × 128 takes at most three quarters of a GPU with gpu_mb MB.

    The figures are rounded, with a least value, so that the recipes keep the batches they were published with here.
    """
    memory = STEP_MEMORY[model]
    per_image = max(10, math.ceil(memory.kept))
    weights = max(100, float(f"{16 * memory.parameters:.2g}"))  # weight, gradient and two moments, two digits
    return 4 * (weights + images * per_image) <= 3 * gpu_mb
