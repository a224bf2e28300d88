# SPDX-License-Identifier: MIT
"""Runs `sarwmix.prepare.tile` for `python -m sarwmix.tile`."""

from sarwmix.prepare.tile import main

if __name__ == "__main__":
    main()
