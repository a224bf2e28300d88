# SPDX-License-Identifier: MIT
"""The control of the tests of broken inputs: before they are damaged, the inputs are accepted."""

import shutil

import pytest

from tests.helpers.inputs import BASES, USES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name, use", [(name, use) for name, (_, uses) in BASES.items() for use in uses])
def test_a_whole_input_is_accepted(name, use, base, start, tmp_path):
    shutil.copytree(base(name), tmp_path / "data")
    status, _, err = start(USES[use], data=tmp_path / "data", out=tmp_path / "run")
    assert (status, err) == (0, "")
    assert (tmp_path / "run").exists() or (tmp_path / "run.json").exists() or "verify" in use
