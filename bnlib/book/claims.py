"""The ledger: what the paper claims, what we measured, and the verdict.

``data/paper/claims.csv`` holds one row a claim.  Its predicate is the claim itself, never its
opposite.  A chapter calls :func:`claim` with what it measured and the interval of that
measurement; where the whole interval satisfies the predicate the claim is *reproduced*, where none
of it does it is *not reproduced*, otherwise one *cannot tell here*.  A row also says what verdict
came out when it was written: another one stops the chapter, and with it the build, and the message
says which way it moved.

The measurement travels in the executed notebook's output, from which :func:`gather` collects it
for the last chapter.
"""

from __future__ import annotations

import csv
import html
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlib.runs import data_folder

MIME = "application/vnd.bnlib.claim+json"
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
CANNOT_TELL, QUOTED = "cannot tell here", "quoted only"
#: The verdicts that a row of the ledger may expect.
VERDICTS = (REPRODUCED, NOT_REPRODUCED, CANNOT_TELL, QUOTED)
#: What stands in the place of a verdict when no executed chapter has measured the claim.
NOT_MEASURED = "not measured in this build"
#: Whose claim it is.
SOURCES = ("paper", "ours", "later")
HOW = ("live", "recorded", "quoted")
#: What kind of failure a claim that is not reproduced is.
KINDS = ("", "misprint", "another reading", "failure", "trial too small")
#: If this variable of the environment is set, another verdict than expected stops nothing.
REPORT_ONLY = "BNLIB_LEDGER_REPORT"
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_WORDS = {"<=": "at most", ">=": "at least", "<": "below", ">": "above", "==": "exactly"}
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_PREDICATE = re.compile(r"(<=|>=|==|<|>)\s*(\S+)")


@dataclass(frozen=True)
class Claim:
    """One row of the ledger.

    Attributes
    ----------
    id
        The name a chapter calls it by.
    section
        Where the paper makes the claim, or what a claim of others is about.
    source
        ``paper``, ``ours`` or ``later`` (a later paper's, named in the claim).
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
        The claim as a comparison, such as ``< 1e-6`` or ``>= 2``; empty for a quoted claim.
    interval
        What the interval is, such as "95 %, five seeds"; ``exact`` where the claim is an identity
        or a count, whose measurement has no spread; ``none`` where there is one measurement only,
        as the page then says.
    trial
        What was measured on, and what was smaller than in the paper.
    otherwise
        What would have made the other verdict come out.
    kind
        One of :data:`KINDS`, for a claim that is not reproduced.
    expected
        The verdict that came out when the row was written.
    """

    id: str
    section: str
    source: str
    claim: str
    paper: str
    how: str
    measure: str
    predicate: str
    interval: str
    trial: str
    otherwise: str
    kind: str
    expected: str

    def __post_init__(self) -> None:
        allowed = {"source": SOURCES, "how": HOW, "kind": KINDS, "expected": VERDICTS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"claim {self.id!r}: {name} is {getattr(self, name)!r}; it must be one of "
                    f"{values}"
                )
        if (self.how == "quoted") != (self.expected == QUOTED):
            raise ValueError(f"claim {self.id!r}: 'quoted' and {QUOTED!r} go together")
        needed = ("predicate", "measure", "interval", "trial", "otherwise")
        if self.how == "quoted":
            if self.predicate:
                raise ValueError(f"claim {self.id!r} is quoted, so it takes no predicate")
        elif lacking := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"claim {self.id!r} lacks {', '.join(lacking)}")
        else:
            _holds(self.predicate, math.nan)
        if bool(self.kind) != (self.expected == NOT_REPRODUCED):
            raise ValueError(
                f"claim {self.id!r}: a kind of failure ({self.kind!r}) goes with "
                f"{NOT_REPRODUCED!r}, which is not {self.expected!r}"
            )

    @property
    def has_interval(self) -> bool:
        """Whether a measurement comes with an interval."""
        return self.interval not in ("exact", "none")

    @property
    def in_words(self) -> str:
        """The predicate, such as "at least 10" or "below 10⁻⁶"."""
        match = _parse(self.predicate)
        power = re.fullmatch(r"1e([+-]?)0*(\d+)", match[2])
        number = match[2]
        if power:
            sign = "⁻" if power[1] == "-" else ""
            number = "10" + sign + power[2].translate(_SUPERSCRIPT)
        return f"{_WORDS[match[1]]} {number}"

    def verdict(self, low: float, high: float) -> str:
        """The verdict on a measurement that lies between ``low`` and ``high``.

        The predicate is a comparison with one number, so it holds on the whole interval if it holds
        at both ends; for ``==`` the interval has to be that number.
        """
        if self.how == "quoted":
            return QUOTED
        if math.isnan(low) or math.isnan(high):
            return CANNOT_TELL
        ends = [_holds(self.predicate, low), _holds(self.predicate, high)]
        if all(ends):
            return REPRODUCED
        inside = self.predicate.startswith("==") and low <= _number(self.predicate) <= high
        return CANNOT_TELL if any(ends) or inside else NOT_REPRODUCED


def _parse(predicate: str) -> re.Match[str]:
    match = _PREDICATE.fullmatch(predicate.strip())
    if match is None:
        raise ValueError(
            f"predicate {predicate!r} is not a comparison and a number, such as '< 1e-6'; "
            f"known comparisons: {', '.join(_OPERATORS)}"
        )
    return match


def _number(predicate: str) -> float:
    return float(_parse(predicate)[2])


def _holds(predicate: str, value: float) -> bool:
    return _OPERATORS[_parse(predicate)[1]](value, _number(predicate))


