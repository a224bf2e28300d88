# SPDX-License-Identifier: MIT
"""Checkpoints: never half-written, never executed, fitted to other input sizes."""

import argparse
import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from common.errors import UsageError
from common.sealed_file import SealedFile
from models_mixmim import mixmim_tiny
from util.checkpoint import (
    LATEST,
    PREVIOUS,
    check_same_run,
    initialise,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from util.pos_embed import get_2d_sincos_pos_embed


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@contextlib.contextmanager
def no_room_for(size):
    """No file can have more bytes, as if the disk were full there."""
    limit, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_one_line_that_says_so_and_the_old_checkpoint_is_intact(tmp_path):
    state = {"model": {"w": torch.ones(100_000)}, "epoch": 0}
    with pytest.raises(UsageError) as error, no_room_for(50_000):
        save_checkpoint(tmp_path, state)
    one_line(error, LATEST, "could not be written (File too large); there is no previous one", "--resume auto")
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path, state)
    with pytest.raises(UsageError) as error, no_room_for(50_000):
        save_checkpoint(tmp_path, {**state, "epoch": 1})
    one_line(error, LATEST, "could not be written (File too large); the previous one is intact", "--resume auto")
    assert load_checkpoint(tmp_path / LATEST)["epoch"] == 0
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_what_else_happens_during_a_save_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def interrupted(state, file):  # as the handler of PyTorch does, wherever the program is
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        save_checkpoint(tmp_path, {"model": {}, "epoch": 0})


def test_sigkill_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    program = (
        "import sys, torch; from util.checkpoint import save_checkpoint\n"
        "for epoch in range(10**6): save_checkpoint(sys.argv[1], {'model': {'w': torch.full((2**20,), epoch)}, 'epoch': epoch})"
    )
    for delay in (0.01, 0.05, 0.09, 0.13):
        child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        while not (tmp_path / LATEST).exists():
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        state, path = load_latest(tmp_path)
        assert path.name == LATEST and (state["model"]["w"] == state["epoch"]).all()


def test_the_last_two_are_kept_and_named_ones_too(tmp_path):
    for epoch in range(3):
        save_checkpoint(tmp_path, {"model": {}, "epoch": epoch}, ("checkpoint_2.pth",) if epoch == 1 else ())
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in (LATEST, PREVIOUS, "checkpoint_2.pth")] == [2, 1, 1]


