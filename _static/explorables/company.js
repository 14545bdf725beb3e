/* Chapter 04: one example in the company of a mini-batch. */
(function () {
  "use strict";

  const SIZES = [2, 4, 8, 16, 32, 64, 128, 256];
  const TIMES = 300; // mini-batches of each size

  const mean = (values) => values.reduce((sum, each) => sum + each, 0) / values.length;

  /* x-hat of all values of a mini-batch; the epsilon is as good as none. */
  function normalized(values) {
    const middle = mean(values);
    const variance = mean(values.map((each) => (each - middle) ** 2));
    return values.map((each) => (each - middle) / Math.sqrt(variance + 1e-300));
  }

  /* m times the variance of x-hat over large mini-batches of m, as the text predicts it for z. */
  function predicted(values, z) {
    const third = mean(values.map((each) => each * each * each));
    const fourth = mean(values.map((each) => each * each * each * each));
    return 1 + z * third + ((fourth - 1) * z * z) / 4;
  }

  /* Mean and standard deviation. */
  function moments(values) {
    const middle = mean(values);
    return [middle, Math.sqrt(mean(values.map((each) => (each - middle) ** 2)))];
  }

  bnExplorable("company", { normalized, predicted, moments }, function (panel) {
    const { number, random } = window.bnExplorables;
    const { values } = panel.data;
    let drawn = 1;

    /* m - 1 others, the same at every call until another mini-batch is asked for. */
    function others(m, seed) {
      const draw = random(seed * 1000 + m);
      return Array.from({ length: m - 1 }, () => values[Math.floor(draw() * values.length)]);
    }
    const companies = SIZES.map((m) => Array.from({ length: TIMES }, (_, i) => others(m, -i - 1)));

    const svg = panel.picture(446);
    const rows = panel.plot(svg, { left: 20, top: 34, width: 445, height: 110 }, {
      x: [-4, 10],
      y: [0, 1],
      yticks: [],
      title: "one mini-batch, before and after (drag the large dot)",
    });
    const spread = panel.plot(svg, { left: 40, top: 212, width: 425, height: 190 }, {
      x: [1.7, 310],
      y: [0, 1],
      xlog: true,
      xticks: SIZES,
      xlabel: "size m of the mini-batch",
      title: `the marked example in ${TIMES} mini-batches of each size`,
    });
    const handle = panel.handle(rows, "value of the marked example", {
      min: -4,
      max: 10,
      step: 0.1,
      value: values[panel.data.marked],
      y: 0.8,
      color: "ink",
    });
    const size = panel.range("Size m of the mini-batch", {
      min: 0,
      max: SIZES.length - 1,
      step: 1,
      value: 2,
      show: (k) => String(SIZES[k]),
    });
    panel.button("Draw another mini-batch", () => drawn++);

    panel.draw = function () {
      const z = handle.read();
      const m = SIZES[size.read()];
      const wall = Math.sqrt(m - 1);
      const batch = [...others(m, drawn), z];
      const hat = normalized(batch);
      const mine = hat[m - 1];
      rows.clear();
      batch.forEach((each, i) => {
        const other = i < m - 1;
        const look = { "stroke-width": other ? 0.8 : 2, opacity: other ? 0.5 : 1 };
        if (!other || m <= 32) rows.line([[each, 0.8], [hat[i], 0.25]], "ink", look);
        const faint = { r: 3.5, opacity: m <= 32 ? 0.6 : 0.25 };
        if (other) rows.dot([each, 0.8], "ink", faint);
        rows.dot([hat[i], 0.25], "blue", other ? faint : { r: 9 });
      });
      for (const side of [-wall, wall])
        if (side > -4 && side < 10) rows.line([[side, 0.05], [side, 0.45]], "purple", { "stroke-width": 3 });

      const found = companies.map((company) => moments(company.map((each) => normalized([z, ...each])[0])));
      spread.clear();
      spread.scale([1.7, 310], [Math.min(-2, z - 1), Math.max(4, z + 1)]);
      const [low, high] = spread.y;
      const factor = predicted(values, z);
      const fine = Array.from({ length: 101 }, (_, i) => 2 * 128 ** (i / 100));
      for (const side of [-1, 1]) {
        const inside = ([, y]) => y >= low && y <= high;
        const line = (f) => fine.map((each) => [each, f(each)]).filter(inside);
        spread.line(line((each) => side * Math.sqrt(each - 1)), "purple");
        const edge = (each) => z + side * Math.sqrt(factor / each);
        spread.line(line(edge), "ink", { "stroke-dasharray": "2 4", "stroke-width": 1.6 });
      }
      spread.line([[1.7, z], [310, z]], "ink", { "stroke-dasharray": "7 5", "stroke-width": 1.2 });
      found.forEach(([middle, deviation], k) => {
        const ends = [[SIZES[k], middle - deviation], [SIZES[k], middle + deviation]];
        spread.line(ends, "blue", { "stroke-width": k === size.read() ? 12 : 6, opacity: 0.5 });
      });
      spread.dot([m, mine], "blue", { r: 6 });
      const top = Math.min(high * 0.86, 6.5);
      const place = { "text-anchor": "end", dx: -6 };
      spread.text([top ** 2 + 1, top], "√(m − 1)", "purple", place);

      const [, deviation] = found[size.read()];
      panel.say(
        m === 2
          ? `In a mini-batch of two, ${number(z)} becomes ${number(mine)}. The larger of two always ` +
              `becomes 1 and the smaller −1; nothing else of them is left.`
          : `In this mini-batch of ${m}, ${number(z)} becomes ${number(mine)}. Over ${TIMES} mini-batches ` +
              `it varies by ${number(deviation, 2)} (standard deviation; ` +
              `${number(Math.sqrt(factor / m), 2)} is predicted for large m), and it cannot ` +
              `pass √(m − 1) = ${number(wall)}.`
      );
    };
  });
})();
