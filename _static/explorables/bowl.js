/* Chapter 03: gradient descent in the bowl that two inputs make of a least-squares loss. */
(function () {
  "use strict";

  const COLORS = { "as they are": "orange", centered: "purple", scaled: "blue", whitened: "green" };

  /* The product of two matrices of 2 rows and columns. */
  function product([[a, b], [c, d]], [[e, f], [g, h]]) {
    return [[a * e + b * g, a * f + b * h], [c * e + d * g, c * f + d * h]];
  }

  /* The symmetric matrix V with V S V = I.  The root of S is (S + s I) / t, see below. */
  function inverseRoot([[a, b], [, d]]) {
    const s = Math.sqrt(a * d - b * b);
    const t = Math.sqrt(a + d + 2 * s);
    return [[(d + s) / (s * t), -b / (s * t)], [-b / (s * t), (a + s) / (s * t)]];
  }

  /* What is done to the inputs: x becomes A (x - shift). */
  function treatment(S, mean, inputs) {
    if (inputs === "as they are") return { A: [[1, 0], [0, 1]], shift: [0, 0] };
    if (inputs === "centered") return { A: [[1, 0], [0, 1]], shift: mean };
    const scales = [[1 / Math.sqrt(S[0][0]), 0], [0, 1 / Math.sqrt(S[1][1])]];
    return { A: inputs === "scaled" ? scales : inverseRoot(S), shift: mean };
  }

  /* The curvature of half the mean square of e . x: E[x x'] of the treated inputs. */
  function hessian(S, mean, inputs) {
    const { A, shift } = treatment(S, mean, inputs);
    const rest = mean.map((each, i) => each - shift[i]);
    return product(product(A, S.map((row, i) => row.map((each, j) => each + rest[i] * rest[j]))), A);
  }

  /* The larger eigenvalue, the smaller one, and the angle of the first one's direction. */
  function eigen([[a, b], [, d]]) {
    const large = (a + d) / 2 + Math.hypot((a - d) / 2, b);
    return { large, small: (a * d - b * b) / large, angle: Math.atan2(2 * b, a - d) / 2 };
  }

  /* The errors of the two weights before each step and after the last. */
  function walk(H, start, rate, steps) {
    const path = [start];
    for (let t = 0; t < steps; t++) {
      const e = path[t];
      path.push(e.map((each, i) => each - rate * (H[i][0] * e[0] + H[i][1] * e[1])));
    }
    return path;
  }

  /* How many steps leave 1 % of an error that each multiplies by `factor`. */
  const needed = (factor) => Math.max(1, Math.ceil(Math.log(0.01) / Math.log(factor) - 1e-9));

  bnExplorable("bowl", { inverseRoot, hessian, eigen, walk, needed }, function (panel) {
    const { number } = window.bnExplorables;
    const { points, mean } = panel.data;
    const deviations = panel.data.covariance.map((row, i) => Math.sqrt(row[i]));
    const svg = panel.picture(478);
    const cloud = panel.plot(svg, { left: 40, top: 34, width: 185, height: 185 }, {
      x: [-4, 14],
      y: [-9, 9],
      xlabel: "input 1",
      title: "the inputs",
    });
    const bowl = panel.plot(svg, { left: 280, top: 34, width: 185, height: 185 }, {
      x: [-1.25, 1.25],
      y: [-1.25, 1.25],
      xticks: [-1, 0, 1],
      yticks: [-1, 0, 1],
      xlabel: "error of weight 1",
      title: "loss, and 100 steps",
    });
    const left = panel.plot(svg, { left: 40, top: 312, width: 425, height: 115 }, {
      x: [0.005, 5],
      y: [0, 2],
      xlog: true,
      xlabel: "learning rate",
      title: "what a step leaves of an error",
    });
    const clip = panel.make("clipPath", { id: "bn-bowl-clip" }, svg);
    panel.make("rect", { x: 280, y: 34, width: 185, height: 185 }, clip);
    const inputs = panel.choice("Inputs", Object.keys(COLORS));
    const rate = panel.logRange("Learning rate", { min: 0.005, max: 5, value: 0.038 });
    rate.step = "any";
    const tilt = panel.range("Correlation of the inputs", {
      min: 0,
      max: 0.98,
      step: 0.01,
      value: panel.data.covariance[0][1] / deviations[0] / deviations[1],
    });

    function now() {
      const [s, t] = deviations;
      const S = [[s * s, tilt.read() * s * t], [tilt.read() * s * t, t * t]];
      const H = hessian(S, mean, inputs.read());
      return { S, H, ...eigen(H) };
    }
    const set = (value) => (rate.value = Math.log10(value));
    panel.button("Best rate", () => set(2 / (now().large + now().small)));
    panel.button("Rate 2/λ", () => set(2 / now().large));

    panel.draw = function () {
      const { S, H, large, small, angle } = now();
      const color = COLORS[inputs.read()];
      const { A, shift } = treatment(S, mean, inputs.read());
      cloud.clear();
      cloud.line([[-4, 0], [14, 0]], "ink", { "stroke-width": 1 });
      cloud.line([[0, -9], [0, 9]], "ink", { "stroke-width": 1 });
      for (const [u, v] of points) {
        const w = tilt.read() * u + Math.sqrt(1 - tilt.read() ** 2) * v;
        const x = [mean[0] - shift[0] + deviations[0] * u, mean[1] - shift[1] + deviations[1] * w];
        cloud.dot(A.map((row) => row[0] * x[0] + row[1] * x[1]), color, { r: 1.6, opacity: 0.7 });
      }

      bowl.clear();
      const inside = { "clip-path": "url(#bn-bowl-clip)" };
      const group = panel.make("g", inside, bowl.group);
      const unit = bowl.X(1) - bowl.X(0);
      for (const radius of [0.2, 0.4, 0.6, 0.8, 1]) {
        const [rx, ry] = [radius * unit, radius * unit * Math.sqrt(large / small)];
        const turn = `translate(${bowl.X(0)} ${bowl.Y(0)}) rotate(${(-angle * 180) / Math.PI})`;
        const style = "fill:none;stroke:var(--bn-ink);stroke-opacity:0.6";
        panel.make("ellipse", { rx, ry, transform: turn, style }, group);
      }
      const path = walk(H, [0.9, -0.9], rate.read(), 100).filter((e) => Math.hypot(...e) < 100);
      const places = path.map(([x, y]) => [bowl.X(x), bowl.Y(y)]);
      const style = `fill:none;stroke:var(--bn-${color})`;
      const d = "M" + places.map((at) => at.join(" ")).join("L");
      panel.make("path", { d, style, "stroke-width": 1.6 }, group);
      for (const [cx, cy] of places)
        panel.make("circle", { cx, cy, r: 3, style: `fill:var(--bn-${color})` }, group);

      left.clear();
      const lambdas = large / small < 1.0001 ? [large] : [large, small];
      left.line([[0.005, 1], [5, 1]], "ink", { "stroke-width": 1.5 });
      left.line([[rate.read(), 0], [rate.read(), 2]], "ink", { "stroke-dasharray": "3 4" });
      lambdas.forEach((lambda, k) => {
        const rates = Array.from({ length: 301 }, (_, i) => 0.005 * 1000 ** (i / 300));
        const curve = rates.map((each) => [each, Math.abs(1 - each * lambda)]);
        left.line(curve.filter(([, y]) => y <= 2), color, { "stroke-dasharray": k ? "7 5" : undefined });
        left.dot([rate.read(), Math.min(Math.abs(1 - rate.read() * lambda), 2)], color);
      });
      left.text([2.65 / large, 1.65], lambdas.length > 1 ? "steep" : "both", color, { dx: 7, dy: 5 });
      if (large / small > 4) left.text([0.4 / small, 0.42], "flat", color, { "text-anchor": "end" });

      const factors = lambdas.map((lambda) => 1 - rate.read() * lambda);
      const worst = Math.max(...factors.map(Math.abs));
      const limit = `2/λ = ${number(2 / large)}, with λ = ${number(large)} the steepest curvature`;
      const leaves = [" of the steep error", " of the flat one"];
      const parts = factors.map((each, k) => number(each) + (factors[1] === undefined ? " of an error" : leaves[k]));
      panel.say(
        worst > 1 + 1e-9
          ? `The rate ${number(rate.read())} is above ${limit}: every step multiplies the ` +
              `${lambdas.length > 1 ? "steep " : ""}error by ${number(factors[0])}, and the descent diverges.`
          : worst > 1 - 1e-9
            ? `The rate is exactly ${limit}: the ${lambdas.length > 1 ? "steep " : ""}error changes its ` +
              `sign in every step, and neither shrinks nor grows.`
            : worst < 1e-6
              ? `The curvature λ is ${number(large)} in every direction, and the rate is 1/λ: the ` +
                `first step arrives.`
              : `The rate ${number(rate.read())} is below ${limit}. A step leaves ${parts.join(" and ")}: ` +
                `${needed(worst).toLocaleString("en")} ${needed(worst) > 1 ? "steps" : "step"} until 1 % ` +
                `is left. The condition number is ${number(large / small)}.`
      );
    };
  });
})();
