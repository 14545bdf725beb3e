/* Chapter 02: a bias that grows when the mean is taken for a constant. */
(function () {
  "use strict";

  const mean = (values) => values.reduce((sum, each) => sum + each, 0) / values.length;

  /* x = u + b, centered. */
  function centered(u, b) {
    const x = u.map((each) => each + b);
    const middle = mean(x);
    return x.map((each) => each - middle);
  }

  /* The loss, half the mean square of what misses the targets v. */
  function loss(u, v, b) {
    return mean(centered(u, b).map((each, i) => (each - v[i]) ** 2)) / 2;
  }

  /* The gradient of the loss with respect to b.  With `detach` the mean is a constant to it;
     otherwise the part through the mean cancels the rest. */
  function gradient(u, v, b, detach) {
    const outputs = centered(u, b).map((each, i) => each - v[i]);
    return mean(detach ? outputs : outputs.map((each) => each - mean(outputs)));
  }

  /* b before each step and after the last. */
  function walk(u, v, rate, steps, detach) {
    const b = [0];
    for (let t = 0; t < steps; t++) b.push(b[t] - rate * gradient(u, v, b[t], detach));
    return b;
  }

  bnExplorable("bias", { centered, loss, gradient, walk }, function (panel) {
    const { number } = window.bnExplorables;
    const v = panel.data.targets;
    const svg = panel.picture(430);
    const numbers = panel.plot(svg, { left: 60, top: 40, width: 400, height: 80 }, {
      x: [-2, 2],
      y: [0, 1],
      yticks: [],
      title: "six inputs (drag one), six outputs",
    });
    const bias = panel.plot(svg, { left: 60, top: 200, width: 170, height: 170 }, {
      x: [0, 1],
      y: [0, 1],
      xlabel: "step",
      ylabel: "bias b",
    });
    const losses = panel.plot(svg, { left: 290, top: 200, width: 170, height: 170 }, {
      x: [0, 1],
      y: [0, 1],
      xlabel: "step",
      ylabel: "loss",
    });
    const points = panel.data.inputs.map((value, i) =>
      panel.handle(numbers, `input ${i + 1}`, { min: -2, max: 2, step: 0.1, value, y: 0.8, color: "ink" })
    );
    const rate = panel.logRange("Learning rate", { min: 0.01, max: 1, value: 0.1 });
    const steps = panel.range("Steps", { min: 1, max: 200, step: 1, value: 100 });
    const detach = panel.check("take the mean for a constant (detach)", true);

    panel.draw = function () {
      const u = points.map((point) => point.read());
      const b = walk(u, v, rate.read(), steps.read(), detach.read());
      const L = b.map((each) => loss(u, v, each));
      const color = detach.read() ? "green" : "ink";
      numbers.clear();
      const outputs = centered(u, b[b.length - 1]);
      outputs.forEach((each, i) => {
        numbers.line([[u[i], 0.8], [each, 0.2]], "ink", { "stroke-width": 1, opacity: 0.6 });
        numbers.dot([each, 0.2], color);
      });
      for (const plot of [bias, losses]) plot.clear();
      bias.scale([0, steps.read()], [0, Math.max(1, 1.1 * b[b.length - 1])]);
      losses.scale([0, steps.read()], [0, 1.2 * Math.max(...L, 0.1)]);
      bias.line(b.map((each, t) => [t, each]), color);
      losses.line(L.map((each, t) => [t, each]), color);
      panel.say(
        detach.read()
          ? `After ${steps.read()} steps the bias is ${number(b[b.length - 1])}, and the loss is ` +
              `${number(L[L.length - 1])}, as at the first step: the mean takes every step back.`
          : `With the whole gradient the bias stays at 0: no step of it can lower the loss, ` +
              `${number(L[0])}, and the gradient knows.`
      );
    };
  });
})();
