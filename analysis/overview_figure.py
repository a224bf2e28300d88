# SPDX-License-Identifier: MIT
"""Draws the overview of the method: mixing, encoder, decoder and weighted loss on two simulated scenes.

    python -m analysis.overview_figure --checkpoint output/pretrain_simulated/checkpoint.pth --output overview.png

The predictions are those of the checkpoint.
"""

import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from analysis.figures import BLUE, ORANGE, PAGE, page_figure, write_figure
from analysis.programs import add_picture_flag
from batch_preparation import PretrainingPreparation
from common.command_line import Parser
from common.errors import UsageError
from engine_pretrain import reconstruct
from models_mixmim import SIZES, STRIDE, size_of
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.simulate.patches import simulate_scene
from sarwmix.weighting import compute_weights
from util.checkpoint import initialise
from util.checkpoint_input import LoadedCheckpoint
from util.quicklook import grey

SCENES = ((36, "coast"), (33, "lakeland"))  # seed and landscape of the two images
COLOURS = (ORANGE, BLUE)  # of the two images
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]).view(1, 16, 1).float()
PIXELS = 128  # height and width of an image
HEIGHT, SIDE = 4.45, 1.0  # of the figure and of an image, inches
CLIP = 99.0  # of the weights, so that they can be seen
CELL = SIDE / 4


class Canvas:
    """A figure whose coordinates are inches from its lower left corner."""

    def __init__(self):
        self.figure = page_figure(HEIGHT)
        self.axis = self.figure.add_axes([0, 0, 1, 1])
        self.axis.set(xlim=(0, PAGE), ylim=(0, HEIGHT))
        self.axis.axis("off")

    def image(self, x, y, pixels, title, colour="0.3", **options):
        """Draws an image with its lower left corner at (x, y), and its title above."""
        self.axis.imshow(pixels, extent=(x, x + SIDE, y, y + SIDE), interpolation="nearest", zorder=2, **options)
        self.axis.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor=colour, linewidth=1.8, zorder=4))
        self.text(x + SIDE / 2, y + SIDE + 0.06, title, va="bottom")

    def cells(self, x, y, owner):
        """Frames the cells of an image. owner: (4, 4), which image each cell comes from."""
        for row, column in np.ndindex(4, 4):
            corner = x + column * CELL + 0.012, y + SIDE - (row + 1) * CELL + 0.012
            style = {"fill": False, "edgecolor": COLOURS[owner[row, column]], "linewidth": 1.3, "zorder": 5}
            self.axis.add_patch(Rectangle(corner, CELL - 0.024, CELL - 0.024, **style))

    def box(self, x, y, width, height, text, colour):
        style = {"boxstyle": "round,pad=0,rounding_size=0.07", "facecolor": colour, "edgecolor": "0.4"}
        self.axis.add_patch(FancyBboxPatch((x, y), width, height, **style, zorder=2))
        self.text(x + width / 2, y + height / 2, text, va="center", linespacing=1.5)

    def text(self, x, y, text, **style):
        self.axis.text(x, y, text, **{"ha": "center", "fontsize": 9, "zorder": 6, **style})

    def arrow(self, points, colour="0.3"):
        """Draws straight lines through the points, with a head at the last."""
        style = {"linewidth": 1.5, "color": colour, "zorder": 1}
        self.axis.plot(*zip(*points[:-1]), solid_joinstyle="miter", **style)
        head = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
        self.axis.add_patch(FancyArrowPatch(points[-2], points[-1], **head, **style))


