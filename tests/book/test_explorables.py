"""The panels that a reader can move: their arithmetic against bnlib and torch, and their controls.

Each opens in Chromium on a bare page of its own, as ``explorable`` writes it, with random data.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from playwright.sync_api import sync_playwright

from bnlib import batch_norm
from bnlib.book.explorables import explorable
from bnlib.imagenet.evaluation.curves import steps_to_level
from bnlib.inception import bn_inception, module_costs
from bnlib.inception.table import MODULES
from bnlib.mnist import Figure1, train
from bnlib.whitening import whiten

SCRIPTS = Path(__file__).parents[2] / "_static" / "explorables"
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking".split()

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium: install it, for example with `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Panel:
    """A page with one panel; remembers what went wrong in it."""

    def __init__(self, browser, folder, name, data):
        place = explorable(name, name, "Try.", **data).data
        place = re.sub(r'"\.\./_static/explorables/', f'"{SCRIPTS.as_uri()}/', place)
        file = folder / f"{name}.html"
        file.write_text(f'<!doctype html><meta charset="utf-8"><body>{place}')
        self.name, self.errors = name, []
        self.page = browser.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("document.querySelector('.bn-says')?.textContent")

    def call(self, function, *arguments):
        """What a function of the panel's arithmetic gives."""
        call = f"(all) => window.bnExplorables.{self.name}.{function}(...all)"
        found = self.page.evaluate(call, json.loads(json.dumps(arguments)))
        assert not self.errors
        return found

    def seen(self):
        """The sentence, once it has caught up with the controls, and the picture."""
        self.page.wait_for_timeout(350)
        picture = self.page.locator("svg.bn-picture").evaluate("(svg) => svg.innerHTML")
        return self.page.locator(".bn-says").inner_text(), picture

    def set(self, label, value):
        self.page.get_by_label(label).evaluate(
            "(field, value) => { field.value = value; field.dispatchEvent(new Event('input')); }",
            str(value),
        )

    def changed_by(self, action):
        """The new sentence; both it and the picture must differ from those before."""
        before = self.seen()
        action()
        after = self.seen()
        assert before[0] != after[0]
        assert before[1] != after[1]
        assert "NaN" not in after[1]
        assert "not a number" not in after[0]
        assert not self.errors
        return after[0]


@pytest.fixture
def panel(browser, tmp_path):
    """Opens the panel of a name with these data."""
    opened = []

    def open_(name, **data):
        opened.append(Panel(browser, tmp_path, name, data))
        return opened[-1]

    yield open_
    for each in opened:
        each.page.close()


def agree(found, expected):
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


# --- Chapter 03: the bowl ------------------------------------------------------------------------

BOWL = {"points": [[1.0, 0.5], [-1, 1]], "covariance": [[9, 2.4], [2.4, 1]], "mean": [6, 2]}


def test_the_bowl_is_the_curvature_of_a_least_squares_loss(panel):
    bowl = panel("bowl", **BOWL)
    draw = torch.Generator().manual_seed(0)
    for _ in range(10):
        random = torch.randn(2, 2, generator=draw, dtype=torch.float64)
        x = torch.randn(50, 2, generator=draw, dtype=torch.float64) @ random
        x += 3 * torch.randn(2, generator=draw, dtype=torch.float64)
        S, mean = torch.cov(x.T, correction=0), x.mean(0)
        for inputs, treated in (
            ("as they are", x),
            ("centered", x - mean),
            ("scaled", batch_norm(x, eps=1e-300)),
            ("whitened", whiten(x, eps=0)),
        ):

            def loss(error, treated=treated):
                return (treated @ error).square().mean() / 2

            start = torch.randn(2, generator=draw, dtype=torch.float64)
            H = torch.autograd.functional.hessian(loss, start)
            agree(bowl.call("hessian", S.tolist(), mean.tolist(), inputs), H)
            found = bowl.call("eigen", H.tolist())
            agree([found["small"], found["large"]], torch.linalg.eigvalsh(H))
            axis = torch.tensor([found["angle"]], dtype=torch.float64)
            axis = torch.cat([axis.cos(), axis.sin()])
            agree(H @ axis, found["large"] * axis)

            path = [start.requires_grad_()]
            for _ in range(5):
                (gradient,) = torch.autograd.grad(loss(path[-1]), path[-1])
                path.append((path[-1] - 0.3 * gradient).detach().requires_grad_())
            agree(bowl.call("walk", H.tolist(), start.tolist(), 0.3, 5), torch.stack(path).detach())


