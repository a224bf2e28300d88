# SPDX-License-Identifier: MIT
"""Every command of the documentation: those in ```bash blocks are run, page by page, in a checkout of their own; the others have
their flags looked at.

A block is not run if the line before it is a comment `<!-- needs … -->` that says what a fresh machine lacks. Where a command
would take minutes it is run with the smaller numbers of SMALLER, which are all that differs.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
)
NEEDS = {"data", "a GPU", "a cluster", "the network"}
SMALLER = {
    "--patches 1280": "--patches 128",
    "--folders 24": "--folders 8",
    "--folders 60": "--folders 8",
    "--epochs 24 ": "--epochs 4 ",
    "--epochs 8 --warmup": "--epochs 2 --warmup",
    '--epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64"': '--epochs 1 --warmup_epochs 0.4"',
    "for seed in 0 1 2": "for seed in 0",
    "for epoch in 1 4 11": "for epoch in 1 11",
    "--side 2048 --seed 3": "--side 512 --seed 3",
    "--epochs 10 --warmup_epochs 1": "--epochs 2 --warmup_epochs 1",
    "--scenes 10 --side 1024": "--scenes 10 --side 512",
    "--scenes 12 --side 768": "--scenes 6 --side 256",
    "--side 2048 --units dB --seed 2": "--side 256 --units dB --seed 2",
    "--epochs 15 --warmup_epochs 2": "--epochs 2 --warmup_epochs 1",
    "objective_study --output output/study": "objective_study --output output/study --arms statistics_looks8 --seeds 0",
    "python -m pytest ": "python -m pytest --collect-only ",  # this run has those tests
}
# Programs whose numbers are replaced.
SHORTENED = [*(ROOT / "scripts").glob("*.sh"), ROOT / "analysis" / "objective_runs.py"]
# The second command of README.md is what runs this test.
RUN_ELSEWHERE = {"bash scripts/run_tests.sh"}


def blocks(page, language="bash"):
    """(first line's number, the text, what it needs or None) of every block of a page in this language."""
    lines = (ROOT / page).read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line == f"```{language}"]
    for start in starts:
        end = lines.index("```", start)
        mark = re.fullmatch(r"<!-- needs (.+) -->", lines[start - 1])
        yield start + 2, "\n".join(lines[start + 1 : end]), mark and mark[1]


def runnable(page):
    return [(number, text) for number, text, needs in blocks(page) if not needs]


def commands(text):
    """The commands of a block, continued lines joined, comments cut off, loops opened."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"; (?:do )?", line.split("  # ")[0].split("    #")[0]):
            part = part.strip()
            if part and not part.startswith("#"):
                yield part


def shorter(text):
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    return text


def test_marks_say_what_is_needed_and_nothing_else_is_left_out():
    assert {needs for page in PAGES for _, _, needs in blocks(page) if needs} <= NEEDS
    assert all("/data/" not in text and "…" not in text for page in PAGES for _, text in runnable(page))
    assert all(
        "```sh\n" not in (ROOT / page).read_text() and "```console" not in (ROOT / page).read_text() for page in PAGES
    )
    texts = [text for page in PAGES for _, text in runnable(page)] + [path.read_text() for path in SHORTENED]
    assert all(any(long in text for text in texts) for long in SMALLER)


# ---- run
@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is committed or would be, with this .venv and smaller numbers in the scripts."""
    folder = tmp_path_factory.mktemp("docs") / "checkout"
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(".git", ".venv", "output", "__pycache__", ".pytest_cache", ".hypothesis"),
    )
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for path in SHORTENED:
        copy = folder / path.relative_to(ROOT)
        copy.write_text(shorter(copy.read_text()))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="scripts/setup.sh has not been run")
@pytest.mark.parametrize(
    "page", sorted((page for page in PAGES if runnable(page)), key=lambda page: (page != "README.md", page))
)
def test_the_blocks_of_a_page_run_one_after_the_other(checkout, page):
    """README.md first, since others go on with what its first command leaves."""
    env = {**os.environ, "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for number, text in runnable(page):
        lines = [line for line in shorter(text).splitlines() if line.split("  ")[0].strip() not in RUN_ELSEWHERE]
        result = subprocess.run(
            ["bash", "-e", "-u", "-o", "pipefail", "-c", "\n".join(lines)],
            cwd=checkout,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert result.returncode == 0, f"{page}:{number}\n{result.stdout[-3000:]}"


# ---- only looked at
class Parsed(Exception):
    pass


def parser_of(program, monkeypatch):
    """The argparse parser of a main program or `python -m` module."""
    found = []

    def caught(self, *_, **__):
        found.append(self)
        raise Parsed

    module = importlib.import_module(program)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", caught)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(Parsed):
        (module.main if hasattr(module, "main") else module.parse_flags)()
    monkeypatch.undo()
    return found[0]


def python_words(command):
    """(module, its words) of a command that starts a Python program of ours, else None."""
    words = shlex.split(command.replace("…", " … "), comments=True)
    for place, word in enumerate(words):
        if re.fullmatch(r"main_(pretrain|finetune)\.py", word):
            return word.removesuffix(".py"), words[place + 1 :]
        if word == "-m" and words[place + 1].split(".")[0] in ("sarwmix", "analysis", "benchmarks"):
            module = words[place + 1]
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            return f"{module}.__main__" if is_package else module, words[place + 2 :]
    return None


def shown_commands(page):
    """Every command a page shows: of marked blocks, and in the text."""
    for _, text, needs in blocks(page):
        if needs:
            yield from commands(text)
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        code = " ".join(code.split())
        if re.match(r"(\w+=\S+ )*(python|bash|mpirun|torchrun|srun) ", code) and "<" not in code:
            yield code


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_have_flags_that_exist(page, monkeypatch):
    for command in shown_commands(page):
        known = python_words(command)
        if known is not None:
            own, _, passed_on = " ".join(known[1]).partition(" -- ")
            started = "main_pretrain" if known[0] == "analysis.objective_study" else "main_finetune"
            for program, words in ((known[0], own.split()), (started, passed_on.split())):
                flags = [word.split("=")[0] for word in words if re.match(r"--\w", word)]
                parser = parser_of(program, monkeypatch) if flags else None
                unknown = [flag for flag in flags if flag not in parser._option_string_actions]
                assert not unknown, f"{page}: {command}: {unknown}"
        for script in re.findall(r"(?<!\S)bash (scripts/\w+\.sh)", command):
            assert (ROOT / script).exists(), f"{page}: {command}"
            if script in ("scripts/run_local.sh", "scripts/qsub_run.sh", "scripts/sbatch_run.sh"):
                words = shlex.split(command.replace(" …", ""), comments=True)
                place = words.index(script)
                assignments = dict(word.split("=", 1) for word in words[: place - 1])
                result = subprocess.run(
                    ["bash", script, "--dry_run", *words[place + 1 :]],
                    cwd=ROOT,
                    text=True,
                    capture_output=True,
                    env={**os.environ, "SITE_GROUP": "group", **assignments},
                )
                assert result.returncode == 0, f"{page}: {command}: {result.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"
