"""Which verdicts move with the seed: what ``make seeds`` prints.

::

    python -m bnlib.book.seeds _build/seeds/1 _build/seeds/2

Each folder holds chapters that were executed with one seed and ``BNLIB_LEDGER_REPORT`` set, so that
a verdict that moves stops nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bnlib.book.claims import gather, read_claims


def moved(folders: Sequence[Path]) -> list[str]:
    """A line for every claim whose verdict is not the expected one in each of the folders."""
    ledger, verdicts = read_claims(), dict[str, Counter[str]]()
    for folder in folders:
        for name, found in gather(sorted(folder.glob("*.ipynb"))).items():
            verdict = ledger[name].verdict(found.low, found.high)
            verdicts.setdefault(name, Counter())[verdict] += 1
    lines = []
    for name, counts in verdicts.items():
        expected = ledger[name].expected
        if set(counts) != {expected}:
            others = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
            lines.append(f"{name}: expected {expected!r}; of {counts.total()} seeds: {others}")
    agreed = sum(set(counts) == {ledger[name].expected} for name, counts in verdicts.items())
    return [*lines, f"{agreed} of {len(verdicts)} verdicts are as expected with every seed"]


if __name__ == "__main__":
    print("\n".join(moved([Path(argument) for argument in sys.argv[1:]])))
