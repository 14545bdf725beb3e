"""What the parts of BN-Inception cost, against counts made by other means."""

import csv

import pytest
import torch
from torch import nn

from bnlib.inception import bn_inception, module_costs
from bnlib.inception.table import FIGURE5, repaired
from bnlib.runs import data_folder


def without_memory(**options):
    with torch.device("meta"):
        return bn_inception(**options)


def by_name(model, *size):
    return {cost.name: cost for cost in module_costs(model, *size)}


def conv(kernel, entering, leaving, side):
    """Weights with gamma and beta, and multiply-adds, from the definition of a convolution."""
    weights = kernel**2 * entering * leaving
    return weights + 2 * leaving, weights * side**2


def test_the_csv_of_figure_5_says_what_the_table_in_the_code_says():
    path = data_folder() / "paper" / "figure5.csv"
    lines = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len(lines) == len(FIGURE5) == 15
    for line, row in zip(lines, FIGURE5, strict=True):
        module = row.depth == 3
        side, channels = row.output
        numbers = row[5:10]
        assert line["output"] == f"{side}x{side}x{channels}"
        assert int(line["depth"]) == row.depth
        columns = ("1x1", "3x3 reduce", "3x3", "double 3x3 reduce", "double 3x3")
        assert tuple(int(line[column] or 0) for column in columns) == numbers
        assert all(line[column] for column in columns) == module
        if module:
            assert line["type"] == f"inception ({row.type})"
            last = str(row.projection) if row.projection else "pass through"
            assert line["pool + proj"] == f"{row.pool} + {last}"
            assert line["patch/stride"] == ("stride 2" if row.stride == 2 else "")
        else:
            assert line["patch/stride"] == f"{row.patch}x{row.patch}/{row.stride}"
            assert line["pool + proj"] == ""


@pytest.mark.parametrize("projection", [96, 128])
def test_parameters_of_the_parts_add_up_to_those_of_the_network(projection):
    model = without_memory(pool_proj_4cd=projection)
    costs = module_costs(model)
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in model.parameters())


def test_every_module_costs_what_its_line_of_the_table_says():
    costs, entering = by_name(without_memory()), 192
    for row in repaired(96):
        side = row.output[0]
        after = side // row.stride
        layers = [
            conv(1, entering, row.reduce3x3, side),
            conv(3, row.reduce3x3, row.conv3x3, after),
            conv(1, entering, row.reduce_double3x3, side),
            conv(3, row.reduce_double3x3, row.double3x3, side),
            conv(3, row.double3x3, row.double3x3, after),
        ]
        if row.stride == 1:
            layers += [
                conv(1, entering, row.conv1x1, side),
                conv(1, entering, row.projection, side),
            ]
        cost = costs[f"inception.{row.type}"]
        expected = tuple(map(sum, zip(*layers, strict=True)))
        assert (cost.parameters, cost.multiply_adds) == expected
        assert cost.output == (row.output[1], after, after)
        entering = row.output[1]


def test_the_parts_stand_in_the_order_in_which_they_run():
    modules = [f"inception.{row.type}" for row in repaired(96)]
    stem = ["conv1", "pool1", "conv2_reduce", "conv2", "pool2"]
    assert list(by_name(without_memory())) == [*stem, *modules, "global_pool", "fc"]


def test_a_separable_stem_is_a_depthwise_and_a_1x1_convolution():
    cost = by_name(without_memory(stem="separable"))["conv1"]
    weights = 3 * 8 * 7 * 7 + 24 * 64
    assert cost.parameters == weights + 2 * 64
    assert cost.multiply_adds == weights * 112**2


def test_work_grows_with_the_area_but_the_classifier_s_does_not():
    small, large = (by_name(without_memory(), side) for side in (64, 128))
    assert large["fc"] == small["fc"]
    for name in small.keys() - {"fc"}:
        assert large[name].multiply_adds == 4 * small[name].multiply_adds
        assert large[name].parameters == small[name].parameters
    wide = by_name(without_memory(), (64, 128))
    assert wide["conv1"].output == (64, 32, 64)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_with_values_is_left_as_it_is(training):
    model = bn_inception(num_classes=10).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    costs = module_costs(model, 64)
    assert costs[-1].output == (10,)
    assert model.training is training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "none"},
        {"normalization": "per-activation-last"},
        {"features_only": True},
        {"num_classes": 0, "global_pool": "none"},
        {"in_chans": 1, "lrn": True, "dropout": 0.4, "activation": "sigmoid"},
    ],
)
def test_every_kind_of_network_can_be_counted(options):
    model = without_memory(**options)
    costs = module_costs(model)
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in model.parameters())
    assert costs[0].multiply_adds == model.images.channels * 49 * 64 * 112**2


def test_exchanged_modules_are_counted_as_they_are():
    model = without_memory()
    model.fc = nn.Linear(1024, 5, device="meta")
    assert by_name(model)["fc"].parameters == 5 * 1025


def test_what_is_no_bn_inception_is_refused():
    with pytest.raises(TypeError, match="model is a Linear"):
        module_costs(nn.Linear(3, 4))


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="at least 32"):
        module_costs(without_memory(), 31)
