"""The option ``width``: every channel count of Figure 5 times a factor."""

import csv
import math

import pytest
import torch
from torch import nn

from bnlib import bn_inception
from bnlib.inception import load_cadene, module_costs, to_cadene
from bnlib.inception.table import FIGURE5, MODULES, repaired, scaled
from bnlib.runs import data_folder

WIDTHS = [0.25, 0.5, 1.0, 1.3]


def rounded(channels, width):
    """The multiple of 4 that is nearest to channels * width, upward between two; 8 or more."""
    below = math.floor(channels * width / 4) * 4
    return max(8, below + 4 if channels * width - below >= 2 else below)


def expected_parts(width, projection):
    """(parameters, channels) of conv1, of conv2 with its reduction, and of each module.

    Counted from the CSV of Figure 5, not from the table in the code.
    """
    path = data_folder() / "paper" / "figure5.csv"
    lines = {line["type"]: line for line in csv.DictReader(path.open(encoding="utf-8"))}

    def conv(kernel, entering, leaving):
        return kernel**2 * entering * leaving + 2 * leaving

    first, reduced, entering = (rounded(n, width) for n in (64, 64, 192))
    yield conv(7, 3, first), first
    yield conv(1, first, reduced) + conv(3, reduced, entering), entering
    for name, line in lines.items():
        if not name.startswith("inception"):
            continue
        columns = ("1x1", "3x3 reduce", "3x3", "double 3x3 reduce", "double 3x3")
        a, b, c, d, e = (rounded(int(line[k]), width) if line[k] != "0" else 0 for k in columns)
        parameters = conv(1, entering, b) + conv(3, b, c) + conv(1, entering, d)
        parameters += conv(3, d, e) + conv(3, e, e)
        last = line["pool + proj"].split(" + ")[1]
        if last == "pass through":
            entering += c + e
        else:
            p = projection if name[-3:-1] in ("4c", "4d") else int(last)
            p = rounded(p, width)
            parameters += conv(1, entering, a) + conv(1, entering, p)
            entering = a + c + e + p
        yield parameters, entering


@pytest.mark.parametrize("projection", [96, 128])
@pytest.mark.parametrize("width", WIDTHS)
def test_parts_have_the_channels_and_parameters_of_the_scaled_figure(width, projection):
    with torch.device("meta"):
        model = bn_inception(width=width, pool_proj_4cd=projection)
    costs = {cost.name: cost for cost in module_costs(model)}
    expected = list(expected_parts(width, projection))
    modules = [costs[f"inception.{row.type}"] for row in MODULES]
    stem = costs["conv2_reduce"].parameters + costs["conv2"].parameters
    found = [
        (costs["conv1"].parameters, costs["conv1"].output[0]),
        (stem, costs["conv2"].output[0]),
        *((cost.parameters, cost.output[0]) for cost in modules),
    ]
    assert found == expected
    features = expected[-1][1]
    assert model.num_features == features
    assert costs["fc"].parameters == 1000 * (features + 1)
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(parameters for parameters, _ in expected) + 1000 * (features + 1)


def test_width_one_changes_nothing():
    assert tuple(scaled(row, 1.0) for row in FIGURE5) == FIGURE5
    states = []
    for options in ({}, {"width": 1.0}):
        torch.manual_seed(5)
        states.append(bn_inception(num_classes=10, **options).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_tiny_widths_are_rounded_up_to_eight_channels():
    rows = repaired(96, 1e-6)
    counts = {n for row in rows for n in (*row[5:10], row.projection)}
    assert counts == {0, 8}
    assert [row.output[1] for row in rows] == [32, 32, 48, 32, 32, 32, 32, 48, 32, 32]
    model = bn_inception(width=1e-6, num_classes=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)} == {8}


def test_channels_are_multiples_of_four_and_grow_with_width():
    before = None
    for width in (0.1, 0.3, 0.37, 0.6, 1.0, 1.7):
        counts = [n for row in repaired(96, width) for n in (*row[5:10], row.projection)]
        assert all(n % 4 == 0 for n in counts)
        assert before is None or all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts


@pytest.mark.parametrize("width", [0.25, 0.5])
def test_feature_maps_have_the_scaled_channels(width):
    maps = bn_inception(width=width, features_only=True)(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [n * width for n in (64, 192, 320, 576, 1024)]


@pytest.mark.parametrize(
    "options", [{}, {"stem": "separable"}, {"normalization": "per-activation-last"}]
)
def test_a_narrow_network_learns_a_batch_by_heart(options):
    torch.manual_seed(0)
    model = bn_inception(width=0.25, num_classes=4, image_size=32, **options)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), abs=0.5)
    assert losses[-1] < 0.3


@pytest.mark.parametrize("width", [0, -0.5, math.inf, math.nan, "0.5", None])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ValueError, match=f"width is {width!r}; it must be a positive, finite"):
        bn_inception(width=width)


def test_published_weights_are_of_width_one():
    narrow = bn_inception(width=0.5, pool_proj_4cd=128)
    with pytest.raises(ValueError, match=r"shape \[32, 3, 7, 7\], not \[64, 3, 7, 7\]"):
        to_cadene(narrow)
    with pytest.raises(TypeError, match=r"options \['width'\]"):
        load_cadene({}, width=0.5)
