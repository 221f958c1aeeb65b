"""Write schedule.txt: ``python tests/golden/make_schedule.py > tests/golden/schedule.txt``.

Independent of diffveil and NumPy: decimal arithmetic of 60 digits.
"""

from __future__ import annotations

import sys
from decimal import Decimal, getcontext

getcontext().prec = 60


def main() -> None:
    out = sys.stdout.write
    out(
        "# Product of 1 - beta up to each timestep, beta scaled linear from 0.00085 to 0.012 over\n"
    )
    out("# 1000 timesteps. Written by make_schedule.py in decimal arithmetic.\n\n")
    low, high = Decimal("0.00085").sqrt(), Decimal("0.012").sqrt()
    product = Decimal(1)
    for t in range(1000):
        product *= 1 - (low + (high - low) * t / 999) ** 2
        if t in (0, 1, 21, 99, 100, 300, 400, 581, 601, 801, 981, 999):
            out(f"timestep: {t}\nexpect: {product:.20f}\n\n")


if __name__ == "__main__":
    main()
