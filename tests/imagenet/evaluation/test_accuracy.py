"""What is counted as right, Wilson's intervals, ensembles, images shared among processes."""

from __future__ import annotations

import math
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from imagenet_runs import TINY, TinyNetwork
from images import write_folder
from torch import Tensor

from bnlib.imagenet.data.folders import open_source
from bnlib.imagenet.evaluation.accuracy import Accuracy, accuracies, count_correct, evaluate
from bnlib.imagenet.evaluation.inference import Predicted, predict
from bnlib.imagenet.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))


def counted(logits: list[list[float]], labels: list[int]) -> Accuracy:
    logs = torch.tensor(logits).log_softmax(1)
    return Accuracy.from_counts(count_correct(logs, torch.tensor(labels)))


def predicted(members: list[list[list[float]]], labels: list[int]) -> Predicted:
    """What networks say, from probabilities (networks, n, classes)."""
    return Predicted(torch.tensor(members).log(), torch.tensor(labels), torch.arange(len(labels)))


def test_first_and_among_five_are_counted() -> None:
    descending = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    result = counted([descending] * 4, [0, 4, 5, 6])
    assert (result.top1, result.top5, result.n) == (0.25, 0.5, 4)
    log_sum = math.log(sum(math.exp(x) for x in descending))
    assert result.loss == pytest.approx(log_sum - (6 + 2 + 1 + 0) / 4)


def test_with_fewer_than_five_classes_the_right_one_is_among_five() -> None:
    result = counted([[1.0, 2.0, 3.0]] * 3, [0, 1, 2])
    assert (result.top1, result.top5) == (pytest.approx(1 / 3), 1.0)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(0)
    logs, labels = torch.randn(20, 7).log_softmax(1), torch.randint(7, (20,))
    parts = [count_correct(logs[part], labels[part]) for part in (slice(3), slice(3, 20))]
    torch.testing.assert_close(parts[0] + parts[1], count_correct(logs, labels))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (10, 10), (5, 10), (36000, 50000)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    ours = Accuracy(right / n, 1 - right / n, n, 0.0)
    assert ours.interval() == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert ours.interval(5) == pytest.approx((1 - theirs.high, 1 - theirs.low), abs=1e-6)


def test_an_accuracy_says_its_intervals_and_the_number_of_images() -> None:
    text = str(Accuracy(0.5, 1.0, 10, 0.7))
    assert "top-1 50.00% (95 % interval 23.66% to 76.34%)" in text
    assert "0.700 nats, 10 images" in text


# Ensembles


def test_the_ensemble_takes_the_arithmetic_mean_of_probabilities() -> None:
    sure = [[0.98, 0.02, 0.0], [0.4, 0.6, 0.0]]
    other = [[0.3, 0.4, 0.3], [0.4, 0.0, 0.6]]
    # first: 0.64, 0.21, 0.15; second: 0.4, 0.3, 0.3, of which neither member has the first highest
    first, second, together = accuracies([predicted([sure, other], [0, 0])], 2, ALONE)
    assert (first.top1, second.top1) == (0.5, 0.0)
    assert together.top1 == 1.0
    assert together.loss == pytest.approx(-(math.log(0.64) + math.log(0.4)) / 2, rel=1e-5)


def test_an_ensemble_of_one_is_that_network() -> None:
    torch.manual_seed(0)
    logs = torch.randn(1, 9, 4).log_softmax(2)
    one, together = accuracies([Predicted(logs, torch.randint(4, (9,)), torch.arange(9))], 1, ALONE)
    assert one == together


def test_a_class_that_is_all_but_ruled_out_costs_what_it_should() -> None:
    """Its probability, exp(-300), is zero in float32; its logarithm is not."""
    logs = torch.tensor([[[0.0, -300.0]], [[0.0, -302.0]]])
    _, _, together = accuracies([Predicted(logs, torch.tensor([1]), torch.arange(1))], 2, ALONE)
    expected = 300 - math.log((1 + math.exp(-2)) / 2)
    assert together.loss == pytest.approx(expected, rel=1e-6)


def test_an_image_that_two_of_three_networks_have_right_can_be_wrong_in_their_mean() -> None:
    right, wrong = [0.51, 0.49], [0.01, 0.99]
    members = [[wrong if image == network else right for image in range(3)] for network in range(3)]
    *each, together = accuracies([predicted(members, [0, 0, 0])], 3, ALONE)
    assert all(member.top1 == pytest.approx(2 / 3) for member in each)
    assert together.top1 == 0


# Evaluation


@pytest.mark.parametrize("crops", [1, 10])
def test_processes_share_the_images_and_all_have_the_whole_result(
    crops: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, source = TinyNetwork(TINY).eval(), open_source(data, "val")
    whole = evaluate(network, source, 32, crops, group=ALONE)
    world, shares, found = 5, [], {}
    together = Barrier(world)

    def add_up(self: Processes, tensor: Tensor) -> Tensor:
        shares.append(tensor.clone())
        together.wait()
        return tensor.copy_(torch.stack(shares).sum(0))

    def work(rank: int) -> None:
        found[rank] = evaluate(
            network, source, 32, crops, group=Processes(rank, world, torch.device("cpu"))
        )

    monkeypatch.setattr(Processes, "sum", add_up)
    threads = [Thread(target=work, args=[rank]) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [share[0, 2].item() for share in shares].count(0) == 0
    for accuracy in found.values():
        assert (accuracy.top1, accuracy.top5, accuracy.n) == (whole.top1, whole.top5, whole.n)
        assert accuracy.loss == pytest.approx(whole.loss, rel=1e-6)
    assert len(found) == world


def test_nothing_to_evaluate_is_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(write_folder(tmp_path, train=1, val=1), "val")
    for path in (tmp_path / "val").glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image that can be read"):
        evaluate(TinyNetwork(TINY).eval(), source, 32, group=ALONE)
    assert all(f"{name}/000.JPEG" in caplog.text for name in source.classes)


def test_several_networks_are_evaluated_as_each_of_them_is(data: Path) -> None:
    torch.manual_seed(0)
    source = open_source(data, "val")
    networks = [TinyNetwork(TINY).eval() for _ in range(3)]
    *each, together = accuracies(predict(networks, source, 32, group=ALONE), 3, ALONE)
    assert each == [evaluate(network, source, 32, group=ALONE) for network in networks]
    assert together.loss <= sum(accuracy.loss for accuracy in each) / 3
