# SPDX-License-Identifier: MIT
"""Writes the flags of both main programs as tables, from their parsers, for docs/FLAGS.md.

python -m analysis.flag_tables --output docs/FLAGS.md
"""

import re
from textwrap import fill

import finetune_flags
import pretrain_flags
from analysis.programs import write_text
from common.command_line import Parser, Range

PROGRAMS = {"main_pretrain.py": pretrain_flags, "main_finetune.py": finetune_flags}
HEAD = """<!-- SPDX-License-Identifier: MIT -->
<!-- Made by `make docs` (python -m analysis.flag_tables --output docs/FLAGS.md); do not edit. -->
# Flags of the main programs

On this page you can look up every flag of `main_pretrain.py` and `main_finetune.py`, with its
values, its default and its meaning, as `--help` prints them.

- *values*: names in capitals stand for a value of yours. A *switch* takes no value.
- *default*: – means that there is no default, or that *meaning* explains it.

[FORMATS.md](FORMATS.md) describes the files that flags name. [DIFFERENCES.md](DIFFERENCES.md) lists
the flags that reproduce the released code. The programs that prepare data,
`python -m sarwmix.<name>`, describe their flags with `--help`.
"""
WIDTH = 100  # of prose
COLUMNS = ("flag", "values", "default", "meaning")
KINDS = {int: "integer", float: "number"}
SAID = re.compile(r" \(default: ([^()]*)\)|; default: ([^()]*)$")  # a default in the help text


def groups_of(parser):
    """Yields (title, remark or "", actions without --help) of every group of a parser that has flags."""
    for group in parser._action_groups:  # argparse has no public access
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if actions:
            yield group.title, group.description or "", actions


def values_of(action):
    """What follows a flag: its choices, or the name and the kind of its value."""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    limits = action.type if isinstance(action.type, Range) else None
    kind = f"{KINDS.get(limits.kind if limits else action.type, '')} {limits.shown() if limits else ''}".strip()
    names = action.metavar or ("" if kind else action.dest.upper())
    names = " ".join(names) if isinstance(names, tuple) else f"{names} …" if action.nargs in ("*", "+") else names
    return ", ".join(filter(None, (names, kind)))


def row_of(action):
    """The row of a flag: the cells of COLUMNS."""
    flag = f"`{', '.join(action.option_strings)}`"
    text = action.help % vars(action)
    if action.const is False:
        return flag, "switch", "off", text
    if action.const is True:
        return flag, "switch", "on" if action.default else "off", text
    said = SAID.search(text)
    default = f"`{action.default}`" if action.default not in (None, "") else (said[1] or said[2]) if said else "–"
    return flag, values_of(action), default, SAID.sub("", text)


def table(rows):
    """A pipe table without padding, so that a change of a flag changes only its row."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section(name, parser):
    """The flags of a program as Markdown, with a table for each group."""
    parts = [f"## {name}\n{fill(parser.description, WIDTH)}\n"]
    for title, remark, actions in groups_of(parser):
        remark = f"{fill(f'{remark[0].upper()}{remark[1:]}.', WIDTH)}\n\n" if remark else ""
        parts.append(f"### {title}\n{remark}{table(map(row_of, actions))}")
    return "\n".join(parts)


def page():
    """The content of docs/FLAGS.md."""
    return "\n".join((HEAD, *(section(name, module.build_parser()) for name, module in PROGRAMS.items())))


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0], "analysis.flag_tables")
    parser.add_argument("--output", required=True, metavar="FILE", help="Markdown file to write")
    args = parser.parse_args(argv)
    with parser.input_errors():
        write_text(page(), args.output)


if __name__ == "__main__":
    main()
