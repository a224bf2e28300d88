# SPDX-License-Identifier: MIT
"""Draws the polarization weights of one patch beside its backscatter.

python -m analysis.weight_map --vh PATCH_VH.tif --vv PATCH_VV.tif --output weights.png
python -m analysis.weight_map --simulate 7 --landscape coast --output weights.png
"""

import torch
import torch.nn.functional as F

from analysis.figures import PAGE, bare_image, image_grid, write_figure
from analysis.programs import add_picture_flag
from batch_preparation import BatchPreparation
from common.command_line import Parser, count
from common.errors import DataError
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.geotiff import read_band
from sarwmix.simulate.landcover import LANDSCAPES
from sarwmix.simulate.patches import simulate_scene
from sarwmix.weighting import compute_weights
from util.quicklook import RANGES, grey

TOKEN = 32
CLIP = 99.0
LEFT, RIGHT, HEAD = 0.32, 0.84, 0.3  # margins for the channels, the colour bar and titles; inches


def draw_weights(sar_db):
    """A Figure of backscatter, weights, and weights clipped at the 99th percentile, VH above VV.

    sar_db: (2, H, W) dB, order VH, VV. It is resized to 128; pixels without data get the mean of the channel.
    """
    prepare = BatchPreparation(128, BigEarthNetv2.MEAN, BigEarthNetv2.STD)
    sar_db = prepare.resize(prepare.fill(sar_db[None]))
    kinds = {
        "weights, default": compute_weights(sar_db)[0],
        f"weights, --weight_clip {CLIP:g}": compute_weights(sar_db, clip=CLIP)[0],
    }
    figure, axes = image_grid(2, 1 + len(kinds), HEAD, LEFT, RIGHT)
    for row, channel in enumerate(BigEarthNetv2.CHANNELS):
        first, *others = axes[row]
        bare_image(first, grey(sar_db[0, row].numpy(), channel), "" if row else "backscatter σ⁰")
        add_note(first, "{:g} … {:g} dB".format(*RANGES[channel]).replace("-", "−"))
        first.set_ylabel(channel, fontsize=11, weight="bold")
        for axis, (title, weights) in zip(others, kinds.items()):
            scale = {"cmap": "viridis", "vmin": 1, "vmax": torch.e}
            image = bare_image(axis, weights[row].numpy(), "" if row else title, **scale)
            tokens = F.avg_pool2d(weights[None], TOKEN)[0, row]
            parts = (("pixels", weights[row]), ("means of tokens", tokens))
            add_note(axis, "\n".join(f"{name} {values.min():.2f} … {values.max():.2f}" for name, values in parts))
    place = figure.add_axes(((PAGE - RIGHT + 0.22) / PAGE, 0.1, 0.02, 0.75))
    bar = figure.colorbar(image, cax=place)
    bar.set_ticks([1, 1.5, 2, 2.5, torch.e], labels=["1", "1.5", "2", "2.5", "e"], fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.set_title("weight", fontsize=9)
    return figure


def add_note(axis, text):
    """Writes text on the lower left of an image."""
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 2}
    axis.text(0.03, 0.04, text, transform=axis.transAxes, fontsize=8, color="white", bbox=box)


def read_patch(vh, vv):
    """The patch (2, H, W) in dB from the files of its two channels. Raises DataError."""
    files = {"VH": vh, "VV": vv}
    channels = [torch.from_numpy(read_band(path, band=band, integers=False)) for band, path in files.items()]
    if channels[0].shape != channels[1].shape:
        sides = ["×".join(map(str, channel.shape)) for channel in channels]
        raise DataError(f"--vv {vv}: has {sides[1]} pixels, and --vh {sides[0]}; give both channels of one patch")
    return torch.stack(channels)


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.weight_map")
    parser.add_argument("--vh", metavar="TIF", help="VH channel of a patch, dB")
    parser.add_argument("--vv", metavar="TIF", help="VV channel of the same patch, dB")
    parser.add_argument("--simulate", type=count, metavar="SEED", help="simulate a patch instead, with this seed")
    parser.add_argument("--landscape", choices=tuple(LANDSCAPES), default="coast", help="of the simulated patch")
    add_picture_flag(parser)
    args = parser.parse_args(argv)
    if [args.vh is None, args.vv is None, args.simulate is None] not in ([False, False, True], [True, True, False]):
        parser.error("give either --vh and --vv, or --simulate")
    with parser.input_errors():
        if args.simulate is None:
            sar_db = read_patch(args.vh, args.vv)
        else:
            sar_db = torch.from_numpy(simulate_scene(args.simulate, 1, 1, size=128, landscape=args.landscape)[0])
        write_figure(draw_weights(sar_db), args.output)


if __name__ == "__main__":
    main()
