"""The ledger: predicates decide, failures are loud, measurements travel in executed notebooks."""

import math

import nbformat
import pytest

from bnlib.book import claims
from bnlib.book.claims import Claim, Found

ROW = {
    "id": "zero-mean",
    "section": "3",
    "claim": "The mean is zero & <small>.",
    "paper": "0",
    "how": "live",
    "measure": "largest |mean|",
    "predicate": "< 1e-6",
    "verdict": "reproduced",
}
QUOTED = {**ROW, "id": "best", "how": "quoted", "predicate": "", "verdict": "quoted only"}


@pytest.fixture
def ledger(monkeypatch):
    rows = {row["id"]: Claim(**row) for row in (ROW, QUOTED)}
    monkeypatch.setattr(claims, "read_claims", lambda path=None: rows)
    return rows


def notebook(path, *outputs):
    cell = nbformat.v4.new_code_cell("", outputs=list(outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def told(measurement):
    data = measurement._repr_mimebundle_()
    return nbformat.v4.new_output("execute_result", data=data, execution_count=1)


@pytest.mark.parametrize(
    ("predicate", "holds", "fails"),
    [
        ("< 1e-6", 9e-7, 1e-6),
        ("<= 2", 2, 2.1),
        ("> 0", 1e-300, 0),
        (">=14", 14, 13.9),
        ("== 1", True, False),
    ],
)
def test_the_predicate_decides(predicate, holds, fails):
    claim = Claim(**{**ROW, "predicate": predicate})
    assert claim.holds(holds)
    assert not claim.holds(fails)


@pytest.mark.parametrize("predicate", ["< 1", "<= 1", "> 1", ">= 1", "== 1"])
def test_nan_satisfies_no_predicate(predicate):
    assert not Claim(**{**ROW, "predicate": predicate}).holds(math.nan)


@pytest.mark.parametrize("predicate", ["", "about 3", "< ", "!= 2", "1 <", "< one"])
def test_what_is_no_comparison_with_a_number_is_refused(predicate):
    with pytest.raises(ValueError, match=r"not a comparison|could not convert"):
        Claim(**{**ROW, "predicate": predicate})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "guessed"}, "how is 'guessed'"),
        ({"verdict": "proved"}, "verdict is 'proved'"),
        ({"how": "quoted"}, "go together"),
        ({"verdict": "quoted only"}, "go together"),
        ({"how": "quoted", "verdict": "quoted only"}, "takes no predicate"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Claim(**{**ROW, **change})


def test_a_claim_that_holds_becomes_a_line_on_the_page(ledger):
    data = claims.claim("zero-mean", 1e-9, note="digits")._repr_mimebundle_()
    assert data[claims.MIME] == {"id": "zero-mean", "measured": 1e-9, "note": "digits"}
    assert "The mean is zero &amp; &lt;small&gt;." in data["text/html"]
    assert "1e-09" in data["text/html"]
    assert "1e-09" in data["text/plain"]


@pytest.mark.parametrize("measured", [1.0, math.nan, math.inf])
def test_a_claim_that_fails_stops_the_chapter(ledger, measured):
    with pytest.raises(AssertionError, match=r"'zero-mean' does not hold.*requires < 1e-6"):
        claims.claim("zero-mean", measured)


def test_an_unknown_claim_is_refused_with_those_that_exist(ledger):
    with pytest.raises(KeyError, match=r"no claim 'zero-maen'.*zero-mean, best"):
        claims.claim("zero-maen", 0.0)


def test_a_quoted_claim_takes_no_measurement(ledger):
    with pytest.raises(ValueError, match="only quoted"):
        claims.claim("best", 0.0)


def test_measurements_are_gathered_from_executed_notebooks(ledger, tmp_path):
    first = notebook(tmp_path / "04_a.ipynb", told(claims.claim("zero-mean", 1e-9, note="MNIST")))
    second = notebook(tmp_path / "05_b.ipynb", told(claims.claim("zero-mean", 2e-9)))
    plain = notebook(tmp_path / "06_c.ipynb", nbformat.v4.new_output("stream", text="hello"))
    assert claims.gather([plain, first, second]) == {
        "zero-mean": Found("zero-mean", 1e-9, "MNIST", "04_a")
    }


def test_a_measurement_of_a_claim_that_is_gone_is_an_error(ledger, tmp_path):
    path = notebook(tmp_path / "04_a.ipynb", told(claims.claim("zero-mean", 1e-9)))
    del ledger["zero-mean"]
    with pytest.raises(ValueError, match=r"04_a.ipynb: claim 'zero-mean' is not in the ledger"):
        claims.gather([path])


def test_the_verdict_needs_a_measurement_that_still_meets_the_ledger(ledger):
    row = ledger["zero-mean"]
    assert claims.verdict(row, {}) == claims.NOT_MEASURED
    assert claims.verdict(row, {row.id: Found(row.id, 1e-9, "", "04")}) == "reproduced"
    assert claims.verdict(row, {row.id: Found(row.id, 1e-3, "", "04")}) == "not reproduced"
    assert claims.verdict(ledger["best"], {}) == "quoted only"


def test_a_repeated_id_is_refused(tmp_path):
    path = tmp_path / "claims.csv"
    lines = [",".join(ROW), *[",".join(f'"{value}"' for value in ROW.values())] * 2]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="'zero-mean' stands there twice"):
        claims.read_claims(path)


def test_the_projects_own_ledger_is_readable_and_in_the_papers_order():
    ledger = claims.read_claims()
    assert ledger
    order = [row.section.split(",")[0] for row in ledger.values()]
    assert order == sorted(order)
