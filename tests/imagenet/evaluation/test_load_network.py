"""A trained network from a run's folder, its network.pt or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from imagenet_runs import QUIET, TINY, TinyNetwork

from bnlib.imagenet import checkpoint
from bnlib.imagenet.checkpoint import CheckpointError
from bnlib.imagenet.evaluation.accuracy import load_network
from bnlib.imagenet.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny")


def test_a_runs_folder_its_network_and_its_checkpoint_all_give_the_averaged_weights(
    data: Path, tmp_path: Path
) -> None:
    train(TINY, data, tmp_path, QUIET)
    (path,) = checkpoint.checkpoints(tmp_path)
    average = checkpoint.load(path)["average"]
    for place in (tmp_path, tmp_path / "network.pt", path):
        network, recipe = load_network(place)
        assert recipe == TINY
        assert not network.training
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, average[name]), (place, name)
    evaluated, saved = (load_network(p)[0].state_dict() for p in (tmp_path, path))
    assert not torch.equal(evaluated["norm1.running_var"], saved["norm1.running_var"])
    (tmp_path / "network.pt").unlink()
    again = load_network(tmp_path)[0].state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in again.items())


def test_weights_that_do_not_fit_their_recipe_are_refused(data: Path, tmp_path: Path) -> None:
    state = {"recipe": TINY.to_json(), "step": 1, "model": TinyNetwork(TINY).state_dict()}
    del state["model"]["conv1.weight"]  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "network.pt")
    with pytest.raises(CheckpointError, match="do not fit its own recipe"):
        load_network(tmp_path)
