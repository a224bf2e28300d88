# SPDX-License-Identifier: MIT
"""A model and the preparation of its input as one program of torch.export, which PyTorch runs without this project.

logits = torch.export.load("model.pt2").module()(sar_db)      # sar_db (B, 2, h, w), dB, order VH, VV
"""

import io

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import TrainingError, reason_of
from token_layout import Order, StageLayout, stage_layouts
from util.export import Program

EXAMPLE = (2, 2, 40, 48)  # of the images the program is traced with; B, h and w stay free


class FixedLayouts(nn.Module):
    """The layouts of whole images, for `MixMIMEncoder.layouts`: buffers, so that they move to a GPU with the program.

    encoder: the MixMIMEncoder.
    """

    def __init__(self, encoder):
        super().__init__()
        layouts, to_raster = stage_layouts([(grid, grid) for grid in encoder.grids], encoder.windows)
        self.stages = len(layouts)
        for k, (layout, order) in enumerate(zip(layouts, to_raster)):
            self.register_buffer(f"entry_{k}", layout.entry.index)
            self.register_buffer(f"position_{k}", layout.position)
            self.register_buffer(f"to_raster_{k}", order.index)

    def forward(self, mask, size, device):
        """(list of StageLayout, list of Order to raster order), on the device of the buffers.

        Without inverses, which only a backward pass needs.
        """
        entry, position, to_raster = (
            [getattr(self, f"{name}_{k}") for k in range(self.stages)] for name in ("entry", "position", "to_raster")
        )
        layouts = [StageLayout(Order(index, None), place, None) for index, place in zip(entry, position)]
        return layouts, [Order(index, None) for index in to_raster]


class PreparedModel(nn.Module):
    """dB images → the model's outputs, in evaluation mode.

    model: a classifier on the CPU, which is changed and of no other use afterwards. prepare: its BatchPreparation.
    features: whether the outputs are those of `forward_features`, and not logits.
    """

    def __init__(self, model, prepare, features):
        super().__init__()
        self.size = (prepare.input_size, prepare.input_size) if prepare.RESIZES else None
        self.register_buffer("mean", prepare.mean)
        self.register_buffer("std", prepare.std)
        self.model, self.layouts = model, FixedLayouts(model)
        model.layouts = self.layouts.forward
        model.execute_with(attention="fused")  # one operation, for which each device has kernels
        if features:
            model.head = nn.Identity()
        self.eval().requires_grad_(False)

    def prepare(self, sar_db):
        """What BatchPreparation does in evaluation, without its check: (B, 2, h, w), dB → (B, 2, S, S), standardised.

        Always antialiased, as a choice by size would fix the size: along an axis that does not shrink, this is plain
        bilinear interpolation, and differs in rounding only. For segmentation, h and w are S, and nothing is resized.
        """
        sar_db = sar_db.float()
        filled = torch.where(sar_db.isfinite(), sar_db, self.mean)
        if self.size is not None:
            filled = F.interpolate(filled, size=self.size, mode="bilinear", align_corners=False, antialias=True)
        return (filled - self.mean) / self.std

    def forward(self, *images):
        """One tensor (B, 2, h, w), or the two of a pair → logits (B, K), or features (B, C₄)."""
        return self.model(*[self.prepare(image) for image in images])


def build_program(model, prepare, task, features):
    """The Program of a model, with B free and, but for segmentation, h and w. Arguments as of PreparedModel; task:
    `pretrained.Task`.

    Raises TrainingError if PyTorch cannot export the model.
    """
    axes, shape = {0: torch.export.Dim("batch")}, (*EXAMPLE[:2], prepare.input_size, prepare.input_size)
    if prepare.RESIZES:
        axes |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        shape = EXAMPLE
    images = tuple(torch.zeros(shape) for _ in range(task.images_per_sample))
    content = io.BytesIO()  # and not a file: where the disk is full, PyTorch's writer would end the process
    try:
        prepared = PreparedModel(model, prepare, features)
        exported = torch.export.export(prepared, images, dynamic_shapes=(tuple(axes for _ in images),))
        _release(exported)
        torch.export.save(exported, content)
    except MemoryError:
        raise
    except Exception as error:  # of any kind
        raise TrainingError(
            f"--export: PyTorch {torch.__version__} cannot make a program of this model ({type(error).__name__}: "
            f"{reason_of(error)[:160]}); nothing was written. Try another PyTorch that INSTALL.md names"
        ) from error
    activation = None if features else getattr(task.activate, "func", task.activate).__name__
    return Program(content.getbuffer(), len(images), activation)


def _release(exported):
    """Frees a program from this machine: from assertions of the device, and from the paths of the source files."""
    for node in list(exported.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            exported.graph.erase_node(node)
        node.meta.pop("stack_trace", None)
    exported.graph_module.recompile()
