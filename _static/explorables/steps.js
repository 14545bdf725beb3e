/* Chapter 12: how many times fewer steps, as the level, Inception's end and the seed have it. */
(function () {
  "use strict";

  const COLORS = ["orange", "blue", "green", "purple", "pink"]; // as in the chapter's figures
  const MEAN = "mean of all";

  /* Where a curve first reaches a level, linear between evaluations; null reaches nothing. */
  function stepsTo(steps, values, level) {
    const after = values.findIndex((value) => value !== null && value >= level);
    if (after < 0) return Infinity;
    const before = after ? values[after - 1] : null;
    if (before === null) return steps[after];
    const part = (level - before) / (values[after] - before);
    return steps[after - 1] + part * (steps[after] - steps[after - 1]);
  }

  /* The mean over seeds; null as soon as one of them has diverged. */
  function mean(curves) {
    const whole = (t) => curves.every((curve) => curve[t] !== null);
    const at = (t) => curves.reduce((sum, curve) => sum + curve[t], 0) / curves.length;
    return curves[0].map((_, t) => (whole(t) ? at(t) : null));
  }

  bnExplorable("steps", { stepsTo, mean }, function (panel) {
    const { number } = window.bnExplorables;
    const { arms, names, printed } = panel.data;
    const others = Object.keys(names).slice(1); // the first is Inception
    const color = (name) => COLORS[Object.keys(names).indexOf(name)];
    const every = Object.values(arms).flatMap((arm) => Object.values(arm));
    const highest = Math.max(...every.flatMap(({ seeds }) => Object.values(seeds).flat()));
    const { inception } = Object.values(arms)[0];
    const end = inception.steps.length - 1;
    const percent = (value) => `${(100 * value).toFixed(1)} %`;
    const grouped = (value) => Math.round(value).toLocaleString("en");

    const svg = panel.picture(322 + 30 * others.length + 52);
    const curves = panel.plot(svg, { left: 60, top: 34, width: 400, height: 210 }, {
      x: [inception.steps[0], inception.steps[end]],
      y: [0, 1.08 * highest],
      xlog: true,
      xlabel: "training step",
      ylabel: "held-out accuracy",
    });
    const ratios = panel.plot(svg, { left: 150, top: 322, width: 310, height: 30 * others.length }, {
      x: [0.3, 100],
      y: [others.length, 0],
      xlog: true,
      yticks: [],
      xlabel: "times fewer steps than Inception",
    });
    const arm = panel.choice("Learning rates", Object.keys(arms));
    const seed = panel.choice("Seed", [MEAN, ...Object.keys(inception.seeds)]);
    const stop = panel.range("Stop Inception after", {
      min: 1,
      max: end,
      step: 1,
      value: end,
      show: () => `${grouped(inception.steps[stop.read()])} steps`,
    });
    const level = panel.range("Accuracy level", {
      min: 0.05,
      max: highest,
      step: 0.001,
      value: highest,
      show: percent,
    });
    const tied = panel.check("keep the level at Inception's best", true);
    const untie = (event) => event.target === level && (tied.checked = false);
    panel.controls.addEventListener("input", untie, true); // before the level is drawn

    panel.draw = function () {
      const chosen = arms[arm.read()];
      const curve = ({ seeds }) =>
        seed.read() === MEAN ? mean(Object.values(seeds)) : seeds[seed.read()] || [];
      const slow = curve(chosen.inception);
      const run = slow.slice(0, stop.read() + 1);
      if (tied.read()) {
        level.value = Math.max(...run);
        level.tell();
      }
      const goal = tied.read() ? Math.max(...run) : level.read();
      const reference = stepsTo(inception.steps, run, goal);

      const draw = (name, steps, values, more) => {
        const points = values.map((value, t) => [steps[t], value]);
        curves.line(points.filter((point) => point[1] !== null), color(name), more);
      };
      curves.clear();
      ratios.clear();
      curves.line([[curves.x[0], goal], [curves.x[1], goal]], "ink", { "stroke-dasharray": "6 4" });
      draw("inception", inception.steps, slow, { opacity: 0.25 });
      draw("inception", inception.steps, run);
      if (reference < Infinity) curves.dot([reference, goal], "orange");
      curves.text([0, 0], names.inception, "orange", { x: 460, y: 24, "text-anchor": "end" });
      ratios.line([[1, 0], [1, others.length]], "orange");

      const told = others.map((name, k) => {
        const label = { x: 142, y: ratios.Y(k + 0.5) + 5, "text-anchor": "end" };
        ratios.text([0, 0], names[name], color(name), label);
        const paper = printed[name];
        if (paper)
          ratios.line([[paper, k + 0.1], [paper, k + 0.9]], "ink", { "stroke-dasharray": "3 3" });
        if (!chosen[name]) return `${names[name]} was not run`;
        draw(name, chosen[name].steps, curve(chosen[name]));
        const there = stepsTo(chosen[name].steps, curve(chosen[name]), goal);
        if (there === Infinity) return `${names[name]} never gets there`;
        curves.dot([there, goal], color(name));
        if (reference === Infinity) return `${names[name]} needs ${grouped(there)} steps`;
        const times = reference / there;
        const thick = { "stroke-width": 10, opacity: 0.5 };
        ratios.line([[1, k + 0.5], [times, k + 0.5]], color(name), thick);
        ratios.dot([times, k + 0.5], color(name));
        return `${names[name]} needs ${number(times, 2)} times fewer`;
      });
      const first =
        reference < Infinity
          ? `Inception reaches ${percent(goal)} after ${grouped(reference)} steps`
          : `Inception does not reach ${percent(goal)}`;
      panel.say(`${first}. ${told.join(", ")}. Dashed below: the paper's numbers.`);
    };
  });
})();
