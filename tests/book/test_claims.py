"""The ledger: verdicts are computed, a verdict that moves is loud, measurements travel."""

import csv
import math
from itertools import product

import nbformat
import pytest

from bnlib.book import claims
from bnlib.book.claims import CANNOT_TELL, NOT_REPRODUCED, QUOTED, REPRODUCED, Claim, Found

ROW = {
    "id": "faster",
    "section": "4",
    "source": "paper",
    "claim": "It is faster & <small>.",
    "paper": "14",
    "how": "live",
    "measure": "speed-up",
    "predicate": ">= 10",
    "interval": "95 % over five seeds",
    "trial": "On digits.",
    "otherwise": "A speed-up below 10.",
    "kind": "",
    "expected": REPRODUCED,
}
EXACT = {**ROW, "id": "identity", "predicate": "< 1e-6", "interval": "exact"}
QUOTE = {**ROW, "id": "best", "how": "quoted", "predicate": "", "expected": QUOTED}


@pytest.fixture
def ledger(monkeypatch):
    rows = {row["id"]: Claim(**row) for row in (ROW, EXACT, QUOTE)}
    monkeypatch.setattr(claims, "read_claims", lambda path=None: rows)
    monkeypatch.delenv(claims.REPORT_ONLY, raising=False)
    return rows


def notebook(path, *outputs):
    cell = nbformat.v4.new_code_cell("", outputs=list(outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def told(measurement):
    data = measurement._repr_mimebundle_()
    return nbformat.v4.new_output("execute_result", data=data, execution_count=1)


@pytest.mark.parametrize(
    ("predicate", "low", "high", "verdict"),
    [
        (">= 10", 10, 20, REPRODUCED),
        (">= 10", 9.9, 20, CANNOT_TELL),
        (">= 10", 1, 9.9, NOT_REPRODUCED),
        ("> 0", 0, 1, CANNOT_TELL),
        ("< 1e-6", 0, 9e-7, REPRODUCED),
        ("< 1e-6", 1e-6, 1, NOT_REPRODUCED),
        ("== 1", 1, 1, REPRODUCED),
        ("== 1", 0.5, 1.5, CANNOT_TELL),
        ("== 1", 1, 1.5, CANNOT_TELL),
        ("== 1", 1.1, 1.5, NOT_REPRODUCED),
        (">= 10", 12, math.inf, REPRODUCED),
        (">= 10", math.nan, math.nan, CANNOT_TELL),
    ],
)
def test_the_verdict_is_computed_from_the_interval(predicate, low, high, verdict):
    assert Claim(**{**ROW, "predicate": predicate}).verdict(low, high) == verdict


@pytest.mark.parametrize("predicate", ["", "about 3", "< ", "!= 2", "1 <", "< one"])
def test_what_is_no_comparison_with_a_number_is_refused(predicate):
    with pytest.raises(ValueError, match=r"not a comparison|could not convert|lacks predicate"):
        Claim(**{**ROW, "predicate": predicate})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "guessed"}, "how is 'guessed'"),
        ({"source": "mine"}, "source is 'mine'"),
        ({"expected": "proved"}, "expected is 'proved'"),
        ({"kind": "bad luck"}, "kind is 'bad luck'"),
        ({"how": "quoted"}, "go together"),
        ({"expected": QUOTED}, "go together"),
        ({"how": "quoted", "expected": QUOTED}, "takes no predicate"),
        ({"trial": ""}, "lacks trial"),
        ({"otherwise": ""}, "lacks otherwise"),
        ({"interval": ""}, "lacks interval"),
        ({"kind": "failure"}, "goes with 'not reproduced'"),
        ({"expected": NOT_REPRODUCED}, "a kind of failure"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Claim(**{**ROW, **change})


def test_a_measurement_becomes_a_line_on_the_page(ledger):
    data = claims.claim("faster", 14, (12, 17), note="digits")._repr_mimebundle_()
    assert data[claims.MIME] == {
        "id": "faster", "measured": 14.0, "low": 12.0, "high": 17.0, "note": "digits"
    }  # fmt: skip
    page = data["text/html"]
    assert "It is faster &amp; &lt;small&gt;." in page
    assert "14 [12, 17]" in page
    assert "95 % over five seeds" in page
    assert "A speed-up below 10." in page
    assert 'id="claim-faster"' in page
    assert data["text/plain"].startswith("reproduced: ")


def test_another_verdict_than_expected_stops_the_chapter_and_says_which_way_it_moved(ledger):
    with pytest.raises(AssertionError, match=r"moved from 'reproduced' to 'cannot tell here'"):
        claims.claim("faster", 12, (8, 16))
    with pytest.raises(AssertionError, match=r"moved from 'reproduced' to 'not reproduced'"):
        claims.claim("faster", 5, (4, 6))
    with pytest.raises(AssertionError, match=r"'identity' moved"):
        claims.claim("identity", 1.0)


def test_where_only_a_report_is_asked_for_another_verdict_stops_nothing(ledger, monkeypatch):
    monkeypatch.setenv(claims.REPORT_ONLY, "1")
    assert claims.claim("faster", 5, (4, 6)).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("name", "measured", "interval", "message"),
    [
        ("faster", 14, None, "needs an interval"),
        ("identity", 0.0, (0, 1), "takes no interval"),
        ("faster", 14, (15, 17), "not within its interval"),
        ("best", 1, None, "only quoted"),
    ],
)
def test_a_measurement_without_its_interval_is_refused(ledger, name, measured, interval, message):
    with pytest.raises(ValueError, match=message):
        claims.claim(name, measured, interval)