def test_the_bowl_counts_the_steps_that_the_chapter_names(panel):
    bowl = panel("bowl", **BOWL)
    assert bowl.call("needed", (9.66476 / 0.33524 - 1) / (9.66476 / 0.33524 + 1)) == 67
    assert bowl.call("needed", (9 - 1) / (9 + 1)) == 21


def test_the_bowl_diverges_above_two_over_lambda_and_arrives_when_whitened(panel):
    bowl = panel("bowl", **BOWL)
    page = bowl.page
    limit, best = (page.get_by_text(words, exact=True) for words in ("Rate 2/λ", "Best rate"))
    assert "exactly" in bowl.changed_by(limit.click)
    rate = page.get_by_label("Learning rate")
    bowl.changed_by(lambda: rate.press("ArrowRight"))
    assert "diverges" in bowl.seen()[0]
    bowl.changed_by(lambda: page.locator("select").select_option("centered"))
    assert "67 steps" in bowl.changed_by(best.click)
    bowl.changed_by(lambda: page.locator("select").select_option("scaled"))
    assert "21 steps" in bowl.changed_by(best.click)
    bowl.changed_by(lambda: page.locator("select").select_option("whitened"))
    assert "the first step arrives" in bowl.seen()[0]
    assert "exactly" in bowl.changed_by(limit.click)


# --- Chapter 04: the company ---------------------------------------------------------------------


def company_data():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()
    x = batch_norm(x[:, None], eps=1e-300)[:, 0]
    return {"values": x.tolist(), "marked": int((x - 1.5).abs().argmin())}


def test_the_company_is_normalized_as_in_bnlib(panel):
    data = company_data()
    company = panel("company", **data)
    draw = torch.Generator().manual_seed(2)
    for m in (2, 3, 17, 256):
        x = 5 * torch.randn(m, generator=draw, dtype=torch.float64) - 3
        found = company.call("normalized", x.tolist())
        agree(found, batch_norm(x[:, None], eps=1e-300)[:, 0])
        assert max(map(abs, found)) <= (m - 1) ** 0.5 * (1 + 1e-12)
        agree(company.call("moments", x.tolist()), [x.mean(), x.std(correction=0)])
    agree(company.call("normalized", [1e6] + [0.0] * 16)[0], 4)
    z, values = 1.7, torch.tensor(data["values"], dtype=torch.float64)
    variance = 1 + z * (values**3).mean() + z**2 / 4 * ((values**4).mean() - 1)
    agree(company.call("predicted", data["values"], z), variance)


def test_the_company_changes_the_marked_example(panel):
    company = panel("company", **company_data())
    page = company.page
    company.changed_by(page.get_by_text("Draw another mini-batch").click)
    said = company.changed_by(lambda: company.set("Size m of the mini-batch", 3))
    assert "mini-batch of 16" in said
    handle = page.get_by_role("slider", name="value of the marked example")

    def far():
        for _ in range(100):
            handle.press("ArrowRight")

    said = company.changed_by(far)
    becomes = float(re.search(r"becomes (\d\.\d+)", said)[1])
    assert 3.4 < becomes < 15**0.5
    said = company.changed_by(lambda: company.set("Size m of the mini-batch", 0))
    assert "becomes 1." in said


# --- Chapter 08: the sphere ----------------------------------------------------------------------


def test_the_sphere_has_the_gradient_of_a_normalized_unit(panel):
    sphere = panel("sphere")
    draw = torch.Generator().manual_seed(0)
    u = whiten(torch.randn(50, 2, generator=draw, dtype=torch.float64), eps=0)
    for _ in range(10):
        w = torch.randn(2, generator=draw, dtype=torch.float64).requires_grad_()
        (expected,) = torch.autograd.grad(-torch.atan2(w[1], w[0]), w)
        agree(sphere.call("gradient", w.tolist()), expected)
        target = 6 * torch.rand(1, generator=draw, dtype=torch.float64)
        wanted = u @ torch.cat([target.cos(), target.sin()])
        x_hat = batch_norm((u @ w)[:, None], eps=1e-300)[:, 0]
        (expected,) = torch.autograd.grad((x_hat - wanted).square().mean() / 2, w)
        found = sphere.call("gradient", w.tolist(), target.item())
        agree(found, expected)
        assert abs(found[0] * w[0] + found[1] * w[1]) < 1e-12


