# SPDX-License-Identifier: MIT
"""Flood pairs for packed stores."""

import numpy as np


def write_floods(root, size=128):
    """A store of single images: two training folders and one for test, three dates each, every image of another σ⁰."""
    for number, folder in enumerate(("0001", "0002", "7")):
        (root / "images" / folder).mkdir(parents=True)
        for date in range(3):
            image = np.random.default_rng([number, date]).gamma(4, 0.02, (2, size, size)).astype(np.float32)
            image[0, :date, :5] = 0
            np.save(root / "images" / folder / f"d{date}.npy", image)
        image[1, 3, 3] = np.nan
        np.save(root / "images" / folder / "d2.npy", image)
        rows = [(folder, "d0", "d1", 0), (folder, "d0", "d2", 1), (folder, "d1", "d2", 1)]
        path = root / f"pairs_{'test' if folder == '7' else 'train'}.csv"
        known = path.read_text() if path.exists() else "folder,first,second,label\n"
        path.write_text(known + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return root
