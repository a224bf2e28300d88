# SPDX-License-Identifier: MIT
"""The settled configuration: the order in which it is filled in, and that it is not written again."""

import pickle
from argparse import Namespace

import pytest
import torch

from sarwmix.registry import DATASETS
from util.configuration import Config, dataset_defaults, log_configuration, machine_settings, settle
from util.distributed import Launch, Ranks


def test_the_first_layer_that_knows_a_value_gives_it():
    flags = Namespace(a=None, b=None, c=0, d=None)
    config = settle(flags, {"a": 1, "c": 1}, {"a": 2, "b": 2, "new": 2}, {"d": None})
    assert vars(config) == {"a": 1, "b": 2, "c": 0, "new": 2, "d": None}
    assert vars(flags) == {"a": None, "b": None, "c": 0, "d": None}
    assert settle(config, {"d": False}, {"d": 3}).d is False


def test_it_is_not_written_again():
    config = Config({"a": 1})
    with pytest.raises(AttributeError, match="the configuration is settled: a cannot be written"):
        config.a = 2
    with pytest.raises(AttributeError):
        del config.a
    assert (config.a, config.changed(a=2).a) == (1, 2) and vars(pickle.loads(pickle.dumps(config))) == {"a": 1}


def test_the_log_line_has_what_was_settled_and_is_used(caplog):
    caplog.set_level("INFO")
    flags = Namespace(a=1, lr=None, split=None)
    log_configuration(settle(flags, {"lr": 0.1, "split": "all"}), flags, unused=("lr",))
    assert caplog.messages == ['configuration: {"split": "all"}']


def test_statistics_come_from_the_dataset_unless_given():
    layer = dataset_defaults(DATASETS["benv2"])
    assert settle(Namespace(mean=None, std=None), layer).std == [5.4501, 5.0019]
    assert settle(Namespace(mean=[-1.0, -2.0], std=None), layer).mean == [-1.0, -2.0]


def test_the_learning_rate_is_that_of_the_global_batch():
    flags = Namespace(amp=None, blr=1e-3, batch_size=8, accum_iter=4)
    ranks = Ranks(Launch("torchrun", 0, 2, 0, 2), torch.device("cpu"))
    settings = machine_settings(flags, ranks)
    assert settings["lr"] == pytest.approx(1e-3 * 64 / 256) and settings["amp"] == "off"
    assert 0 <= settings["num_workers"] <= 10
