# SPDX-License-Identifier: MIT
"""The documentation: its commands, flags, links and form.

The ```bash and ```python blocks of a page are run in their order, page by page, in a checkout of their own. A block is
not run here if the line before it is a comment: `<!-- needs … -->` names what a fresh machine lacks, `<!-- tested by
FILE -->` the test that runs it. Flags of commands that are not run are looked up. Where a command would take minutes it
is run with the smaller numbers of SMALLER, which are all that differs.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md"))
)
NEEDS = {"data", "a GPU", "a cluster", "the network"}
SMALLER = {
    "--patches 1280": "--patches 128",
    "--folders 24": "--folders 8",
    " --size 256": " --size 128",
    "--folders 60": "--folders 8",
    "--epochs 24 ": "--epochs 4 ",
    "--epochs 8 --warmup": "--epochs 2 --warmup",
    '--epochs 11 --warmup_epochs 0.4 --lr 5e-4 --clip_grad 1 --log_freq 64"': '--epochs 1 --warmup_epochs 0.4"',
    "for seed in 0 1 2": "for seed in 0",
    "for epoch in 1 4 11": "for epoch in 1 11",
    "--side 2048 --seed 3": "--side 512 --seed 3",
    "--place 620 100": "--windows 3",
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


class Block(NamedTuple):
    """A block of code. line: number of its first line. mark: the words of the comment before it, or None."""

    line: int
    language: str
    text: str
    mark: str | None


def blocks(page, *languages):
    """Every Block of a page in these languages."""
    lines = (ROOT / page).read_text().splitlines()
    starts = {number: line[3:] for number, line in enumerate(lines) if line[:3] == "```" and line[3:] in languages}
    for start, language in starts.items():
        end = lines.index("```", start)
        mark = re.fullmatch(r"<!-- ((needs|tested by) .+) -->", lines[start - 1])
        yield Block(start + 2, language, "\n".join(lines[start + 1 : end]), mark and mark[1])


def runnable(page):
    return [block for block in blocks(page, "bash", "python") if not block.mark]


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
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)$", (ROOT / page).read_text(), re.MULTILINE))
        assert languages <= {"bash", "python", "text", "bibtex"}, page
        for block in blocks(page, "bash", "python"):
            if block.mark and block.mark.startswith("tested by "):
                assert page in (ROOT / block.mark.removeprefix("tested by ")).read_text(), f"{page}:{block.line}"
            else:
                assert block.mark is None or block.mark.removeprefix("needs ") in NEEDS, f"{page}:{block.line}"
        assert all("/data/" not in block.text and "…" not in block.text for block in runnable(page)), page
    texts = [block.text for page in PAGES for block in runnable(page)] + [path.read_text() for path in SHORTENED]
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
    for block in runnable(page):
        lines = [line for line in shorter(block.text).splitlines() if line.split("  ")[0].strip() not in RUN_ELSEWHERE]
        shell = ["python"] if block.language == "python" else ["bash", "-e", "-u", "-o", "pipefail"]
        result = subprocess.run(
            [*shell, "-c", "\n".join(lines)],
            cwd=checkout,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert result.returncode == 0, f"{page}:{block.line}\n{result.stdout[-3000:]}"


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
    for block in blocks(page, "bash"):
        if block.mark:
            yield from commands(block.text)
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


# ---- form
WIDTH, README_LINES = 100, 150


def prose(page):
    """(number, line) of a page, without ```text blocks, which show what programs print."""
    text = re.sub(
        r"^```text\n.*?^```$",
        lambda found: "\n" * found[0].count("\n"),
        (ROOT / page).read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    return enumerate(text.splitlines(), start=1)


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    is_free = re.compile(r"\||(\[[^\]]+\]\(|\S*)https?://\S+$|\s*<!-- .* -->$")
    long = [number for number, line in prose(page) if len(line) > WIDTH and not is_free.match(line)]
    assert not long, f"{page}: wrap lines {long} at {WIDTH} columns"


def test_the_readme_is_short_and_opens_with_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    first = next(blocks("README.md", "bash"))
    assert [line.split("  ")[0] for line in first.text.splitlines()] == [
        "bash scripts/run_local.sh",
        "bash scripts/run_tests.sh",
    ]
    assert first.line < 12


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_first_what_it_is_for(page):
    lines = [line for line in (ROOT / page).read_text().splitlines() if line and not line.startswith("<!--")]
    assert lines[0].startswith("# ") and lines[1][0].isalnum(), f"{page}: begin with a sentence below the title"


def test_the_index_has_every_page():
    linked = {
        os.path.normpath(os.path.join("docs", target))
        for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "docs/README.md").read_text())
    }
    assert set(PAGES) - linked <= {"README.md", "docs/README.md"}


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