def test_an_unknown_claim_is_refused_with_those_that_exist(ledger):
    with pytest.raises(KeyError, match=r"no claim 'fastre'.*faster, identity, best"):
        claims.claim("fastre", 0.0)


def test_measurements_are_gathered_from_executed_notebooks(ledger, tmp_path):
    first = notebook(tmp_path / "04_a.ipynb", told(claims.claim("identity", 1e-9, note="MNIST")))
    plain = notebook(tmp_path / "06_c.ipynb", nbformat.v4.new_output("stream", text="hello"))
    found = claims.gather([plain, first])
    assert found == {"identity": Found("identity", 1e-9, 1e-9, 1e-9, "MNIST", "04_a")}
    second = notebook(tmp_path / "05_b.ipynb", told(claims.claim("identity", 2e-9)))
    with pytest.raises(ValueError, match="measured in 04_a and in 05_b"):
        claims.gather([first, second])


def test_a_measurement_of_a_claim_that_is_gone_is_an_error(ledger, tmp_path):
    path = notebook(tmp_path / "04_a.ipynb", told(claims.claim("identity", 1e-9)))
    del ledger["identity"]
    with pytest.raises(ValueError, match=r"04_a.ipynb: claim 'identity' is not in the ledger"):
        claims.gather([path])


def test_the_page_computes_the_verdict_anew(ledger):
    row = ledger["faster"]
    assert claims.verdict(row, {}) == claims.NOT_MEASURED
    found = Found(row.id, 14, 12, 17, "", "04")
    assert claims.verdict(row, {row.id: found}) == REPRODUCED
    assert claims.verdict(ledger["best"], {}) == QUOTED


def test_a_repeated_id_is_refused(tmp_path):
    path = tmp_path / "claims.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows([ROW, ROW])
    with pytest.raises(ValueError, match="'faster' stands there twice"):
        claims.read_claims(path)


LEDGER = claims.read_claims()


def test_the_projects_own_ledger_is_in_the_papers_order():
    order = [row.section.split(",")[0] for row in LEDGER.values()]
    assert order == sorted(order)


@pytest.mark.parametrize(
    "row", [r for r in LEDGER.values() if r.how != "quoted"], ids=lambda r: r.id
)
def test_every_predicate_can_come_out_either_way(row):
    number = claims._number(row.predicate)
    step = max(abs(number), 1e-300)
    sides = [number + sign * factor * step for sign, factor in product((-1, 1), (1e-3, 1, 1e3))]
    found = {row.verdict(value, value) for value in [*sides, number]}
    assert found == {REPRODUCED, NOT_REPRODUCED}
    assert "TODO" not in (row.interval, row.trial, row.otherwise)


def test_what_is_ours_or_later_says_so_in_its_column_and_not_in_the_claim():
    assert not [row.id for row in LEDGER.values() if row.claim.startswith("(")]


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (">= 10", "at least 10"),
        ("< 1e-11", "below 10⁻¹¹"),
        ("<= 1e6", "at most 10⁶"),
        ("== 0", "exactly 0"),
        ("> -0.5", "above -0.5"),
    ],
)
def test_a_predicate_reads_as_words(predicate, words):
    assert Claim(**{**ROW, "predicate": predicate}).in_words == words
