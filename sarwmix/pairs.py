# SPDX-License-Identifier: MIT
"""Runs `sarwmix.prepare.pairs` for `python -m sarwmix.pairs`."""

from sarwmix.prepare.pairs import main

if __name__ == "__main__":
    main()
