# SPDX-License-Identifier: MIT
"""Model selection, under the module name of the released code; `sarwmix.selection` defines it."""

from sarwmix.selection import FILES, MACRO, METRICS, RULES, Selection

__all__ = ["FILES", "MACRO", "METRICS", "RULES", "Selection"]
