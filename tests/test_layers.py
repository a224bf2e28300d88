# SPDX-License-Identifier: MIT
"""Who may import whom, functions with few parameters, and flags that nothing writes to (CONTRIBUTING.md)."""

import ast
from functools import cache

import pytest

from tests.helpers import ROOT

PROGRAMS = ("main_pretrain", "main_finetune")
FILES = [
    path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] not in (".venv", "output", "tests")
]
OURS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
MODELS = {"models_mixmim", "token_layout", "execution", "util.pos_embed"}
FLAGS = {"pretrain_flags", "finetune_flags"}
ANYTHING = OURS - {"analysis", "benchmarks", *PROGRAMS}

# A module, or a package, and what of ours it may import. The most special entry counts.
ALLOWED = {
    "common": {"common"},
    "sarwmix": {"sarwmix", "common"},
    "util": {"util", "common"},
    "util.datasets": {"util", "common", "sarwmix"},
    "token_layout": set(),
    "execution": set(),
    "models_mixmim": MODELS,
    "models_mixmim_ft": MODELS,
    "models_mixmim_seg": MODELS,
    "models_sen12_ft": MODELS | {"models_mixmim_ft"},
    "batch_preparation": {"sarwmix", "util.crop", "util.sampling", "util.speckle"},
    "engine_pretrain": {"util", "common"},
    "engine_finetune": {"util", "common"},
    "engine_segment": {"engine_finetune", "util", "common"},
    "exported_program": {"token_layout", "util", "common"},
    "pretrained": ANYTHING - {"pretrained", "exported_program", "evaluation", *FLAGS},
    "pretrain_flags": {"batch_preparation", "models_mixmim", "sarwmix", "util", "common"},
    "finetune_flags": ANYTHING - {"evaluation", *FLAGS},
    "evaluation": ANYTHING - {"evaluation", *FLAGS},
    "main_pretrain": ANYTHING,
    "main_finetune": ANYTHING,
    "analysis": OURS,
    "benchmarks": OURS,
}


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in OURS | {"tests"})


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downwards(path):
    if module_of(path) == "common.startup":
        return
    rule = max((entry for entry in ALLOWED if within(module_of(path), [entry])), key=len)
    allowed = ALLOWED[rule] | {"common.startup"}
    assert [name for name in imports_of(path) if not within(name, allowed)] == []


def test_functions_have_at_most_seven_parameters():
    long = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 7:
                    long.append(f"{module_of(path)}.{node.name}")
    assert long == []


def test_nothing_writes_to_flags():
    written = [
        f"{module_of(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("args", "flags", "config")
    ]
    assert written == []


def test_few_modules_lie_directly_in_sarwmix():
    assert len(list((ROOT / "sarwmix").glob("[!_]*.py"))) <= 24
