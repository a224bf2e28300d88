# SPDX-License-Identifier: MIT
"""Draws the polarization weights of one patch beside its backscatter.

python -m analysis.weight_map --vh PATCH_VH.tif --vv PATCH_VV.tif --output weights.png
python -m analysis.weight_map --simulate 7 --landscape coast --output weights.png
"""

import torch
import torch.nn.functional as F

from analysis.figures import write_figure
from analysis.programs import add_picture_flag
from batch_preparation import BatchPreparation
from common.command_line import Parser, count
from common.errors import DataError
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.geotiff import read_band
from sarwmix.simulate.landcover import LANDSCAPES
from sarwmix.simulate.patches import simulate_scene
from sarwmix.weighting import compute_weights
from util.quicklook import RANGES, grey, new_figure

TOKEN = 32
CLIP = 99.0


def draw_weights(sar_db):
    """A Figure of σ⁰, pixel weights, token weights, and pixel weights clipped at the 99th percentile, of both channels.

    sar_db: (2, H, W) dB, order VH, VV. It is resized to 128; pixels without data get the mean of the channel.
    """
    prepare = BatchPreparation(128, BigEarthNetv2.MEAN, BigEarthNetv2.STD)
    sar_db = prepare.resize(prepare.fill(sar_db[None]))
    weights, clipped = compute_weights(sar_db)[0], compute_weights(sar_db, clip=CLIP)[0]
    tokens = F.avg_pool2d(weights, TOKEN).repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2)
    titles = ("σ⁰", "pixel weight w", "token weight W\n(the default loss)", f"pixel weight,\n--weight_clip {CLIP:g}")
    figure, axes = new_figure(2, 4, cell=2.2, left=0.3, top=0.5, right=0.85)
    for row, c in ((0, 1), (1, 0)):
        channel = BigEarthNetv2.CHANNELS[c]
        axes[row, 0].imshow(grey(sar_db[0, c].numpy(), channel), interpolation="nearest")
        axes[row, 0].set_ylabel(channel, fontsize=11, weight="bold")
        notes = ["{:g} … {:g} dB".format(*RANGES[channel])]
        for axis, values in zip(axes[row, 1:], (weights[c], tokens[c], clipped[c])):
            image = axis.imshow(values.numpy(), cmap="viridis", vmin=1, vmax=torch.e, interpolation="nearest")
            notes.append(f"{values.min():.2f} … {values.max():.2f}, mean {values.mean():.2f}")
        for axis, note in zip(axes[row], notes):
            box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 1.5}
            text = note.replace("-", "−")
            axis.text(0.03, 0.04, text, transform=axis.transAxes, fontsize=7, color="white", bbox=box)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    place = figure.add_axes([1 - 0.72 / figure.get_figwidth(), 0.1, 0.018, 0.7])
    bar = figure.colorbar(image, cax=place, label="weight")
    bar.set_ticks([1, 1.5, 2, 2.5, torch.e], labels=["1", "1.5", "2", "2.5", "e"])
    return figure


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
