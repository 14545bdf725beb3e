"""Recorded runs: what was written comes back, and nothing else does."""

import json
import sys

import numpy as np
import pytest

from bnlib import runs

PAPER = {
    "configuration": {"learning_rate": 0.1, "hidden": [100, 100]},
    "seed": (0, 1),
    "dataset": {"name": "digits", "sha256": "0" * 64},
    "started": "2026-01-01T00:00:00+00:00",
    "duration_s": 12.34,
}


@pytest.fixture
def recorded(tmp_path):
    columns = {
        "seed": [0, 0, 1, 1],
        "step": [0, 10, 0, 10],
        "accuracy": np.array([0.1, 0.123456789, np.nan, 1.0]),
        "network": ["bn", "bn", "plain", "plain"],
    }
    runs.write("figure1", "slow", columns, root=tmp_path, **PAPER)
    return tmp_path


def test_a_run_comes_back_as_it_was_written(recorded):
    run = runs.read("figure1", "slow", root=recorded)
    assert run["step"].tolist() == [0, 10, 0, 10]
    assert run["accuracy"][[0, 1, 3]].tolist() == [0.1, 0.123457, 1.0]  # six digits are kept
    assert np.isnan(run["accuracy"][2])
    assert run["network"].tolist() == ["bn", "bn", "plain", "plain"]
    assert run.manifest["configuration"] == PAPER["configuration"]
    assert run.manifest["seed"] == [0, 1]
    assert run.manifest["rows"] == 4
    assert run.manifest["verdict"] == "finished"
    assert run.manifest["versions"]["torch"]
    assert run.manifest["device"]


def test_writing_leaves_only_the_two_files(recorded):
    folder = recorded / "figure1" / "slow"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "metrics.csv"]


def test_where_keeps_the_rows_that_match_every_condition(recorded):
    run = runs.read("figure1", "slow", root=recorded).where(network="bn", step=10)
    assert run["accuracy"].tolist() == [0.123457]


def test_a_frame_has_one_row_an_observation_and_the_recorded_columns(recorded):
    frame = runs.read("figure1", "slow", root=recorded).frame(run="slow", repeat=3)
    assert frame.columns.tolist() == ["run", "repeat", "seed", "step", "accuracy", "network"]
    assert frame["run"].tolist() == ["slow"] * 4
    assert frame["repeat"].tolist() == [3] * 4
    assert frame["step"].tolist() == [0, 10, 0, 10]
    assert [frame[name].dtype.kind for name in ("seed", "step", "accuracy")] == ["i", "i", "f"]
    np.testing.assert_array_equal(frame["accuracy"], [0.1, 0.123457, np.nan, 1.0])
    assert frame["network"].tolist() == ["bn", "bn", "plain", "plain"]


def test_a_frame_can_be_spread_over_two_of_its_columns(recorded):
    frame = runs.read("figure1", "slow", root=recorded).frame()
    table = frame.pivot(index="seed", columns="step", values="accuracy")
    np.testing.assert_array_equal(table, [[0.1, 0.123457], [np.nan, 1.0]])


def test_a_frame_refuses_a_label_that_is_a_recorded_column(recorded):
    with pytest.raises(ValueError, match="has a column 'network' already"):
        runs.read("figure1", "slow", root=recorded).frame(network="bn")


