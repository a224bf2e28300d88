# SPDX-License-Identifier: MIT
"""--compile auto: what is chosen, by whom, and that nothing else of a run changes. Compilers are stood in for; clocks too."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import main_finetune
import main_pretrain
import models_mixmim
import util.tuning
from common.errors import TrainingError
from engine_pretrain import warm_up_loss
from models_mixmim import mixmim_tiny
from tests.helpers.forked import start_ranks
from tests.helpers.runs import completed, same_states
from util.checkpoint import load_checkpoint
from util.distributed import Launch, Ranks
from util.training import Start
from util.tuning import settle_execution

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = (
    "--model mixmim_tiny --input_size 32 --batch_size 8 --num_workers 0 --warmup_epochs 0 --epochs 2 "
    "--device cpu --drop_path 0.3"
)
PRETRAIN = (TINY, "--save_epochs 99")
EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED = (
    (mode, attention) for mode in ("off", "default") for attention in ("plain", "fused")
)


class Model(nn.Linear):
    """Notes how it is executed, and how often."""

    attention_variants = ("plain", "fused")

    def __init__(self):
        super().__init__(1, 1)
        self.way, self.steps = None, []

    def execute_with(self, grad_checkpointing, compile_mode, attention):
        self.way = compile_mode or "off", attention


class Case:
    """A training of `Model` in which every way takes its number of seconds a step, or raises its error."""

    def __init__(self, monkeypatch, costs):
        self.model, self.costs, self.now = Model(), costs, 0.0
        self.optimizer, self.execution, self.warned = SimpleNamespace(state={}), None, []
        self.warn_of_other_bits = self.warned.append
        monkeypatch.setattr(util.tuning.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(util.tuning.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(torch.compiler, "reset", lambda: None)

    def bits(self):
        return {"device": "cpu"}

    def loss_of(self, model):
        cost = self.costs[model.way]
        model.steps.append(model.way)
        if isinstance(cost, Exception):
            raise cost
        self.now += cost
        return model(torch.ones(1, 1)).sum()

    def settle(self, flag="auto", ranks=None, **bits):
        args = SimpleNamespace(compile=flag, grad_checkpointing=False, batch_size=4)
        settle_execution(self, self.loss_of, args, ranks or Ranks(Launch(), CPU), Start(0, bits=bits))
        assert self.model.way == (self.execution["compile"], self.execution["attention"]) and len(self.warned) == 1
        return self.model.way


@pytest.mark.parametrize("costs", [(1, 2, 3, 4), (2, 1, 3, 4), (0.3, 0.2, 0.1, 0.4), (4, 3, 2, 1)])
def test_the_fastest_is_chosen_and_said(monkeypatch, caplog, costs):
    caplog.set_level(logging.INFO)
    ways = dict(zip((EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED), costs))
    case = Case(monkeypatch, ways)
    assert ways[case.settle()] == min(costs)
    assert list(case.execution["ms"].values()) == pytest.approx([1000 * cost for cost in costs])
    assert case.model.weight.grad is None and case.model.weight.requires_grad
    assert (
        f"eager with fused attention {1000 * costs[1]:.1f} ms, compiled (default) with plain attention {1000 * costs[2]:.1f} ms"
        in caplog.text
    )


def test_a_compiler_that_fails_is_one_warning_and_eager(monkeypatch, caplog):
    case = Case(
        monkeypatch,
        {
            EAGER_PLAIN: 2,
            EAGER_FUSED: 1,
            PLAIN: RuntimeError("\nInductorError: no compiler\nCommand: g++ …"),
            FUSED: 0.1,
        },
    )
    assert case.settle() == EAGER_FUSED
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "--compile auto: compiled (default) with plain attention is left out: RuntimeError: InductorError: no compiler"
    ]
    assert FUSED not in case.model.steps


def test_a_way_that_does_not_fit_is_left_out_alone(monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    assert Case(monkeypatch, {EAGER_PLAIN: full, EAGER_FUSED: 3, PLAIN: full, FUSED: 2}).settle() == FUSED
    with pytest.raises(torch.OutOfMemoryError):
        Case(monkeypatch, dict.fromkeys((EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED), full)).settle()


def test_measuring_ends(monkeypatch, caplog):
    case = Case(monkeypatch, {EAGER_PLAIN: 2, EAGER_FUSED: util.tuning.LIMIT, PLAIN: 1, FUSED: 1})
    assert case.settle() == EAGER_PLAIN and caplog.text.count("measuring has taken") == 2


@pytest.mark.parametrize(
    "flag, bits, way, steps",
    [
        ("off", {}, EAGER_PLAIN, 0),
        ("default", {}, PLAIN, 1),
        (None, {}, EAGER_PLAIN, 0),
        ("auto", {"compile": "default", "attention": "fused"}, FUSED, 1),
        (None, {"compile": "default", "attention": "plain"}, PLAIN, 1),
        ("auto", {"compile": "off", "attention": "fused"}, EAGER_FUSED, 0),
        ("auto", {"compile": "off"}, EAGER_PLAIN, 0),
        ("off", {"compile": "default", "attention": "fused"}, EAGER_PLAIN, 0),
        ("default", {"compile": "off", "attention": "fused"}, PLAIN, 1),
    ],
)
def test_nothing_is_timed_where_a_flag_or_the_continued_run_says_it(monkeypatch, flag, bits, way, steps):
    """But compilers are tried before training."""
    case = Case(monkeypatch, dict.fromkeys((EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED), 1))
    assert case.settle(flag, **{"device": "cpu", **bits} if bits else {}) == way and case.model.steps == [way] * steps
    assert "ms" not in case.execution


@pytest.mark.parametrize(
    "bits", [{"device": "NVIDIA H100", "compile": "default"}, {"device": "cpu", "compile": "as ever"}, {1: 2}]
)
def test_what_cannot_be_kept_is_timed(monkeypatch, bits):
    case = Case(monkeypatch, {EAGER_PLAIN: 4, EAGER_FUSED: 3, PLAIN: 1, FUSED: 2})
    args = SimpleNamespace(compile="auto", grad_checkpointing=False, batch_size=4)
    settle_execution(case, case.loss_of, args, Ranks(Launch(), CPU), Start(0, bits=bits))
    assert case.model.way == PLAIN


def test_a_mode_that_cannot_be_compiled_ends_the_run_or_is_left_out(monkeypatch, caplog):
    costs = {
        EAGER_PLAIN: 1,
        EAGER_FUSED: 1,
        PLAIN: RuntimeError("No working C++ compiler found"),
        FUSED: RuntimeError("no Triton"),
    }
    with pytest.raises(
        TrainingError,
        match="^--compile default: RuntimeError: No working C\\+\\+ compiler found; repair the compiler .*--compile off$",
    ):
        Case(monkeypatch, costs).settle("default")
    assert not caplog.records
    assert Case(monkeypatch, costs).settle("auto", device="cpu", compile="default", attention="fused") == EAGER_FUSED
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "no Triton" in warnings[0]
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Case(monkeypatch, {**costs, PLAIN: full}).settle("default")


class Both(Ranks):
    """Rank 0 of two, the other of which says what is given here, call by call; None: the same as this one."""

    def __init__(self, *others):
        super().__init__(Launch(world_size=2), CPU)
        self.others = list(others)

    def gather(self, value):
        other = self.others.pop(0)
        return [value, value if other is None else other]


def test_the_slowest_rank_counts_and_a_failure_on_one(monkeypatch):
    """For each way: how long it has taken so far, what has failed, seconds of a step and what has failed."""
    costs = {EAGER_PLAIN: 4, EAGER_FUSED: 3, PLAIN: 1, FUSED: 2}
    ranks = Both(None, None, (4.5, None), None, None, (3.5, None), None, None, (9.0, None), None, None, (2.5, None))
    case = Case(monkeypatch, costs)
    assert case.settle(ranks=ranks) == FUSED and list(case.execution["ms"].values()) == [4500, 3500, 9000, 2500]
    assert not ranks.others
    ranks = Both(None, None, (4.5, None), None, None, (3.5, None), None, (None, "InductorError: no compiler"))
    assert Case(monkeypatch, costs).settle(ranks=ranks) == EAGER_FUSED and not ranks.others
    ranks = Both(
        None,
        None,
        None,
        None,
        None,
        (None, "OutOfMemoryError: out of memory"),
        None,
        None,
        None,
        None,
        (None, "OutOfMemoryError: out of memory"),
    )
    assert Case(monkeypatch, costs).settle(ranks=ranks) == PLAIN and not ranks.others


# ---- In the programs -----------------------------------------------------------------------------


def test_measuring_changes_nothing_of_a_training(monkeypatch):
    """Weights, gradients, moments and random streams."""
    model = mixmim_tiny(img_size=32, drop_path_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    training = SimpleNamespace(
        model=model, optimizer=optimizer, warn_of_other_bits=lambda start: None, bits=lambda: {"device": "cpu"}
    )
    args = SimpleNamespace(
        compile="auto", grad_checkpointing=False, batch_size=4, amp="off", mask_ratio=0.5, input_size=32, seed=0
    )
    monkeypatch.setattr(models_mixmim.Blocks, "compile", without_compiling)
    monkeypatch.setattr(util.tuning, "ROUND_SECONDS", 0)
    before, ranks = {name: value.clone() for name, value in model.state_dict().items()}, Ranks(Launch(), CPU)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    images = torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    settle_execution(training, partial(warm_up_loss, images=images, config=args), args, ranks, Start(0))
    assert torch.equal(torch.rand(4), expected) and model.training and not optimizer.state
    assert len(training.execution["ms"]) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def without_compiling(blocks, mode, dynamic):
    blocks._compiled_call_impl = blocks._call_impl


def with_costs(monkeypatch, **costs):
    """Have ways of execution take their seconds in the programs, and stand in for the compiler. Returns the ways that were timed."""
    timed = []

    def time(bench):
        mode = (
            "off"
            if next(m for m in bench.model.modules() if isinstance(m, models_mixmim.Blocks))._compiled_call_impl is None
            else "default"
        )
        timed.append((mode, next(m for m in bench.model.modules() if isinstance(m, models_mixmim.Attention)).variant))
        return costs.get("_".join(timed[-1]), 9)

    monkeypatch.setattr(models_mixmim.Blocks, "compile", without_compiling)
    monkeypatch.setattr(util.tuning.Bench, "time", time)
    monkeypatch.setattr(util.tuning, "WARM_UP", 1)
    return timed


def test_a_pretraining_that_chose_is_the_same_and_goes_on_as_it_chose(simulated, tmp_path, program, monkeypatch):
    flags = ("--data_path", simulated, PRETRAIN)
    completed(program(main_pretrain, flags, "--output_dir", tmp_path / "off"))
    timed = with_costs(monkeypatch, off_plain=1)
    completed(program(main_pretrain, flags, "--compile auto --output_dir", tmp_path / "auto"))
    assert timed == [EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED]
    assert same_states(*(load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("off", "auto")))

    flags = (flags, "--compile auto --output_dir", tmp_path / "fused", "--resume auto")
    with_costs(monkeypatch, off_fused=1)
    completed(program(main_pretrain, flags, "--stop_epoch 1"))
    timed = with_costs(monkeypatch, off_plain=1)
    status, out, _ = program(main_pretrain, flags)
    assert status == 0 and not timed
    assert "--compile auto: eager with fused attention, as in the run that is continued" in out
    assert "the last bits of its results" not in out
    record, state = (
        json.loads((tmp_path / "fused" / "run.json").read_text()),
        load_checkpoint(tmp_path / "fused" / "checkpoint.pth"),
    )
    assert record["execution"] == {"compile": "off", "attention": "fused"}
    assert len(record["earlier"][0]["execution"]["ms"]) == 4
    assert (state["bits"]["compile"], state["bits"]["attention"]) == EAGER_FUSED
    status, out, _ = program(main_pretrain, flags, "--compile off --epochs 2")
    assert status == 0 and "the run continues with attention plain (was fused)" in out


def test_finetuning_chooses_too_and_evaluation_is_eager(simulated, tmp_path, program, monkeypatch):
    timed = with_costs(monkeypatch, default_fused=1)
    flags = ("--dataset benv2 --data_path", simulated, TINY, "--compile auto --output_dir")
    status, out, err = program(main_finetune, flags, tmp_path, "--finetune '' --test_split none --stop_epoch 1")
    assert status == 0 and timed == [EAGER_PLAIN, EAGER_FUSED, PLAIN, FUSED], err
    assert (
        "--compile auto: compiled (default) with fused attention is the fastest: forward and backward pass of 8 samples"
        in out
    )
    assert json.loads((tmp_path / "run.json").read_text())["execution"]["compile"] == "default"
    best = ("--eval --split val --finetune", tmp_path / "checkpoint_best.pth")
    status, _, err = program(main_finetune, flags, tmp_path / "eval", best)
    assert status == 0 and len(timed) == 4, err


def stand_in(fails):
    """In the process of a rank: a compiler that does nothing, or that fails."""

    def stand_in_for_compile(self, mode, dynamic):
        if fails:
            raise RuntimeError("InductorError: no compiler")
        without_compiling(self, mode, dynamic)

    models_mixmim.Blocks.compile = stand_in_for_compile
    util.tuning.ROUND_SECONDS = 0


def test_two_ranks_agree_that_one_of_them_cannot_compile(simulated, tmp_path):
    flags = ("--data_path", simulated, PRETRAIN, "--stop_epoch 1 --output_dir", tmp_path / "run", "--compile")
    hurt = {0: (stand_in, False), 1: (stand_in, True)}
    runs = start_ranks("main_pretrain", (flags, "auto"), tmp_path / "auto", hurt=hurt)
    assert [run.wait() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    assert runs[0].text().count("is left out: RuntimeError: InductorError: no compiler") == 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth")["bits"]["compile"] == "off"
    runs = start_ranks("main_pretrain", (flags, "default --overwrite"), tmp_path / "default", hurt=hurt)
    assert [run.wait() for run in runs] == [1, 1] and not runs[1].lines()
    assert [line.split(";")[0] for line in runs[0].lines()] == [
        "main_pretrain.py: stopped: --compile default: RuntimeError: InductorError: no compiler"
    ]
    assert (tmp_path / "run" / "checkpoint.pth").exists()
