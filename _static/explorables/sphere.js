/* Chapter 08: a weight vector whose length the loss does not feel. */
(function () {
  "use strict";

  const UP = Math.PI / 2;

  /* The gradient of a loss of the direction alone.  Without a target the loss is minus the angle
     of w, so that on the unit circle its gradient has length 1 everywhere; with one it is 1 minus
     the cosine of the angle between w and the target. */
  function gradient([x, y], target) {
    const squared = x * x + y * y;
    const along = target === undefined ? -1 : -Math.sin(target - Math.atan2(y, x));
    return [(-along * y) / squared, (along * x) / squared];
  }

  /* w before each step and after the last; `targets[t]` is that of the t-th mini-batch. */
  function walk(w, rate, decay, steps, targets) {
    const path = [w];
    for (let t = 0; t < steps; t++) {
      const g = gradient(path[t], targets[t]);
      path.push(path[t].map((each, i) => each - rate * (g[i] + decay * each)));
    }
    return path;
  }

  /* The angle by which each step turns w. */
  function turns(path) {
    return path.slice(1).map(([x, y], t) => {
      const [p, q] = path[t];
      return Math.abs(Math.atan2(p * y - q * x, p * x + q * y));
    });
  }

  const rootMeanSquare = (values) => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);

  bnExplorable("sphere", { gradient, walk, turns, rootMeanSquare }, function (panel) {
    const { number, random } = window.bnExplorables;
    const svg = panel.picture(462);
    const plane = panel.plot(svg, { left: 34, top: 34, width: 200, height: 200 }, {
      x: [-1, 1],
      y: [-1, 1],
      title: "w, step by step",
    });
    const lengths = panel.plot(svg, { left: 300, top: 34, width: 165, height: 200 }, {
      x: [0, 1],
      y: [0, 1],
      title: "length of w",
    });
    const angles = panel.plot(svg, { left: 55, top: 296, width: 410, height: 120 }, {
      x: [0, 1],
      y: [0.01, 2.5],
      ylog: true,
      yticks: [0.01, 0.1, 1],
      xlabel: "step",
      title: "angle by which a step turns w (rad)",
    });
    const length = panel.range("Length of w at the start", { min: 0.5, max: 2, step: 0.1, value: 1 });
    const rate = panel.logRange("Learning rate", { min: 0.1, max: 1, value: 0.3 });
    const decay = panel.range("Weight decay", { min: 0, max: 0.2, step: 0.01, value: 0.05 });
    const steps = panel.range("Steps", { min: 4, max: 200, step: 1, value: 100 });
    const noisy = panel.check("loss with a minimum (upwards), and the noise of mini-batches", false);

    panel.draw = function () {
      const [r, eta, c, count] = [length, rate, decay, steps].map((field) => field.read());
      const draw = random(1);
      const targets = Array.from({ length: count }, () => (noisy.read() ? UP + 2 * draw() - 1 : undefined));
      const path = walk([r, 0], eta, c, count, targets);
      const sizes = path.map((w) => Math.hypot(...w));
      const turned = turns(path);
      const law = Math.sqrt(2 * eta * c);

      const reach = Math.max(2.4, 1.2 * Math.max(...sizes));
      for (const plot of [plane, lengths, angles]) plot.clear();
      plane.scale([-reach, reach], [-reach, reach]);
      const circle = Array.from({ length: 91 }, (_, i) => (i * Math.PI) / 45);
      const around = circle.map((a) => [r * Math.cos(a), r * Math.sin(a)]);
      plane.line(around, "ink", { "stroke-dasharray": "4 4", "stroke-width": 1.2 });
      plane.line([[0, 0], path[0]], "ink", { "stroke-width": 1.5 });
      if (noisy.read()) plane.text([0, 0.88 * reach], "minimum", "ink", { "text-anchor": "middle" });
      plane.line(path, "blue", { "stroke-width": 1, opacity: 0.7 });
      for (const w of path) plane.dot(w, "blue", { r: 2.2 });
      plane.line([[0, 0], path[count]], "blue");
      plane.dot(path[count], "blue");

      lengths.scale([0, count], [0, 1.15 * Math.max(...sizes)]);
      lengths.line(sizes.map((each, t) => [t, each]), "blue");
      angles.scale([0, count], [0.01, 2.5]);
      turned.forEach((each, t) => angles.dot([t + 1, each], "blue", { r: 2.2, opacity: 0.5 }));
      const smooth = turned.map((_, t) => [t + 1, rootMeanSquare(turned.slice(Math.max(t - 9, 0), t + 1))]);
      angles.line(smooth, "blue");
      if (c > 0) {
        angles.line([[0, law], [count, law]], "ink", { "stroke-dasharray": "7 5" });
        angles.text([count, 1.3], "- - √(2 × rate × decay)", "ink", { "text-anchor": "end" });
      }

      const last = rootMeanSquare(turned.slice(-Math.ceil(count / 4)));
      const again = turns(walk([2 * r, 0], eta, c, 1, targets))[0];
      panel.say(
        `The first step turns w by ${number(turned[0])}; were w twice as long, by ${number(again)}. ` +
          `The length goes from ${number(r)} to ${number(sizes[count])}. ` +
          (c > 0
            ? `The last quarter of the steps turn by ${number(last)} each (root mean square); ` +
              `√(2 × rate × decay) is ${number(law)}` +
              (eta * c * count < 1 ? ": they are still on their way to it." : ".")
            : `Without decay it can only grow; the last step turns w by ${number(turned[count - 1])}.`)
      );
    };
  });
})();
