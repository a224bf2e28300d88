# SPDX-License-Identifier: MIT
"""Draws the overview of the method: mixing, encoder, decoder and weighted loss on two simulated scenes.

    python -m analysis.overview_figure --checkpoint output/pretrain_simulated/checkpoint.pth --output overview.png

The predictions are those of the checkpoint.
"""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from analysis.figures import GREEN, VERMILION, write_figure
from analysis.programs import add_picture_flag
from batch_preparation import PretrainingPreparation
from common.command_line import Parser
from common.errors import UsageError
from engine_pretrain import reconstruct
from models_mixmim import SIZES, size_of
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.simulate.patches import simulate_scene
from sarwmix.weighting import compute_weights
from util.checkpoint import initialise
from util.checkpoint_input import LoadedCheckpoint
from util.quicklook import grey

SCENES = ((36, "coast"), (33, "lakeland"))  # seed and landscape of the two images
COLOURS = (VERMILION, GREEN)  # of the two images
MASK = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0]]).view(1, 16, 1).float()
PIXELS = 128  # height and width of an image
WIDTH, HEIGHT, SIDE = 13.0, 5.0, 1.55  # inches


class Canvas:
    """A figure whose coordinates are inches from its lower left corner."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=130, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axis = self.figure.add_axes([0, 0, 1, 1])
        self.axis.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axis.axis("off")

    def image(self, x, y, pixels, title, colour="black", owner=None, **options):
        """Draws an image with its lower left corner at (x, y). owner: (4, 4), which image each cell comes from."""
        self.axis.imshow(pixels, extent=(x, x + SIDE, y, y + SIDE), interpolation="nearest", zorder=2, **options)
        self.axis.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor=colour, linewidth=2, zorder=4))
        if owner is not None:
            cell = SIDE / 4
            for row, column in np.ndindex(4, 4):
                corner = x + column * cell + 0.015, y + SIDE - (row + 1) * cell + 0.015
                style = {"fill": False, "edgecolor": COLOURS[owner[row, column]], "linewidth": 1.4, "zorder": 3}
                self.axis.add_patch(Rectangle(corner, cell - 0.03, cell - 0.03, **style))
        self.axis.text(x + SIDE / 2, y + SIDE + 0.07, title, ha="center", va="bottom", fontsize=9)

    def box(self, x, y, width, height, text, colour):
        style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "facecolor": colour, "edgecolor": "0.35"}
        self.axis.add_patch(FancyBboxPatch((x, y), width, height, **style, zorder=2))
        style = {"ha": "center", "va": "center", "fontsize": 9, "linespacing": 1.5}
        self.axis.text(x + width / 2, y + height / 2, text, **style, zorder=3)

    def arrow(self, start, end, colour="0.35"):
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.4, "color": colour, "zorder": 1}
        self.axis.add_patch(FancyArrowPatch(start, end, **style))


def draw_overview(images, result):
    """The overview as a Figure.

    images: (2, 2, 128, 128) dB, order VH, VV. result: of `engine_pretrain.reconstruct` with MASK.
    """
    canvas, owner = Canvas(), MASK.view(4, 4).int().numpy()
    high, low, middle = 2.85, 0.45, 1.65
    cells = MASK.view(4, 4).bool().repeat_interleave(32, 0).repeat_interleave(32, 1)
    mixed = torch.where(cells, images[1, 1], images[0, 1])
    for i, y in ((0, high), (1, low)):
        canvas.image(0.15, y, grey(images[i, 1], "VV"), f"image {'AB'[i]}: VV (and VH), dB", COLOURS[i])
        canvas.arrow((0.2 + SIDE, y + SIDE / 2), (2.25, middle + SIDE / 2), COLOURS[i])
    canvas.image(2.3, middle, grey(mixed, "VV"), "mixed input", owner=owner)
    canvas.axis.text(
        2.3 + SIDE / 2,
        middle - 0.1,
        "random mask over 4×4 cells,\nthe same for the batch",
        ha="center",
        va="top",
        fontsize=7.5,
        color="0.3",
    )
    canvas.arrow((2.35 + SIDE, middle + SIDE / 2), (4.25, middle + SIDE / 2))
    canvas.box(
        4.3,
        middle - 0.25,
        1.75,
        SIDE + 0.5,
        "MixMIM encoder\n4 stages, windows\nof 8×8, 8×8, 8×8, 4×4\n\na token attends only\nto tokens of its\nown image",
        "#e8eef7",
    )
    for i, y in ((0, high), (1, low)):
        canvas.arrow((6.1, middle + SIDE / 2), (6.65, y + SIDE / 2), COLOURS[i])
        canvas.box(6.7, y + 0.2, 1.45, SIDE - 0.4, f"decoder\ntokens of {'AB'[i]},\nmask tokens\nelsewhere", "#f3ece2")
        canvas.arrow((8.2, y + SIDE / 2), (8.6, y + SIDE / 2), COLOURS[i])
        canvas.image(8.65, y, grey(result["predicted"][i, 1], "VV"), f"prediction of {'AB'[i]}", COLOURS[i])
        weights = compute_weights(images[i], clip=99.0)[1].numpy()
        canvas.arrow((8.7 + SIDE, y + SIDE / 2), (11.15, y + SIDE / 2), COLOURS[i])
        canvas.axis.text(10.68, y + SIDE / 2 + 0.08, "weighted\nby", ha="center", va="bottom", fontsize=8)
        canvas.image(11.2, y, weights, f"weights of {'AB'[i]}, VV*", COLOURS[i], cmap="viridis", vmin=1, vmax=torch.e)
    canvas.axis.text(
        WIDTH / 2,
        0.08,
        "loss = mean of W·(prediction − image)²,   W = token mean of w = exp(1 − x̃),   x̃ = linear backscatter scaled to "
        "[0, 1] per image and channel: dark surfaces weigh up to e, the brightest target 1",
        ha="center",
        fontsize=9,
    )
    canvas.axis.text(
        11.2 + SIDE / 2, low - 0.06, "* drawn with --weight_clip 99", ha="center", va="top", fontsize=7, color="0.3"
    )
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