def test_without_hard_links_the_files_are_copied(tmp_path, monkeypatch):
    def link(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", link)
    test_the_last_two_are_kept_and_named_ones_too(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_falls_back_to_the_one_before_with_a_warning(tmp_path, caplog):
    for epoch in range(2):
        save_checkpoint(tmp_path, {"model": {"w": torch.arange(1000.0)}, "epoch": epoch})
    whole = (tmp_path / LATEST).read_bytes()
    (tmp_path / LATEST).write_bytes(whole[: len(whole) // 2])
    state, path = load_latest(tmp_path)
    assert state["epoch"] == 0 and path.name == PREVIOUS and LATEST in caplog.text
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(UsageError) as error:
        load_latest(tmp_path)
    one_line(error, "left as they are", "--resume PATH", "another --output_dir")
    assert "--overwrite" not in str(error.value)
    assert load_latest(tmp_path / "nowhere") == (None, None)


def test_a_checksum_is_written_as_sha256sum_does_and_an_empty_one_allows_nothing(tmp_path):
    for epoch in range(2):
        save_checkpoint(tmp_path, {"model": {"w": torch.arange(1000.0)}, "epoch": epoch}, ("checkpoint_best.pth",))
    for name in (LATEST, PREVIOUS, "checkpoint_best.pth"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert SealedFile(tmp_path / name).sidecar.read_text() == f"{digest}  {name}\n"
    SealedFile(tmp_path / LATEST).sidecar.write_text("")
    assert load_latest(tmp_path)[1].name == PREVIOUS
    SealedFile(tmp_path / LATEST).sidecar.unlink()
    assert load_latest(tmp_path)[1].name == LATEST


def test_a_legacy_namespace_loads_and_becomes_a_dict(tmp_path):
    args = argparse.Namespace(model="mixmim_base", lr=0.1, distributed=True)
    torch.save(
        {"model": {"w": torch.ones(1)}, "optimizer": {"state": {}}, "epoch": 63, "args": args}, tmp_path / "old.pth"
    )
    assert load_checkpoint(tmp_path / "old.pth")["args"] == vars(args)


def test_a_torch_that_can_be_made_to_run_code_opens_nothing(tmp_path, monkeypatch):
    torch.save({"model": {}}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1+cu121"))
    with pytest.raises(UsageError) as error:
        load_checkpoint(tmp_path / "x.pth")
    one_line(error, "x.pth", "PyTorch 2.5.1+cu121", "install 2.10 or newer")


def test_missing_and_foreign_checkpoints_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="has no 'model', as it is a list"):
        load_checkpoint(tmp_path / "list.pth")


def test_initialise_is_exact_at_the_same_size_and_resamples_at_another(tmp_path):
    source = mixmim_tiny(img_size=128)
    same = mixmim_tiny(img_size=128)
    assert initialise(same, {"model": source.state_dict()}, "x") == []
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), same.state_dict().values()))

    small = mixmim_tiny(img_size=64)  # grids 16, 8, 4, 2: the windows of the last two stages shrink
    resampled = initialise(small, {"model": source.state_dict()}, "x")
    assert {
        "absolute_pos_embed",
        "decoder_pos_embed",
        "layers.2.blocks.0.attn.relative_position_bias_table",
        "layers.3.blocks.0.attn.relative_position_bias_table",
    } <= set(resampled)
    assert "layers.1.blocks.0.attn.relative_position_bias_table" not in resampled
    own = mixmim_tiny(img_size=64).state_dict()["layers.2.blocks.0.attn.relative_position_index"]
    assert torch.equal(small.layers[2].blocks[0].attn.relative_position_index, own)
    centre = [model.layers[2].blocks[0].attn.relative_position_bias_table for model in (source, small)]
    torch.testing.assert_close(
        centre[1][24], centre[0][112], atol=0.02, rtol=0
    )  # offset (0, 0) of a 7×7 and a 15×15 table
    assert torch.equal(small.patch_embed.proj.weight, source.patch_embed.proj.weight)
    loss, _, _ = small(torch.randn(2, 2, 64, 64))
    assert loss.isfinite()


def test_initialise_names_what_does_not_fit():
    state = mixmim_tiny().state_dict()
    del state["mask_token"]
    with pytest.raises(UsageError, match="lacks mask_token"):
        initialise(mixmim_tiny(), {"model": state}, "some.pth")
    with pytest.raises(UsageError, match="other shapes.*--model"):
        initialise(
            mixmim_tiny(embed_dim=64, num_heads=(2, 4, 8, 16)), {"model": mixmim_tiny().state_dict()}, "some.pth"
        )


def test_another_run_is_refused_by_flag_and_values():
    check_same_run({"lr": 0.1, "seed": 0}, {"lr": 0.1, "seed": 0, "new": None})
    check_same_run({}, {"lr": 0.1})
    with pytest.raises(UsageError, match=r"--new 1 \(was None\)"):
        check_same_run({"lr": 0.1}, {"lr": 0.1, "new": 1})
    with pytest.raises(UsageError, match=r"--lr 0.2 \(was 0.1\)"):
        check_same_run({"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 0})


def test_sincos_by_value():
    table = get_2d_sincos_pos_embed(8, 3)[0]
    column, row = 2, 1
    omega = [1.0, 10000**-0.5]
    expected = [f(p * w) for p in (column, row) for f in (torch.sin, torch.cos) for w in torch.tensor(omega)]
    torch.testing.assert_close(table[row * 3 + column], torch.stack(expected))