def test_the_sphere_steps_as_torch_does(panel):
    sphere = panel("sphere")
    draw = torch.Generator().manual_seed(3)
    targets = torch.rand(30, generator=draw, dtype=torch.float64)
    w = torch.randn(2, generator=draw, dtype=torch.float64).requires_grad_()
    start, path = w.tolist(), [w.tolist()]
    optimizer = torch.optim.SGD([w], lr=0.4, weight_decay=0.1)
    for target in targets:
        optimizer.zero_grad()
        (1 - torch.cos(torch.atan2(w[1], w[0]) - target)).backward()
        optimizer.step()
        path.append(w.tolist())
    agree(sphere.call("walk", start, 0.4, 0.1, 30, targets.tolist()), path)
    before, after = (torch.tensor(p, dtype=torch.float64) for p in (path[:-1], path[1:]))
    turned = torch.atan2(after[:, 1], after[:, 0]) - torch.atan2(before[:, 1], before[:, 0])
    turned = torch.atan2(turned.sin(), turned.cos()).abs()
    agree(sphere.call("turns", path), turned)


def test_the_sphere_turns_by_a_quarter_and_settles_at_the_law(panel):
    sphere = panel("sphere")
    tangents = []
    for length in (1.0, 2.0):
        path = sphere.call("walk", [length, 0], 0.3, 0, 1, [])
        tangents.append(np.tan(sphere.call("turns", path)[0]))
    agree(tangents[0], 4 * tangents[1])
    path = sphere.call("walk", [1, 0], 0.3, 0.05, 2000, [])
    agree(np.cos(sphere.call("turns", path)[-1]), 1 - 0.3 * 0.05)  # to first order, the law

    sphere.changed_by(lambda: sphere.page.get_by_label("loss with a minimum").check())
    noisy = sphere.changed_by(lambda: sphere.set("Steps", 200))
    found, law = re.search(r"turn by ([\d.]+) .* is ([\d.]+)\d?\.$", noisy).groups()
    assert abs(float(found) / float(law) - 1) < 0.15
    assert "only grow" in sphere.changed_by(lambda: sphere.set("Weight decay", 0))


# --- Chapter 10: the drift and the map -----------------------------------------------------------


def drift_data(evaluations=11):
    draw = np.random.default_rng(5)
    network = {
        "heights": draw.integers(0, 99, (evaluations, 20)).tolist(),
        "percentiles": np.sort(draw.normal(size=(evaluations, 3))).tolist(),
    }
    other = network | {"percentiles": np.sort(draw.normal(size=(evaluations, 3))).tolist()}
    steps = list(range(0, 50 * evaluations, 50))
    return {"steps": steps, "ends": [-4, 4], "bn": network, "plain": other}


def test_the_drift_wanders_as_far_as_the_chapter_says(panel):
    drift = panel("drift", **drift_data())
    config = Figure1(seeds=(0,), hidden=(7, 7, 5), steps=60, evaluate_every=3, dataset="digits")
    history = train(config)
    history = replace(history, percentiles=history.percentiles.astype(float))
    medians = history.percentiles[0, :, 1]
    steps = history.steps.tolist()
    last = len(steps) - 1
    found = [drift.call("wandered", steps, unit.tolist(), last) for unit in medians.T]
    agree(found, history.drift()[0])
    unit = medians[:, 2].tolist()
    assert drift.call("wandered", steps, unit, 1) == 0
    agree(drift.call("wandered", steps, unit, 5), np.ptp(unit[2:6]))


def test_the_drift_follows_its_step(panel):
    data = drift_data()
    drift = panel("drift", **data)
    assert "step 500" in drift.seen()[0]
    ridges = "svg.bn-picture path[stroke-width='1']"
    before = drift.page.locator(ridges).count()
    said = drift.changed_by(lambda: drift.set("Training step", 0))
    assert "step 0 " in said
    assert "wandered" not in said
    assert before == 2 * 10 + drift.page.locator(ridges).count()


