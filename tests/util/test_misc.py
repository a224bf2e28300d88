# SPDX-License-Identifier: MIT
"""What the training side shares: memory that a process keeps."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

TRAIN = """
import resource, sys, torch
from models_mixmim import mixmim_tiny
from util.misc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
model, images = mixmim_tiny(), torch.zeros(16, 2, 128, 128)
for step in range(9):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(images)[0].backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_handed_out_anew():
    """Pages that the system has to hand out in six steps of training, after three."""
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", TRAIN, how], cwd=ROOT, check=True, capture_output=True, text=True, timeout=100
            ).stdout
        )
        for how in ("keep", "give back")
    }
    assert faults["keep"] < faults["give back"] / 4
