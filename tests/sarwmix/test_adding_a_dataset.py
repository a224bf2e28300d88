# SPDX-License-Identifier: MIT
"""The example of docs/ADDING_A_DATASET.md: its items, a training batch from its files and from a packed store, its errors."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sarwmix.prepare import pack
from sarwmix.registry import DATASETS, open_dataset
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import fails_with, write_csv
from tests.helpers.runs import argv
from util.datasets import SamplesWithIds, build_dataset, build_loader
from util.distributed import Launch, Ranks


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    """The folder of five scenes, whose values are constants; the dataset is registered."""
    code = re.search("```python\n(.*?)```", (ROOT / "docs" / "ADDING_A_DATASET.md").read_text(), re.DOTALL)[1]
    names = {"__name__": "example"}
    exec(compile(code, "docs/ADDING_A_DATASET.md", "exec"), names)
    monkeypatch.setitem(DATASETS, "scenes", names["Scenes"])
    rows = [(f"scene{k}", "test" if k == 4 else "train", k % 2, 1, int(k == 3)) for k in range(5)]
    write_csv(tmp_path / "samples.csv", [("name", "split", "water", "forest", "town"), *rows])
    for k in range(5):
        image = np.stack([np.full((120, 120), -20.0 - k), np.full((120, 120), -12.0 - k)]).astype(np.float32)
        np.save(tmp_path / f"scene{k}.npy", image)
    return tmp_path


def flags(root):
    return SimpleNamespace(
        dataset="scenes", data_path=root, split="train", metadata=None, id_col=None, include_snow_cloud=False,
        max_nonfinite=0.01, data_cache="none", data_timeout=1, batch_size=4, accum_iter=1, seed=0, num_workers=0,
        pin_mem=False,
    )  # fmt: skip


def test_the_example_gives_items_and_facts(scenes):
    data = DATASETS["scenes"](scenes, "train")
    image, labels = data[3]
    assert image.shape == (2, 120, 120) and image[:, 0, 0].tolist() == [-23, -15] and labels.tolist() == [1, 1, 1]
    assert len(data) == 4 and data.ids[3] == "scene3" and data.where(3) == "samples.csv:5"
    assert data.describe()["class_counts"] == {"water": 2, "forest": 4, "town": 1}
    assert data.check_units()["mean"] == pytest.approx([-21.5, -13.5]) and data.check_files() is None
    assert len(DATASETS["scenes"](scenes, "all").subset([4, 0])) == 2


@pytest.mark.parametrize("layout", ("files", "packed"))
def test_the_example_trains_from_files_and_from_a_store(scenes, tmp_path, layout):
    root = scenes
    if layout == "packed":
        root = tmp_path / "store"
        pack.main(argv("--dataset scenes --data_path", scenes, "--out", root, "--splits train test --workers 1"))  # fmt: skip
    loader = build_loader(SamplesWithIds(build_dataset(flags(root))), flags(root), Ranks(Launch(), torch.device("cpu")))
    ((ids, (images,), labels),) = loader
    torch.testing.assert_close(images[:, 1, 0, 0], -12.0 - ids)
    assert labels[:, 0].tolist() == (ids % 2).tolist()


def test_the_example_names_what_is_missing_or_cannot_be_chosen(scenes):
    data = DATASETS["scenes"](scenes, "train")
    (scenes / "scene2.npy").unlink()
    assert data.missing() == [2]
    for use in (data.check_files, lambda: data[2]):
        fails_with(use, "scene2.npy", "samples.csv:4")
    fails_with(lambda: open_dataset("scenes", scenes, "train", metadata=["other.csv"]), "--metadata", "scenes")
