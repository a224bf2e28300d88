# SPDX-License-Identifier: MIT
"""Runs `sarwmix.simulate.patches` for `python -m sarwmix.simulate`."""

from sarwmix.simulate.patches import main

if __name__ == "__main__":
    main()