_ABOUT = {"exact": "", "none": " (one measurement, without an interval)"}


@dataclass(frozen=True)
class Measurement:
    """A claim together with what a chapter measured; shows itself as a line on the page."""

    claim: Claim
    measured: float
    low: float
    high: float
    note: str = ""

    @property
    def verdict(self) -> str:
        """The verdict that this measurement gives."""
        return self.claim.verdict(self.low, self.high)

    def text(self) -> str:
        """The number, its interval and what is claimed of it."""
        row, value = self.claim, f"{self.measured:.4g}"
        if row.has_interval:
            value += f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{row.measure} = {value}; the claim is: {row.in_words}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        row = self.claim
        lead = {"paper": "", "ours": "(Ours.) ", "later": "(Later.) "}[row.source]
        page = (
            f'<div class="bn-claim" id="claim-{row.id}">{badge(self.verdict)} '
            f"{lead}{html.escape(row.claim)} <span class='bn-measured'>Measured: "
            f"{html.escape(self.text())}"
            f"{_ABOUT.get(row.interval, f' (interval: {html.escape(row.interval)})')}.</span>"
            f"{trial(row)}</div>"
        )
        payload = {
            "id": row.id,
            "measured": self.measured,
            "low": self.low,
            "high": self.high,
            "note": self.note,
        }
        plain = f"{self.verdict}: {row.claim} {self.text()}."
        return {MIME: payload, "text/html": page, "text/plain": plain}


def trial(claim: Claim) -> str:
    """What was measured on, and what would have turned the verdict, as HTML that unfolds."""
    return (
        "<details class='bn-trial'><summary>the trial, and what would have turned it</summary>"
        f"{html.escape(claim.trial)} Otherwise: {html.escape(claim.otherwise)}</details>"
    )


def badge(verdict: str) -> str:
    """A verdict as HTML; the book's style sheet colors it by its ``data-verdict``."""
    text = html.escape(verdict)
    return f'<span class="bn-verdict" data-verdict="{text}">{text}</span>'


def read_claims(path: Path | None = None) -> dict[str, Claim]:
    """Read the ledger, in its order.

    Parameters
    ----------
    path
        The CSV file; ``data/paper/claims.csv`` of the project by default.

    Raises
    ------
    ValueError
        For a repeated id, or a row that :class:`Claim` refuses.
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


def claim(
    id: str,
    measured: float | bool,
    interval: tuple[float, float] | None = None,
    *,
    note: str = "",
) -> Measurement:
    """Tell the ledger what was measured; leave the result as the cell's output.

    Parameters
    ----------
    id
        The claim's id in ``data/paper/claims.csv``.
    measured
        The number (or truth value, as 0 or 1) that the claim's predicate judges.
    interval
        Its interval, the lower end first; None where the ledger says ``exact`` or ``none``.
    note
        A remark to print in the ledger, such as the data set's name.

    Raises
    ------
    KeyError
        If no such claim exists; the message lists the known ones.
    ValueError
        If the claim is only quoted, or the interval is missing, superfluous or does not hold the
        measurement.
    AssertionError
        If the verdict is not the expected one, unless ``BNLIB_LEDGER_REPORT`` is set.
    """
    ledger = read_claims()
    if id not in ledger:
        raise KeyError(f"no claim {id!r} in data/paper/claims.csv; known: {', '.join(ledger)}")
    entry, value = ledger[id], float(measured)
    if entry.how == "quoted":
        raise ValueError(f"claim {id!r} is only quoted in the ledger; it takes no measurement")
    if entry.has_interval == (interval is None):
        needs = "needs an interval" if entry.has_interval else "takes no interval"
        raise ValueError(f"claim {id!r} {needs}; the ledger says {entry.interval!r}")
    low, high = (value, value) if interval is None else map(float, interval)
    if not (math.isnan(value) or math.isnan(low) or low <= value <= high):
        raise ValueError(f"claim {id!r}: {value:g} is not within its interval ({low:g}, {high:g})")
    found = Measurement(entry, value, low, high, note)
    if found.verdict != entry.expected and not os.environ.get(REPORT_ONLY):
        raise AssertionError(
            f"The verdict on {id!r} moved from {entry.expected!r} to {found.verdict!r}: "
            f"{found.text()}. ({entry.claim}) If this is right, say so in data/paper/claims.csv; "
            f"to go on all the same, set {REPORT_ONLY}=1"
        )
    return found


@dataclass(frozen=True)
class Found:
    """A measurement found in an executed chapter."""

    id: str
    measured: float
    low: float
    high: float
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
        From claim id to the measurement.

    Raises
    ------
    ValueError
        If a notebook tells of a claim that is not in the ledger, or two tell of the same.
    """
    ledger, found = read_claims(), dict[str, Found]()
    for path in notebooks:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                payload = output.get("data", {}).get(MIME)
                if payload is None:
                    continue
                name = payload["id"]
                if name not in ledger:
                    raise ValueError(f"{path.name}: claim {name!r} is not in the ledger")
                if name in found:
                    raise ValueError(
                        f"claim {name!r} is measured in {found[name].chapter} and in {path.stem}"
                    )
                found[name] = Found(**payload, chapter=path.stem)
    return found


def verdict(claim: Claim, found: dict[str, Found]) -> str:
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
        One of :data:`VERDICTS`, or :data:`NOT_MEASURED`.
    """
    if claim.how == "quoted":
        return QUOTED
    if claim.id not in found:
        return NOT_MEASURED
    return claim.verdict(found[claim.id].low, found[claim.id].high)