def test_a_frame_without_pandas_says_how_to_install_it(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install pandas"):
        runs.read("figure1", "slow", root=recorded).frame()


def test_a_column_that_is_not_there_is_named_beside_those_that_are(recorded):
    with pytest.raises(KeyError, match="no column 'loss'; it has seed, step, accuracy, network"):
        runs.read("figure1", "slow", root=recorded)["loss"]


def test_names_lists_the_runs_of_an_experiment(recorded):
    runs.write("figure1", "fast", {"step": [1]}, root=recorded, **PAPER)
    assert runs.names("figure1", root=recorded) == ["fast", "slow"]
    with pytest.raises(runs.RunError, match="no recorded runs of 'figure9'"):
        runs.names("figure9", root=recorded)


@pytest.mark.parametrize("columns", [{}, {"a": [1, 2], "b": [1]}], ids=["none", "unequal"])
def test_columns_must_be_there_and_equally_long(tmp_path, columns):
    with pytest.raises(ValueError, match="equally long"):
        runs.write("figure1", "slow", columns, root=tmp_path, **PAPER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.csv", "manifest.json"])
def test_a_missing_file_is_an_error_that_names_it(recorded, name):
    (recorded / "figure1" / "slow" / name).unlink()
    with pytest.raises(runs.RunError, match=rf"figure1/slow: .*{name} is missing; restore"):
        runs.read("figure1", "slow", root=recorded)


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text.replace("0.123457", "0.223457"),
        lambda text: text[: len(text) // 2],
        lambda text: text + "1,20,0.5,plain\n",
        lambda text: "",
    ],
    ids=["altered", "truncated", "lengthened", "emptied"],
)
def test_metrics_that_are_not_the_recorded_ones_are_refused(recorded, alter):
    metrics = recorded / "figure1" / "slow" / "metrics.csv"
    before = metrics.read_text()
    metrics.write_text(alter(before))
    assert metrics.read_text() != before
    with pytest.raises(runs.RunError, match=r"metrics\.csv is not what was recorded"):
        runs.read("figure1", "slow", root=recorded)


def test_a_truncated_manifest_is_refused(recorded):
    manifest = recorded / "figure1" / "slow" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(runs.RunError, match="not valid JSON"):
        runs.read("figure1", "slow", root=recorded)


@pytest.mark.parametrize("key", ["metrics_sha256", "dataset", "verdict", "versions"])
def test_an_incomplete_manifest_is_refused_and_the_gap_named(recorded, key):
    manifest = recorded / "figure1" / "slow" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content[key]
    manifest.write_text(json.dumps(content))
    with pytest.raises(runs.RunError, match=f"lacks {key}"):
        runs.read("figure1", "slow", root=recorded)


def test_a_manifest_of_another_schema_is_refused(recorded):
    manifest = recorded / "figure1" / "slow" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["schema"] = runs.SCHEMA + 1
    manifest.write_text(json.dumps(content))
    with pytest.raises(runs.RunError, match=f"schema {runs.SCHEMA + 1}"):
        runs.read("figure1", "slow", root=recorded)


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "file"
    runs.write_atomically(target, b"before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(target, b"after")
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_every_recorded_run_of_the_project_is_what_its_manifest_says():
    root = runs.data_folder() / "runs"
    manifests = list(root.glob("*/*/manifest.json"))
    folders = [path for path in root.glob("*/*") if path.is_dir()]
    assert len(manifests) == len(folders), "a folder of data/runs has no manifest"
    for manifest in manifests:
        run = runs.read(manifest.parent.parent.name, manifest.parent.name)
        assert run.manifest["experiment"] == manifest.parent.parent.name
        assert run.manifest["name"] == manifest.parent.name
        assert {len(column) for column in run.columns.values()} == {run.manifest["rows"]}


@pytest.mark.parametrize("text", ["finished", "diverged at step 7", "stopped at step 0"])
def test_a_verdict_is_written_and_read_back(text, tmp_path):
    verdict = runs.Verdict.parse(text)
    assert str(verdict) == text
    assert [verdict.finished, verdict.diverged, verdict.stopped].count(True) == 1
    assert verdict == runs.Verdict(text.partition(" ")[0], verdict.step)
    manifest = {"configuration": {}, "seed": 0, "dataset": {}, "started": "", "duration_s": 0}
    runs.write("a", "b", {"x": [1]}, **manifest, verdict=verdict, root=tmp_path)
    run = runs.read("a", "b", root=tmp_path)
    assert run.verdict == verdict
    assert run.manifest["verdict"] == text


@pytest.mark.parametrize(
    "text", ["", "done", "finished at step 3", "diverged", "stopped at step x"]
)
def test_another_verdict_is_refused(text):
    with pytest.raises(ValueError, match="it must be finished without a step"):
        runs.Verdict.parse(text)
