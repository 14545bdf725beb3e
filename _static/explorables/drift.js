/* Chapter 10 and the front page: the input of one sigmoid while its network trains. */
(function () {
  "use strict";

  /* How far the median wandered up to an evaluation, after the first tenth of training; as
     History.drift of bnlib.mnist has it at the last one. */
  function wandered(steps, medians, until) {
    const from = 0.1 * steps[steps.length - 1];
    const late = medians.filter((_, t) => steps[t] >= from && t <= until);
    return late.length ? Math.max(...late) - Math.min(...late) : 0;
  }

  /* A color mixed with the page's: paler, but opaque, so that it hides what is behind. */
  const paler = (color, percent) =>
    `color-mix(in srgb, var(--bn-${color}) ${percent.toFixed(0)}%, var(--pst-color-background))`;

  bnExplorable("drift", { wandered }, function (panel) {
    const { number } = window.bnExplorables;
    const { steps, ends, plain, bn } = panel.data;
    const last = steps[steps.length - 1];
    const whole = Math.floor(Math.min(-ends[0], ends[1]));
    const xticks = whole > 0 ? [-whole, 0, whole] : undefined;
    const svg = panel.picture(440);
    const start = (left, network, color, words, yticks) => {
      const plot = panel.plot(svg, { left, top: 92, width: 202, height: 300 }, {
        x: ends,
        y: [1.09 * last, 0],
        xticks,
        yticks,
        xlabel: "input to the sigmoid",
      });
      const middle = { x: left + 101, y: 20, "text-anchor": "middle", "font-weight": "bold" };
      panel.make("text", { ...middle, style: `fill:var(--bn-${color})` }, svg, words);
      return { ...network, plot, color };
    };
    const networks = [
      start(54, plain, "orange", "without BN", [0, last / 2, last]),
      start(272, bn, "blue", "with BN", []),
    ];
    panel.make("text", { x: 4, y: 70, style: "fill:var(--bn-ink)" }, svg, "step");
    const slider = panel.range("Training step", {
      min: 0,
      max: steps.length - 1,
      step: 1,
      value: steps.length - 1,
      show: () => steps[slider.read()].toLocaleString("en"),
    });
    panel.player("Watch it train", slider, 9);

    /* The distribution at evaluation t, standing on the line of its step. */
    function ridge({ plot, color, heights }, t, now) {
      const ground = plot.Y(steps[t]);
      const wide = (ends[1] - ends[0]) / heights[t].length;
      const top = (height, bin) =>
        `${plot.X(ends[0] + (bin + 0.5) * wide).toFixed(1)} ${(ground - 0.66 * height).toFixed(1)}`;
      const tops = heights[t].map(top);
      const seen = (_, bin) => heights[t].slice(Math.max(bin - 1, 0), bin + 2).some((each) => each > 1);
      const line = `M${tops.filter(seen).join("L")}`;
      const age = 1 - t / Math.max(now, 1);
      const fill = t === now ? 80 : 14 + 36 * (1 - age) ** 2;
      const stroke = t === now ? 100 : 45 + 40 * (1 - age) ** 2;
      const style = `fill:${paler(color, fill)};stroke:${paler(color, stroke)}`;
      panel.make("path", { d: line, style, "stroke-width": t === now ? 2 : 1 }, plot.group);
    }

    let shown = -1;
    panel.draw = function () {
      const now = slider.read();
      if (now === shown) return; // the player asks more often than there are steps
      shown = now;
      for (const network of networks) {
        const { plot, percentiles } = network;
        plot.clear();
        for (let t = 0; t <= now; t++) ridge(network, t, now);
        const at = percentiles[now].map((value) => plot.X(value));
        [15, 50, 85].forEach((percent, k) => {
          const path = percentiles.slice(0, now + 1).map((each, t) => [each[k], steps[t]]);
          plot.line(path, network.color, { "stroke-width": percent === 50 ? 2.6 : 1.4 });
          const dot = { r: 4, stroke: "var(--pst-color-background)", "stroke-width": 1.5 };
          plot.dot([percentiles[now][k], steps[now]], network.color, dot);
          // Three labels where there is room for them.
          if (percent !== 50 && at[2] - at[0] < 52) return;
          const below = { x: at[k], y: plot.Y(steps[now]) + 19, "text-anchor": "middle" };
          plot.text([0, 0], percent, network.color, below);
        });
      }
      const tell = ({ percentiles }) => {
        const [low, middle, high] = percentiles[now];
        return `is ${number(middle, 2)} and 70 % of the images lie within ${number(high - low, 2)}`;
      };
      const way = ({ percentiles }) =>
        number(wandered(steps, percentiles.map((each) => each[1]), now), 2);
      panel.say(
        `At step ${steps[now].toLocaleString("en")} the middle input ${tell(networks[0])} ` +
          `without BN; with BN it ${tell(networks[1])}.` +
          (steps[now] > 0.1 * last
            ? ` After the first tenth of training the middle has wandered over ${way(networks[0])} ` +
              `without BN, over ${way(networks[1])} with it.`
            : "")
      );
    };
  });
})();
