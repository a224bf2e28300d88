# SPDX-License-Identifier: MIT
"""Draw the polarization weights of one patch beside its backscatter.

    python -m analysis.weight_map --vh PATCH_VH.tif --vv PATCH_VV.tif --output weights.png
    python -m analysis.weight_map --simulate 7 --landscape coast --output weights.png
"""
import argparse

import torch
import torch.nn.functional as F

from sarwmix.errors import DataError
from sarwmix.preparation import BatchPreparation
from sarwmix.quicklook import grey, new_figure
from sarwmix.rasters import read_band
from sarwmix.simulate import simulate_scene
from sarwmix.simulate_landcover import LANDSCAPES
from sarwmix.weighting import compute_weights

TOKEN = 32
CLIP = 99.0


def draw_weights(sar_db):
    """σ⁰, pixel weights, token weights, and pixel weights clipped at the 99th percentile, of both channels.

    sar_db: (2, H, W) dB, order VH, VV; resized to 128. Returns a matplotlib Figure.
    """
    sar_db = BatchPreparation(128, (0.0, 0.0), (1.0, 1.0)).resize(sar_db[None])
    weights, clipped = compute_weights(sar_db)[0], compute_weights(sar_db, clip=CLIP)[0]
    tokens = F.avg_pool2d(weights, TOKEN).repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2)
    titles = ("σ⁰", "pixel weight w", "token weight W\n(the default loss)", f"pixel weight,\n--weight_clip {CLIP:g}")
    figure, axes = new_figure(2, 4, cell=2.2, left=0.3, top=0.5, right=0.8)
    for row, c in ((0, 1), (1, 0)):
        axes[row, 0].imshow(grey(sar_db[0, c].numpy(), ("VH", "VV")[c]), interpolation="nearest")
        axes[row, 0].set_ylabel(("VH", "VV")[c], fontsize=11, weight="bold")
        for axis, values in zip(axes[row, 1:], (weights[c], tokens[c], clipped[c])):
            image = axis.imshow(values.numpy(), cmap="viridis", vmin=1, vmax=torch.e, interpolation="nearest")
            axis.text(0.03, 0.04, f"{values.min():.2f} … {values.max():.2f}, mean {values.mean():.2f}", transform=axis.transAxes,
                      fontsize=7, color="white", bbox=dict(facecolor="black", alpha=0.6, linewidth=0, pad=1.5))
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    bar = figure.colorbar(image, cax=figure.add_axes([1 - 0.65 / figure.get_figwidth(), 0.1, 0.018, 0.7]))
    bar.set_ticks([1, 1.5, 2, 2.5, torch.e], labels=["1", "1.5", "2", "2.5", "e"])
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vh", metavar="TIF", help="VH of a patch, dB")
    parser.add_argument("--vv", metavar="TIF", help="VV of the same patch, dB")
    parser.add_argument("--simulate", type=int, metavar="SEED", help="a simulated patch instead")
    parser.add_argument("--landscape", choices=tuple(LANDSCAPES), default="coast", help="of the simulated patch")
    parser.add_argument("--output", required=True, metavar="PNG", help="picture to write")
    args = parser.parse_args()
    if (args.simulate is None) == (args.vh is None or args.vv is None):
        parser.error("give either --vh and --vv, or --simulate")
    try:
        if args.simulate is None:
            sar_db = torch.stack([torch.from_numpy(read_band(path)) for path in (args.vh, args.vv)])
        else:
            sar_db = torch.from_numpy(simulate_scene(args.simulate, 1, 1, size=128, landscape=args.landscape)[0])
    except DataError as error:
        parser.exit(2, f"weight_map: error: {error}\n")
    draw_weights(sar_db).savefig(args.output)


if __name__ == "__main__":
    main()
