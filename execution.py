# SPDX-License-Identifier: MIT
"""How a model is executed: kernels of attention, gradient checkpointing, compilation, dtype of the residual stream.

These choices change time and memory; results differ in rounding only.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def attention_variants(device_type):
    """The implementations of `attend`, the default of a device type ("cpu", "cuda") first.

    "fused" is PyTorch's scaled_dot_product_attention. "plain" is a product, a softmax and a product, which
    torch.compile fuses with the operations around them. "plain" is faster in training on a CPU: no fused CPU kernel
    computes the gradient of a learned bias, and sequences of 16 to 64 tokens are too short for the others.
    """
    return ("plain", "fused") if device_type == "cpu" else ("fused", "plain")


def attend(q, k, v, bias=None, variant=None):
    """softmax(q kᵀ/√d + bias) v (1706.03762, eq. 1). q, k, v: (…, n, d). bias: broadcast to (…, n, n), or None.

    variant: one of `attention_variants`, which differ in rounding only; None selects the default of the device.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if (variant or attention_variants(q.device.type)[0]) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


class Blocks(nn.ModuleList):
    """Consecutive blocks on the same tokens; the unit that torch.compile turns into one graph.

    grad_checkpointing: keep only the input of each block, and recompute the block in the backward pass (1604.06174).
    """

    grad_checkpointing = False

    def forward(self, x, bias_index=None, same_image=None):
        for block in self:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias_index, same_image, use_reentrant=False)
            else:
                x = block(x, bias_index, same_image)
        return x


def as_autocast(x):
    """Casts x to the dtype of autocast, if autocast is enabled.

    The position embeddings are added in float32. Without the cast, the residual stream x + f(x) after them would stay
    in float32, as autocast does not cast sums; after a patch merging, whose last layer is linear, it has autocast's
    dtype.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Executable(nn.Module):
    """A model whose execution can be changed. It consists of `Blocks`, and of modules with a `variant` of attention."""

    @property
    def attention_variants(self):
        """The values of `attention` in `execute_with`, the default of the model's device first."""
        return attention_variants(next(self.parameters()).device.type)

    def execute_with(self, grad_checkpointing=False, compile_mode=None, attention=None):
        """Sets how the model is executed; replaces what an earlier call has set. Results differ in rounding only.

        grad_checkpointing: see `Blocks`. compile_mode: of torch.compile; None is eager execution. attention: one of
        `attention_variants`; None is the default.
        """
        for module in self.modules():
            if hasattr(module, "variant"):
                module.variant = attention
            if isinstance(module, Blocks):
                module.grad_checkpointing = grad_checkpointing
                module._compiled_call_impl = None  # undoes nn.Module.compile
                if compile_mode is not None:
                    module.compile(mode=compile_mode, dynamic=False)
        if compile_mode is not None:
            # All Blocks share one code object, compiled for each stage, for training and for evaluation. DDP need not
            # split the graphs, as every stage is a graph of its own, and it cannot split one that recomputes.
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.optimize_ddp = False