def test_the_drift_plays_from_the_start_until_it_is_stopped(panel):
    drift = panel("drift", **drift_data())
    button = drift.page.get_by_role("button")

    def watch():
        button.click()
        assert button.inner_text() == "Stop"
        drift.page.wait_for_timeout(1500)
        button.click()

    assert "step 500" not in drift.changed_by(watch)
    assert button.inner_text() == "Watch it train"


def map_data():
    draw = np.random.default_rng(6)
    rates, deviations, steps = [0.01, 0.1, 1, 10], [0.03, 0.3, 3], [0, 100, 200, 300]
    curves = {
        key: draw.uniform(0.1, 1, (len(deviations), len(rates), len(steps))).round(4)
        for key in ("bn", "plain")
    }
    plain = {key: values.tolist() for key, values in curves.items()}
    return {"rates": rates, "deviations": deviations, "steps": steps, "begin": [1, 1]} | plain


def test_the_map_finds_the_best_setting_and_the_first_step_at_a_level(panel):
    data = map_data()
    chart = panel("map", **data)
    for key in ("bn", "plain"):
        curves = np.array(data[key])
        for worst, extreme in ((False, np.argmax), (True, np.argmin)):
            expected = np.unravel_index(extreme(curves[..., -1]), curves.shape[:2])
            assert chart.call("best", data[key], worst) == list(expected)
        for curve in curves.reshape(-1, curves.shape[-1]):
            at = curve >= 0.6
            expected = data["steps"][at.argmax()] if at.any() else float("inf")
            assert chart.call("reached", data["steps"], curve.tolist(), 0.6) == expected


def test_the_map_takes_a_cell_by_click_or_field_for_each_network(panel):
    data = map_data()
    chart = panel("map", **data)
    page = chart.page
    said = chart.changed_by(lambda: page.get_by_label("with BN: rate").select_option("10"))
    assert f"{100 * data['bn'][1][3][-1]:.1f} % with BN" in said
    assert f"{100 * data['plain'][1][1][-1]:.1f} % without" in said
    chart.changed_by(page.locator("svg rect[style*=pointer]").nth(0).click)
    assert page.get_by_label("without BN: deviation").input_value() == "0.03"
    assert page.get_by_label("without BN: rate").input_value() == "0.01"
    said = chart.changed_by(page.get_by_text("Each at its best", exact=True).click)
    top = {key: 100 * np.array(data[key])[..., -1].max() for key in ("bn", "plain")}
    assert f"{top['bn']:.1f} % with BN and {top['plain']:.1f} % without" in said


# --- Chapter 11: Figure 5 ------------------------------------------------------------------------

ROWS = [row._asdict() for row in MODULES]


