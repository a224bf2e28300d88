# SPDX-License-Identifier: MIT
"""The estimate of a training step's memory: its figures are those of docs/PERFORMANCE.md, and it grows with what it counts."""

from types import SimpleNamespace

import pytest

from tests.helpers import ROOT
from util.step_memory import STEP_MEMORY, step_bytes


def test_the_estimate_grows_with_what_a_step_holds():
    flags = {"model": "mixmim_base", "batch_size": 256, "amp": "bf16", "input_size": 128, "grad_checkpointing": False}

    def of(images_per_sample=1, **changes):
        return step_bytes(SimpleNamespace(**flags | changes), images_per_sample)

    # As in docs/PERFORMANCE.md: 2.0 GB whatever the batch, 42.7 MB an image; a third more, and 2 GB.
    assert of() == pytest.approx(4 / 3 * (2.0e9 + 256 * 42.7e6) + 2e9, rel=0.01)
    larger = [of(grad_checkpointing=True), of(batch_size=128), of(), of(amp="off"), of(input_size=256)]
    larger.append(of(images_per_sample=2, input_size=256))
    assert larger == sorted(set(larger))
    models = [of(model=f"mixmim_{size}") for size in ("tiny", "base", "large", "huge")]
    assert models == sorted(set(models))


@pytest.mark.parametrize("size", ("base", "large", "huge"))
def test_the_figures_are_those_of_the_page(size):
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines()]
    memory = STEP_MEMORY[f"mixmim_{size}"]
    for variant, kept in (("ours", memory.kept), ("ours, grad_checkpointing", memory.kept_checkpointing)):
        (row,) = [row for row in rows if row[:3] == [size, variant, str(memory.parameters)]]
        assert row[4:6] == [str(kept), str(memory.block)]
