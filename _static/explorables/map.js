/* Chapter 10: two settings on the map of learning rates and weights, chosen one by one. */
(function () {
  "use strict";

  /* Where a curve ends highest: [row, column] of curves[row][column]. */
  function best(curves, worst) {
    let found = [0, 0];
    const end = ([row, column]) => curves[row][column][curves[row][column].length - 1];
    curves.forEach((row, i) =>
      row.forEach((_, j) => {
        if (worst ? end([i, j]) < end(found) : end([i, j]) > end(found)) found = [i, j];
      })
    );
    return found;
  }

  /* The first evaluated step at which a curve is at a level; infinite if it never is. */
  function reached(steps, curve, level) {
    const at = curve.findIndex((each) => each >= level);
    return at < 0 ? Infinity : steps[at];
  }

  bnExplorable("map", { best, reached }, function (panel) {
    const { rates, deviations, steps, bn, plain } = panel.data;
    const last = steps[steps.length - 1];
    const svg = panel.picture(500);
    const [wide, high] = [24, 24];
    const every = (values, step) => values.map((_, k) => k).filter((k) => k % step === 0);

    /* A map with a cell for each pair, and two fields that choose one. */
    function start(curves, left, color, words) {
      const grid = panel.make("g", { class: "bn-axes" }, svg);
      const map = panel.make("g", {}, svg);
      const middle = { x: left + 4 * wide, "text-anchor": "middle" };
      const title = { ...middle, y: 18, "font-weight": "bold", style: `fill:var(--bn-${color})` };
      panel.make("text", title, grid, words);
      for (const j of every(rates, 2)) {
        const at = { x: left + (j + 0.5) * wide, y: 28 + 6 * high + 18, "text-anchor": "middle" };
        panel.make("text", at, grid, rates[j]);
      }
      panel.make("text", { ...middle, y: 28 + 6 * high + 37 }, grid, "learning rate");
      const rate = panel.choice(`${words}: rate`, rates.map(String));
      const deviation = panel.choice(`${words}: deviation`, deviations.map(String));
      const network = { curves, color, words, map, left };
      network.at = () => [deviation.selectedIndex, rate.selectedIndex];
      network.choose = ([i, j]) => [deviation.selectedIndex, rate.selectedIndex] = [i, j];
      return network;
    }
    const networks = [start(plain, 62, "orange", "without BN"), start(bn, 278, "blue", "with BN")];
    deviations.forEach((deviation, i) => {
      const at = { x: 56, y: 28 + i * high + 17, "text-anchor": "end" };
      panel.make("text", at, panel.make("g", { class: "bn-axes" }, svg), deviation);
    });
    panel.make("text", { x: 2, y: 18, style: "fill:var(--bn-ink)" }, svg, "deviation");
    const plot = panel.plot(svg, { left: 62, top: 266, width: 380, height: 180 }, {
      x: [0, last],
      y: [0, 1],
      xticks: [0, last / 2, last],
      xlabel: "training step",
      ylabel: "test accuracy",
    });
    const stories = {
      "Each at its best": [best(plain), best(bn)],
      "Both where plain fails": [best(plain, true), best(plain, true)],
      "Plain at its best, BN at its worst": [best(plain), best(bn, true)],
    };
    for (const [words, cells] of Object.entries(stories))
      panel.button(words, () => networks.forEach((network, k) => network.choose(cells[k])));
    networks.forEach((network) => network.choose(panel.data.begin));

    /* The cells: the fuller the color, the lower the logarithm of the error. */
    function drawMap({ curves, color, map, left, at, choose }) {
      map.replaceChildren();
      const put = (i, j, more) => {
        const place = { x: left + j * wide, y: 28 + i * high, width: wide, height: high };
        return panel.make("rect", { ...place, ...more }, map);
      };
      curves.forEach((row, i) =>
        row.forEach((curve, j) => {
          const error = Math.min(Math.max(1 - curve[curve.length - 1], 0.02), 0.9);
          const fill = 0.06 + 0.84 * (Math.log(error / 0.9) / Math.log(0.02 / 0.9)) ** 2;
          const style = `fill:var(--bn-${color});fill-opacity:${fill.toFixed(2)};cursor:pointer`;
          put(i, j, { style }).addEventListener("click", () => {
            choose([i, j]);
            panel.update();
          });
        })
      );
      const style = "fill:none;stroke:var(--pst-color-text-base);stroke-width:3";
      put(...at(), { style, "pointer-events": "none" });
    }

    panel.draw = function () {
      const chosen = networks.map(({ curves, at }) => curves[at()[0]][at()[1]]);
      const ends = chosen.map((curve) => curve[curve.length - 1]);
      const low = Math.min(...ends) > 0.9 ? 0.9 : 0;
      plot.scale([0, last], [low, 1]);
      plot.clear();
      networks.forEach((network, k) => {
        drawMap(network);
        const points = chosen[k].map((each, t) => [steps[t], each]);
        const above = (_, t) => chosen[k][t] >= low || chosen[k][t + 1] >= low;
        plot.line(points.filter(above), network.color);
      });
      const percent = (value) => `${(100 * value).toFixed(1)} %`;
      const when = chosen.map((curve) => reached(steps, curve, 0.95));
      const at95 = (step) =>
        step < Infinity ? `after ${step.toLocaleString("en")} steps` : "never";
      const lead = 100 * (ends[1] - ends[0]);
      panel.say(
        `At the end ${percent(ends[1])} with BN and ${percent(ends[0])} without: BN ` +
          `${lead < 0 ? "trails" : "leads"} by ${Math.abs(lead).toFixed(1)} points. ` +
          `95 % is seen ${at95(when[1])} with BN, ${at95(when[0])} without.`
      );
    };
  });
})();
