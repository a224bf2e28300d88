# SPDX-License-Identifier: MIT
"""Draws a scene beside a map of it: features or classes, of its tiles or of its pixels, that main_finetune.py wrote.

    python -m analysis.scene_map scene.tif --units linear --map features.tif --output map.png

The scene is a false-colour composite (red VV, green VH, blue VV/VH). Three bands named "principal component" are shown
as red, green and blue. A band of whole numbers is a map of classes; of other bands, the class of a pixel is that of the
highest value. Maps of any size are drawn: they are read as coarsely as the picture needs.
"""

from pathlib import Path

from analysis.figures import write_figure
from analysis.programs import add_picture_flag
from common.command_line import Parser, Range
from common.errors import DataError
from sarwmix.geotiff import load_rasterio, opened_geotiff
from sarwmix.raster import Image, add_reading_flags, find_images, reading_of
from util.scene_pictures import draw_map, overview, read_map

PANEL, DOTS = 4.6, 150  # of the scene in the picture: longer side, inches, and pixels an inch
MOST_PIXELS = round(PANEL * DOTS)


def read_scene_map(path, flag, image, most):
    """The Map of a file, with sides of at most `most` pixels. Raises DataError if it is not of the scene."""
    with opened_geotiff(path) as file:
        found = read_map(file, most)
    if found.crs is not None and image.crs and load_rasterio().CRS.from_user_input(image.crs) != found.crs:
        raise DataError(f"{flag} {path}: has another coordinate system than the scene; give the map of this scene")
    return found


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.scene_map")
    parser.add_argument("scene", nargs="+", metavar="SCENE", help="the scene, in one file or two, as of sarwmix.tile")
    add_reading_flags(parser)
    parser.add_argument("--map", type=Path, required=True, metavar="FILE", help="GeoTIFF of main_finetune.py")
    add_picture_flag(parser)
    parser.add_argument(
        "--panel",
        type=Range(float, at_least=1, at_most=20),
        default=PANEL,
        metavar="INCHES",
        help=f"longer side of the scene in the picture, which has {DOTS} pixels an inch",
    )
    args = parser.parse_args(argv)
    most = round(args.panel * DOTS)
    with parser.input_errors():
        load_rasterio()
        images = find_images(args.scene)
        if len(images) > 1:
            raise DataError(f"{len(images)} scenes are given; give one, with its map")
        image = Image.find(*images[0], reading_of(args))
        found = read_scene_map(args.map, "--map", image, most)
        if (found.classes < 0).all():
            raise DataError(f"--map {args.map}: no pixel has a value; give a map that main_finetune.py wrote")
        picture = draw_map(overview(image, most), image.transform, found, args.panel)
        print("wrote", *write_figure(picture, args.output, colours=256))


if __name__ == "__main__":
    main()
