/* Chapter 11: Figure 5, a module at a time, and what the network costs as one reads it. */
(function () {
  "use strict";

  const PAPER = 13.6e6; // parameters, section 4.2
  const HEADS = { none: [0, 0] }; // how many, and of how many units
  for (const [count, word] of [[1, "one"], [2, "two"]])
    for (const units of [768, 1024]) HEADS[`${word} of ${units}`] = [count, units];
  const sum = (values) => values.reduce((total, each) => total + each, 0);

  /* The ten rows with the channels that enter and leave, and the side of the maps. */
  function repaired(rows, projection) {
    let [channels, side] = [192, 28];
    return rows.map((row) => {
      const own = { ...row, entering: channels, side };
      if (row.type === "4c" || row.type === "4d") own.projection = projection;
      own.branches = [own.conv1x1, own.conv3x3, own.double3x3, own.projection || channels];
      own.channels = channels = sum(own.branches);
      own.sideAfter = side = side / row.stride;
      return own;
    });
  }

  /* Convolution, normalization: [parameters, multiply-adds]. */
  function layer(kernel, from, to, side, bias) {
    const weights = kernel * kernel * from * to;
    return [weights + (to ? (bias ? 3 : 2) * to : 0), weights * side * side];
  }

  const together = (layers) => [0, 1].map((k) => sum(layers.map((each) => each[k])));

  function module(row, bias) {
    const { entering, side, sideAfter } = row;
    return together([
      layer(1, entering, row.conv1x1, side, bias),
      layer(1, entering, row.reduce3x3, side, bias),
      layer(3, row.reduce3x3, row.conv3x3, sideAfter, bias),
      layer(1, entering, row.reduce_double3x3, side, bias),
      layer(3, row.reduce_double3x3, row.double3x3, side, bias),
      layer(3, row.double3x3, row.double3x3, sideAfter, bias),
      layer(1, entering, row.projection, side, bias),
    ]);
  }

  /* The parts of the network for an image of 224 x 224: {name: [parameters, multiply-adds]}. */
  function network(rows, { projection, bias, separable }) {
    const depthwise = 7 * 7 * 3 * 8;
    const first = [layer(1, 24, 64, 112, bias), [depthwise, depthwise * 112 ** 2]];
    const parts = {
      conv1: separable ? together(first) : layer(7, 3, 64, 112, bias),
      conv2_reduce: layer(1, 64, 64, 56, bias),
      conv2: layer(3, 64, 192, 56, bias),
    };
    const modules = repaired(rows, projection);
    for (const row of modules) parts[row.type] = module(row, bias);
    const { channels } = modules[modules.length - 1];
    parts.fc = [1000 * channels + 1000, 1000 * channels];
    return parts;
  }

  /* Parameters of the auxiliary classifiers, on 4d and, if there are two, on 4a. */
  function heads(rows, projection, [count, hidden]) {
    const modules = repaired(rows, projection);
    const on = ["4d", "4a"].slice(0, count).map((type) => modules.find((row) => row.type === type));
    const one = (row) => (row.channels + 1) * 128 + 2049 * hidden + (hidden + 1) * 1000;
    return sum(on.map(one));
  }

  bnExplorable("figure5", { repaired, network, heads, HEADS }, function (panel) {
    const rows = panel.data.rows;
    const svg = panel.picture(516);
    const drawing = panel.make("g", {}, svg);
    const plain = { x: [0, 1], y: [0, 1], xticks: [], yticks: [] };
    const shares = panel.plot(svg, { left: 20, top: 302, width: 440, height: 80 }, plain);
    const needle = panel.plot(svg, { left: 20, top: 440, width: 440, height: 28 }, {
      ...plain,
      x: [11, 18],
      xticks: [11, 12, 13, 14, 15, 16, 17, 18],
      xlabel: "parameters of the network (millions)",
    });
    const which = panel.choice("Row of Figure 5", rows.map((row) => row.type), "4c");
    const projection = panel.choice("Pool projection in 4c and 4d", ["128", "96"]);
    const head = panel.choice("Auxiliary classifiers", Object.keys(HEADS));
    const bias = panel.check("biases", false);
    const separable = panel.check("separable first convolution", false);

    const text = (x, y, words, more) =>
      panel.make("text", { x, y, "text-anchor": "middle", ...more }, drawing, words);
    const pale = (color, percent) =>
      `fill:color-mix(in srgb, var(--bn-${color}) ${percent}%, var(--pst-color-background))`;
    const box = (x, y, width, words, color) => {
      const style = `${pale(color, 18)};stroke:var(--bn-${color})`;
      panel.make("rect", { x: x - width / 2, y, width, height: 28, rx: 4, style }, drawing);
      text(x, y + 19, words);
    };

    /* The module's branches from its input above to what it stacks below. */
    function draw(row) {
      drawing.replaceChildren();
      const before = `${row.entering} channels, ${row.side}×${row.side}`;
      box(240, 6, 440, `${before} enter ${row.type}`, "ink");
      const pool = row.stride === 2 ? "max, /2" : row.pool;
      const half = row.stride === 2 ? ", /2" : "";
      const branches = [
        row.conv1x1 ? [`1×1: ${row.conv1x1}`] : [],
        [`1×1: ${row.reduce3x3}`, `3×3: ${row.conv3x3}${half}`],
        [`1×1: ${row.reduce_double3x3}`, `3×3: ${row.double3x3}`, `3×3: ${row.double3x3}${half}`],
        row.projection ? [pool, `1×1: ${row.projection}`] : [pool],
      ];
      let start = 20;
      branches.forEach((boxes, k) => {
        const x = 75 + 110 * k;
        const width = (440 * row.branches[k]) / row.channels;
        const middle = start + width / 2;
        const color = k === 3 && !row.projection ? "ink" : "blue";
        const style = `${pale(color, 25 + 15 * (k % 2))};stroke:var(--pst-color-background)`;
        panel.make("rect", { x: start, y: 198, width, height: 30, style }, drawing);
        start += width;
        if (!boxes.length) return;
        const way = { d: `M${x} 34V176L${middle} 198`, style: "fill:none;stroke:var(--bn-ink)" };
        panel.make("path", way, drawing);
        text(middle, 218, row.branches[k]);
        boxes.forEach((words, level) =>
          box(x, 52 + 40 * level, 102, words, words.includes("×") ? "blue" : "ink")
        );
      });
      const [side, channels] = row.output; // as printed
      const print = channels === row.channels ? [] : [channels];
      if (side !== row.sideAfter) print.push(`${side}×${side}`);
      const differs = print.length ? `the figure prints ${print.join(", ")}` : "as printed";
      text(240, 249, `= ${row.channels} channels, ${row.sideAfter}×${row.sideAfter} (${differs})`);
    }

    panel.draw = function () {
      const chosen = { projection: +projection.read(), bias: bias.read(), separable: separable.read() };
      const row = repaired(rows, chosen.projection).find((each) => each.type === which.read());
      const parts = network(rows, chosen);
      const [parameters, work] = together(Object.values(parts));
      const total = parameters + heads(rows, chosen.projection, HEADS[head.read()]);
      draw(row);

      const bars = { stem: together([parts.conv1, parts.conv2_reduce, parts.conv2]), ...parts };
      for (const name of ["conv1", "conv2_reduce", "conv2"]) delete bars[name];
      const names = Object.keys(bars);
      shares.clear();
      shares.text([0, 0], "share of the parameters", "green", { x: 20, y: 290 });
      shares.text([0, 0], "of the multiply-adds", "purple", { x: 460, y: 290, "text-anchor": "end" });
      names.forEach((name, k) => {
        const middle = (k + 0.5) / names.length;
        const here = name === row.type;
        [[parameters, "green"], [work, "purple"]].forEach(([whole, color], k) => {
          const [x, y] = [middle + 0.033 * (k - 1), bars[name][k] / whole / 0.3];
          const corners = [[x, 0], [x, y], [x + 0.033, y], [x + 0.033, 0]];
          shares.area(corners, color, { style: `fill:var(--bn-${color});opacity:${here ? 1 : 0.4}` });
        });
        const style = here ? { "font-weight": "bold" } : {};
        const label = { x: shares.X(middle), y: 400, "text-anchor": "middle", ...style };
        shares.text([0, 0], name, "ink", label);
        if (!rows.some((each) => each.type === name)) return;
        const hit = { x: shares.X(middle) - 17, y: 302, width: 34, height: 104, fill: "transparent" };
        const area = panel.make("rect", { ...hit, style: "cursor:pointer" }, shares.group);
        area.addEventListener("click", () => {
          which.value = name;
          panel.update();
        });
      });

      needle.clear();
      const band = [[13.55, 0], [13.55, 1], [13.65, 1], [13.65, 0]]; // what rounds to 13.6
      needle.area(band, "ink", { style: "fill:var(--bn-ink);opacity:0.6" });
      needle.text([13.6, 1], "the paper: 13.6", "ink", { y: 431, "text-anchor": "middle" });
      needle.line([[total / 1e6, 0], [total / 1e6, 1]], "blue", { "stroke-width": 3 });
      needle.dot([total / 1e6, 0.5], "blue", { r: 7 });

      const [own, ownWork] = parts[row.type];
      const inMillions = (value) => (value / 1e6).toFixed(2);
      const side = total < PAPER ? "short of" : "above";
      const away =
        (total / 1e6).toFixed(1) === "13.6"
          ? "which rounds to the paper's 13.6"
          : `${inMillions(Math.abs(total - PAPER))} million ${side} the paper's 13.6`;
      panel.say(
        `Module ${row.type} has ${inMillions(own)} million parameters and does ` +
          `${(ownWork / 1e6).toFixed(0)} million multiply-adds. ` +
          `The network has ${inMillions(total)} million parameters, ${away}` +
          `, and does ${(work / 1e9).toFixed(2)} billion multiply-adds` +
          (HEADS[head.read()][0] ? " (without the auxiliary classifiers)." : ".")
      );
    };
  });
})();
