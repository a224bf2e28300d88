# SPDX-License-Identifier: MIT
"""The programs of analysis/, run as a user runs them."""

import importlib
import sys


def run(monkeypatch, capsys, module, *flags):
    monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
    try:
        importlib.import_module(f"analysis.{module}").main()
        return 0, ""
    except SystemExit as end:
        return end.code, capsys.readouterr().err


def one_line_about(outcome, *parts):
    status, error = outcome
    assert status == 2 and len(error.splitlines()) == 1 and all(part in error for part in parts), error