def draw_overview(images, result):
    """The overview as a Figure.

    images: (2, 2, 128, 128) dB, order VH, VV; VH is shown. result: of `engine_pretrain.reconstruct` with MASK.
    """
    canvas, owner = Canvas(), MASK.view(4, 4).int().numpy()
    cells = MASK.view(4, 4).bool().repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)
    mixed = torch.where(cells, images[1, 0], images[0, 0])
    one, other = COLOURS
    top, middle, low = 2.75, 1.4, 0.1  # lower edges of the rows of images
    left, mixing, right, end = 0.1, 1.5, 5.05, 6.75  # left edges of the columns
    half = SIDE / 2
    centre = middle + half
    canvas.image(left, top, grey(images[0, 0], "VH"), "image A", one)
    canvas.image(left, low, grey(images[1, 0], "VH"), "image B", other)
    canvas.image(mixing, middle, grey(mixed, "VH"), "mixed")
    canvas.cells(mixing, middle, owner)
    for y, colour, bend in ((top, one, centre + 0.12), (low, other, centre - 0.12)):
        start = (left + 0.35, y if y > middle else y + SIDE + 0.27)
        canvas.arrow([start, (left + 0.35, bend), (mixing - 0.03, bend)], colour)
    canvas.arrow([(mixing + SIDE, centre), (2.85, centre)])
    canvas.box(2.85, middle, 0.85, SIDE, "encoder", "#e8eef7")
    canvas.arrow([(3.7, centre), (3.95, centre)])
    canvas.box(3.95, middle, 0.85, SIDE, "decoder", "#f3ece2")
    canvas.arrow([(4.8, centre), (right - 0.03, centre)], one)
    canvas.arrow([(4.375, middle), (4.375, low + half), (right - 0.03, low + half)], other)
    canvas.image(right, middle, grey(result["predicted"][0, 0], "VH"), "prediction of A", one)
    canvas.image(right, low, grey(result["predicted"][1, 0], "VH"), "prediction of B", other)
    weights = compute_weights(images[0], clip=CLIP)[0].numpy()
    canvas.image(right, top, weights, "weights of A, 1 … e", one, cmap="viridis", vmin=1, vmax=torch.e)
    canvas.arrow([(left + SIDE, top + half), (right - 0.03, top + half)], one)
    canvas.text((left + SIDE + right) / 2, top + half + 0.08, "backscatter → weights", va="bottom")
    canvas.text((left + SIDE + right) / 2, top + half - 0.1, "w = exp(1 − x),  x: linear, scaled to 0 … 1", va="top")
    # Loss.
    canvas.box(end, middle, 1.15, top + SIDE - middle, "loss of A\n\nmean of\nw · (prediction\n− target)²", "#f2f2f2")
    canvas.box(end, low, 1.15, SIDE, "loss of B,\nin the same way", "#f2f2f2")
    for y, colour in ((top, one), (middle, one), (low, other)):
        canvas.arrow([(right + SIDE, y + half), (end, y + half)], colour)
    roof = top + SIDE + 0.38
    canvas.arrow(
        [(left + half, top + SIDE + 0.25), (left + half, roof), (end + 0.575, roof), (end + 0.575, top + SIDE)], one
    )
    canvas.text((left + end) / 2, roof + 0.05, "target: image A", va="bottom")
    return canvas.figure


def load_model(path):
    """(model, preparation) of a pretraining checkpoint. Raises UsageError.

    A checkpoint that does not state its input gets the statistics of BigEarthNet v2.
    """
    checkpoint = LoadedCheckpoint.load(path, size_of)
    stated = {
        "model": "mixmim_base",
        "input_size": PIXELS,
        "norm_pix_loss": False,
        "mean": BigEarthNetv2.MEAN,
        "std": BigEarthNetv2.STD,
        **checkpoint.stated(),
    }
    if stated["model"] not in SIZES or stated["input_size"] != PIXELS:
        raise UsageError(
            f"{path}: is a {stated['model']} of input size {stated['input_size']}; name a model pretrained with "
            f"main_pretrain.py and input size {PIXELS}"
        )
    model = SIZES[stated["model"]](norm_pix_loss=stated["norm_pix_loss"])
    initialise(model, checkpoint.state, path)
    return model, PretrainingPreparation(PIXELS, stated["mean"], stated["std"])


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.overview_figure")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a pretrained model of input size 128")
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    with parser.input_errors():
        model, prepare = load_model(args.checkpoint)
        scenes = [simulate_scene(seed, 1, 1, size=PIXELS, landscape=landscape)[0] for seed, landscape in SCENES]
        images = torch.from_numpy(np.stack(scenes))
        write_figure(draw_overview(images, reconstruct(model, prepare, images, MASK)), args.output)


if __name__ == "__main__":
    main()