@pytest.mark.parametrize("stem", ["plain", "separable"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", [96, 128])
def test_figure_5_costs_what_bnlib_counts(panel, projection, bias, stem):
    figure = panel("figure5", rows=ROWS)
    with torch.device("meta"):
        network = bn_inception(pool_proj_4cd=projection, conv_bias=bias, stem=stem)
    expected = {
        cost.name.removeprefix("inception."): [cost.parameters, cost.multiply_adds]
        for cost in module_costs(network)
        if cost.parameters
    }
    options = {"projection": projection, "bias": bias, "separable": stem == "separable"}
    assert figure.call("network", ROWS, options) == expected
    modules = figure.call("repaired", ROWS, projection)
    shapes = {cost.name: cost.output for cost in module_costs(network)}
    for row in modules:
        channels, side, _ = shapes[f"inception.{row['type']}"]
        assert (row["channels"], row["sideAfter"]) == (channels, side)
        assert sum(row["branches"]) == channels


@pytest.mark.parametrize(("projection", "channels"), [(96, 576), (128, 608)])
def test_figure_5_counts_auxiliary_classifiers(panel, projection, channels):
    figure = panel("figure5", rows=ROWS)
    for hidden in (768, 1024):
        on = {
            maps: sum(
                parameter.numel()
                for layer in (
                    torch.nn.Conv2d(maps, 128, 1),
                    torch.nn.Linear(4 * 4 * 128, hidden),
                    torch.nn.Linear(hidden, 1000),
                )
                for parameter in layer.parameters()
            )
            for maps in (576, channels)
        }
        assert figure.call("heads", ROWS, projection, [1, hidden]) == on[channels]
        assert figure.call("heads", ROWS, projection, [2, hidden]) == on[channels] + on[576]
    assert figure.call("heads", ROWS, projection, [0, 0]) == 0


def test_figure_5_shows_the_sum_that_fails_and_the_needle_at_the_paper(panel):
    figure = panel("figure5", rows=ROWS)
    page = figure.page
    assert "the figure prints 576" in figure.seen()[1]
    said = figure.changed_by(
        lambda: page.get_by_label("Pool projection").select_option("96"),
    )
    assert "as printed" in figure.seen()[1]
    assert "11.19 million parameters, 2.41 million short" in said
    said = figure.changed_by(
        lambda: page.get_by_label("Auxiliary classifiers").select_option("one of 768"),
    )
    assert "rounds to the paper" in said
    figure.changed_by(page.get_by_label("biases").check)
    figure.changed_by(page.get_by_label("separable").check)
    figure.changed_by(page.locator("svg rect[fill=transparent]").nth(2).click)
    assert page.get_by_label("Row of Figure 5").input_value() == "3c"
    assert "576 channels, 14×14 (the figure prints 28×28)" in figure.seen()[1]


# --- Chapter 12: steps to a level ----------------------------------------------------------------


def with_none(values):
    return [None if np.isnan(value) else float(value) for value in values]


def test_the_steps_to_a_level_are_bnlibs(panel):
    curve = {"steps": [1, 2], "seeds": {"0": [0.1, 0.2]}}
    arms = {"A": {"inception": curve}}
    steps = panel("steps", arms=arms, names={"inception": "Inception"}, printed={})
    draw = np.random.default_rng(7)
    for trial in range(40):
        at = np.cumsum(draw.integers(1, 1000, 12))
        values = np.sort(draw.uniform(size=12)) + draw.normal(scale=0.1, size=12)
        values[12 - trial % 5 :] = np.nan
        for level in (-1, *draw.uniform(size=5), *values[:3], 2):
            expected = steps_to_level(pd.Series(values, at), level)
            found = steps.call("stepsTo", at.tolist(), with_none(values), float(level))
            if np.isinf(expected):
                assert found == expected
            else:
                agree(found, expected)
        other = draw.uniform(size=12)
        found = steps.call("mean", [with_none(values), with_none(other)])
        expected = pd.DataFrame([values, other]).mean(skipna=False)
        assert [each is None for each in found] == expected.isna().tolist()
        agree(found[: 12 - trial % 5], expected.dropna())


def test_the_steps_follow_the_level_the_end_and_the_seed(panel):
    at = [100, 200, 400, 800]
    slow = {"0": [0.1, 0.2, 0.3, 0.4], "1": [0.1, 0.2, 0.3, 0.5]}
    fast = {"0": [0.2, 0.4, 0.6, 0.6], "1": [0.3, 0.45, 0.6, 0.7]}
    arm = {"inception": {"steps": at, "seeds": slow}, "bn-x5": {"steps": at, "seeds": fast}}
    names = {"inception": "Inception", "bn-x5": "BN-x5"}
    steps = panel("steps", arms={"A": arm}, names=names, printed={"bn-x5": 14.8})
    page = steps.page
    said = steps.changed_by(lambda: page.get_by_label("Seed").select_option("0"))
    assert "reaches 40.0 % after 800 steps" in said
    assert "needs 4 times fewer" in said
    said = steps.changed_by(lambda: steps.set("Stop Inception after", 1))
    assert "reaches 20.0 % after 200 steps" in said
    assert "needs 2 times fewer" in said
    said = steps.changed_by(lambda: steps.set("Accuracy level", 0.5))
    assert not page.get_by_label("keep the level").is_checked()
    assert "does not reach 50.0 %" in said
    assert "BN-x5 needs 300 steps" in said
    steps.changed_by(page.get_by_label("keep the level").check)
