"""The ledger: what the paper claims, what we measured, and the verdict.

``data/paper/claims.csv`` holds one row a claim. A chapter calls :func:`claim` with what it
measured; the row's predicate decides, and a predicate that fails stops the chapter, and with it
the build. The measurement travels in the executed notebook's output, from which :func:`gather`
collects it for the last chapter.
"""

from __future__ import annotations

import csv
import html
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlib.runs import data_folder

MIME = "application/vnd.bnlib.claim+json"
HOW = ("live", "recorded", "quoted")
#: The verdicts that a row of the ledger may carry.
VERDICTS = (
    "reproduced",
    "reproduced in miniature",
    "not reproduced",
    "disputed since",
    "quoted only",
)
#: What stands in the place of a verdict when no executed chapter has measured the claim.
NOT_MEASURED = "not measured in this build"
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_PREDICATE = re.compile(r"(<=|>=|==|<|>)\s*(\S+)")


@dataclass(frozen=True)
class Claim:
    """One row of the ledger.

    Attributes
    ----------
    id
        The name a chapter calls it by.
    section
        Where the paper makes the claim.
    claim
        The claim, in our words.
    paper
        The paper's own value, or empty.
    how
        ``live`` (measured when the chapter runs), ``recorded`` (replayed from a recorded run) or
        ``quoted`` (not tested here).
    measure
        What the measured number is, in words, with its unit.
    predicate
        The comparison that decides, as ``< 1e-6`` or ``>= 2``; empty for a quoted claim.
    verdict
        The verdict when the predicate holds.
    """

    id: str
    section: str
    claim: str
    paper: str
    how: str
    measure: str
    predicate: str
    verdict: str

    def __post_init__(self) -> None:
        if self.how not in HOW:
            raise ValueError(f"claim {self.id!r}: how is {self.how!r}; it must be one of {HOW}")
        if self.verdict not in VERDICTS:
            raise ValueError(
                f"claim {self.id!r}: verdict is {self.verdict!r}; it must be one of {VERDICTS}"
            )
        if (self.how == "quoted") != (self.verdict == "quoted only"):
            raise ValueError(f"claim {self.id!r}: 'quoted' and 'quoted only' go together")
        if self.how == "quoted":
            if self.predicate:
                raise ValueError(f"claim {self.id!r} is quoted, so it takes no predicate")
        else:
            _decide(self.predicate, math.nan)

    def holds(self, measured: float) -> bool:
        """Whether ``measured`` satisfies the predicate; NaN never does."""
        return _decide(self.predicate, measured)


@dataclass(frozen=True)
class Measurement:
    """A claim together with what a chapter measured; shows itself as a line on the page."""

    claim: Claim
    measured: float
    note: str = ""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        row = self.claim
        text = f"{row.claim} Measured: {row.measure} = {self.measured:.4g} ({row.predicate})."
        page = (
            f'<div class="bn-claim">{badge(row.verdict)} '
            f"{html.escape(row.claim)} <span class='bn-measured'>Measured: "
            f"{html.escape(row.measure)} = <strong>{self.measured:.4g}</strong>, "
            f"required {html.escape(row.predicate)}.</span></div>"
        )
        payload = {"id": row.id, "measured": self.measured, "note": self.note}
        return {MIME: payload, "text/html": page, "text/plain": text}


def badge(verdict: str) -> str:
    """A verdict as HTML; the book's style sheet colors it by its ``data-verdict``."""
    text = html.escape(verdict)
    return f'<span class="bn-verdict" data-verdict="{text}">{text}</span>'


def _decide(predicate: str, measured: float) -> bool:
    match = _PREDICATE.fullmatch(predicate.strip())
    if match is None:
        raise ValueError(
            f"predicate {predicate!r} is not a comparison and a number, such as '< 1e-6'; "
            f"known comparisons: {', '.join(_OPERATORS)}"
        )
    return _OPERATORS[match[1]](measured, float(match[2]))


def read_claims(path: Path | None = None) -> dict[str, Claim]:
    """Read the ledger, in its order.

    Parameters
    ----------
    path
        The CSV file; ``data/paper/claims.csv`` of the project by default.

    Raises
    ------
    ValueError
        For a repeated id, an unknown verdict or a predicate that is no comparison.
    """
    path = path or data_folder() / "paper" / "claims.csv"
    ledger: dict[str, Claim] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            entry = Claim(**row)
            if entry.id in ledger:
                raise ValueError(f"{path}: claim {entry.id!r} stands there twice")
            ledger[entry.id] = entry
    return ledger


def claim(id: str, measured: float | bool, *, note: str = "") -> Measurement:
    """Tell the ledger what was measured; leave the result as the cell's output.

    Parameters
    ----------
    id
        The claim's id in ``data/paper/claims.csv``.
    measured
        The number (or truth value, as 0 or 1) that the claim's predicate judges.
    note
        A remark to print in the ledger, such as the data set's name.

    Raises
    ------
    KeyError
        If no such claim exists; the message lists the known ones.
    AssertionError
        If the predicate fails.
    """
    ledger = read_claims()
    if id not in ledger:
        raise KeyError(f"no claim {id!r} in data/paper/claims.csv; known: {', '.join(ledger)}")
    entry = ledger[id]
    if entry.how == "quoted":
        raise ValueError(f"claim {id!r} is only quoted in the ledger; it takes no measurement")
    value = float(measured)
    if not entry.holds(value):
        raise AssertionError(
            f"The claim {id!r} does not hold here: {entry.measure} is {value:.6g}, but the ledger "
            f"requires {entry.predicate}. ({entry.claim})"
        )
    return Measurement(entry, value, note)


@dataclass(frozen=True)
class Found:
    """A measurement found in an executed chapter."""

    id: str
    measured: float
    note: str
    chapter: str


def gather(notebooks: Iterable[Path]) -> dict[str, Found]:
    """Collect the measurements that executed chapters carry in their outputs.

    Parameters
    ----------
    notebooks
        Executed notebooks; their file name without ending names the chapter.

    Returns
    -------
    dict
        From claim id to the measurement. A claim that two chapters measured keeps the first.

    Raises
    ------
    ValueError
        If a notebook tells of a claim that is not in the ledger.
    """
    ledger, found = read_claims(), dict[str, Found]()
    for path in notebooks:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                payload = output.get("data", {}).get(MIME)
                if payload is None:
                    continue
                if payload["id"] not in ledger:
                    raise ValueError(f"{path.name}: claim {payload['id']!r} is not in the ledger")
                found.setdefault(payload["id"], Found(**payload, chapter=path.stem))
    return found


def verdict(claim: Claim, found: Mapping[str, Found]) -> str:
    """The verdict on a claim, given what the executed chapters have measured.

    Parameters
    ----------
    claim
        A row of the ledger.
    found
        What :func:`gather` returned.

    Returns
    -------
    str
        One of :data:`VERDICTS`, ``not reproduced`` if the measurement fails the predicate as it
        stands now, or :data:`NOT_MEASURED`.
    """
    if claim.how == "quoted":
        return claim.verdict
    if claim.id not in found:
        return NOT_MEASURED
    return claim.verdict if claim.holds(found[claim.id].measured) else "not reproduced"
