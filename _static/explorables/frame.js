/* The frame that all explorable panels share: a picture, labelled controls, and a sentence that
   says what is to be seen.  A panel is a file of its own that calls

     bnExplorable("name", {functions of its arithmetic}, function (panel) { ... });

   The page holds <div class="bn-explorable" data-explorable="name"> with the data as JSON. */
(function () {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const STILL = window.matchMedia("(prefers-reduced-motion: reduce)");

  /* A generator of numbers between 0 and 1 that repeats itself for the same seed (mulberry32). */
  function random(seed) {
    let state = seed | 0;
    return function () {
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /* An SVG element; attributes whose value is undefined are left out. */
  function make(name, attributes, parent, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes || {}))
      if (value !== undefined) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  function html(name, properties, parent) {
    const element = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(element);
    return element;
  }

  /* A number in few figures, with a true minus sign. */
  function number(value, figures = 3) {
    if (!Number.isFinite(value)) return value > 0 ? "infinite" : "not a number";
    const small = value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5);
    const text = small ? value.toExponential(1) : String(+value.toPrecision(figures));
    return text.replace(/^-/, "\u2212").replace("e+", "e");
  }

  /* About `count` round numbers from low to high; powers of ten when `log`. */
  function ticks(low, high, count, log) {
    if (log) {
      const found = [];
      for (let power = Math.ceil(Math.log10(low) - 1e-9); 10 ** power <= high * (1 + 1e-9); power++)
        found.push(10 ** power);
      const every = Math.max(1, Math.ceil(found.length / count));
      return found.filter((_, index) => index % every === 0);
    }
    const rough = (high - low) / count;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((each) => each * unit >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++)
      found.push(k * step);
    return found;
  }

  /* Axes in a part of the picture, in data units.  `box`: left, top, width, height in the picture. */
  class Plot {
    constructor(svg, box, options) {
      this.box = box;
      this.options = options;
      this.axes = make("g", { class: "bn-axes" }, svg);
      this.group = make("g", {}, svg);
      this.scale(options.x, options.y);
    }

    /* New limits; the axes are drawn again, what is drawn on them is not. */
    scale(x, y) {
      const { left, top, width, height } = this.box;
      const { xlog, ylog, xlabel, ylabel, title } = this.options;
      this.x = x;
      this.y = y;
      const part = (value, [low, high], log) =>
        log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      this.X = (value) => left + width * part(value, x, xlog);
      this.Y = (value) => top + height * (1 - part(value, y, ylog));
      this.axes.replaceChildren();
      make("path", { d: `M${left} ${top}v${height}h${width}` }, this.axes);
      const { xticks, yticks } = this.options;
      for (const tick of xticks || ticks(...x, width / 75, xlog)) {
        const at = { x: this.X(tick), y: top + height + 18, "text-anchor": "middle" };
        make("text", at, this.axes, number(tick));
      }
      for (const tick of yticks || ticks(...y, height / 45, ylog)) {
        const at = { x: left - 6, y: this.Y(tick) + 5, "text-anchor": "end" };
        make("text", at, this.axes, number(tick));
        make("path", { d: `M${left} ${this.Y(tick)}h${width}`, class: "bn-grid" }, this.axes);
      }
      const middle = { x: left + width / 2, "text-anchor": "middle" };
      if (xlabel) make("text", { ...middle, y: top + height + 37 }, this.axes, xlabel);
      if (ylabel) make("text", { x: left, y: top - 10 }, this.axes, ylabel);
      if (title) make("text", { ...middle, y: top - 10, "font-weight": "bold" }, this.axes, title);
    }

    clear() {
      this.group.replaceChildren();
    }

    /* Points that leave the axes are drawn at their edge. */
    at([x, y]) {
      const { left, top, width, height } = this.box;
      const clip = (value, low, high) => Math.min(Math.max(value, low), high);
      const [X, Y] = [this.X(x), this.Y(y)];
      return [clip(X, left - 5, left + width + 5), clip(Y, top - 5, top + height + 5)];
    }

    line(points, color, attributes) {
      const inside = points.filter(([x, y]) => Number.isFinite(this.X(x) + this.Y(y)));
      const d = inside.map((point) => this.at(point).map((v) => v.toFixed(1)).join(" ")).join("L");
      const style = `stroke:var(--bn-${color});fill:none`;
      return make("path", { d: d && "M" + d, "stroke-width": 2.2, style, ...attributes }, this.group);
    }

    area(points, color, attributes) {
      const d = points.map((point) => this.at(point).map((v) => v.toFixed(1)).join(" ")).join("L");
      const style = `fill:var(--bn-${color});fill-opacity:0.2`;
      return make("path", { d: `M${d}Z`, style, ...attributes }, this.group);
    }

    dot(point, color, attributes) {
      const [cx, cy] = this.at(point);
      return make("circle", { cx, cy, r: 5, style: `fill:var(--bn-${color})`, ...attributes }, this.group);
    }

    text(point, words, color, attributes) {
      const [x, y] = this.at(point);
      return make("text", { x, y, style: `fill:var(--bn-${color})`, ...attributes }, this.group, words);
    }
  }

  class Panel {
    constructor(place) {
      this.place = place;
      const data = place.querySelector('script[type="application/json"]');
      this.data = data ? JSON.parse(data.textContent) : {};
      this.name = place.getAttribute("aria-label");
      this.controls = html("form", { className: "bn-controls" });
      this.controls.addEventListener("submit", (event) => event.preventDefault());
      this.says = html("p", { className: "bn-says" });
      this.says.setAttribute("aria-live", "polite");
      this.draw = () => {};
      place.append(this.controls, this.says);
    }

    /* The picture, `height` units high and 480 wide; text in it has 15 units. */
    picture(height) {
      const svg = make("svg", { viewBox: `0 0 480 ${height}`, class: "bn-picture", role: "group" });
      svg.setAttribute("aria-label", this.name);
      this.controls.before(svg);
      return svg;
    }

    plot(svg, box, options) {
      return new Plot(svg, box, options);
    }

    make(name, attributes, parent, text) {
      return make(name, attributes, parent, text);
    }

    _labelled(words, field) {
      const label = html("label", {}, this.controls);
      label.append(words + " ", field);
      return label;
    }

    /* A slider; `show` writes its value.  Gives the field, whose `read()` is a number. */
    range(words, { min, max, step = "any", value, show = number }) {
      const field = html("input", { type: "range", min, max, step, value });
      const label = this._labelled(words, field);
      const told = html("span", { className: "bn-value" }, label);
      field.read = () => Number(field.value);
      field.tell = () => {
        told.textContent = show(field.read());
        field.setAttribute("aria-valuetext", told.textContent);
      };
      field.addEventListener("input", () => this.update());
      return field;
    }

    /* A slider on a logarithmic scale; `read()` gives the value itself. */
    logRange(words, { min, max, value, show = number }) {
      const field = this.range(words, {
        min: Math.log10(min),
        max: Math.log10(max),
        step: "any",
        value: Math.log10(value),
        show: () => show(field.read()),
      });
      field.read = () => 10 ** Number(field.value);
      return field;
    }

    /* One of several words. */
    choice(words, options, value) {
      const field = html("select", {});
      for (const option of options) field.append(new Option(option, option));
      field.value = value === undefined ? options[0] : value;
      this._labelled(words, field);
      field.read = () => field.value;
      field.addEventListener("input", () => this.update());
      return field;
    }

    check(words, checked) {
      const field = html("input", { type: "checkbox", checked });
      this._labelled(words, field);
      field.read = () => field.checked;
      field.addEventListener("input", () => this.update());
      return field;
    }

    button(words, action) {
      const button = html("button", { type: "button", textContent: words }, this.controls);
      button.addEventListener("click", () => {
        action();
        this.update();
      });
      return button;
    }

    /* A button that moves a slider from its low end to its high end; none where the reader's
       machine asks for stillness. */
    player(words, slider, seconds) {
      if (STILL.matches) return;
      let frame = 0;
      const button = html("button", { type: "button", textContent: words }, this.controls);
      const stop = () => {
        cancelAnimationFrame(frame);
        frame = 0;
        button.textContent = words;
        this.says.style.visibility = ""; // while all moves, no sentence is right for long
      };
      button.addEventListener("click", () => {
        if (frame) return stop();
        const [low, high] = [Number(slider.min), Number(slider.max)];
        const from = Number(slider.value) < high ? Number(slider.value) : low;
        const begun = performance.now();
        button.textContent = "Stop";
        this.says.style.visibility = "hidden";
        const advance = (now) => {
          const value = from + ((now - begun) / 1000 / seconds) * (high - low);
          slider.value = Math.min(value, high);
          this.update();
          if (value < high) frame = requestAnimationFrame(advance);
          else stop();
        };
        frame = requestAnimationFrame(advance);
      });
    }

    /* A point in the picture that is dragged sideways or moved with the arrow keys. */
    handle(plot, words, { min, max, step, value, y, color }) {
      const point = make("circle", { r: 11, tabindex: 0, role: "slider", class: "bn-handle" });
      point.style.fill = `var(--bn-${color})`;
      plot.axes.parentNode.append(point);
      point.setAttribute("aria-label", words);
      point.setAttribute("aria-valuemin", min);
      point.setAttribute("aria-valuemax", max);
      let now = value;
      const set = (next) => {
        now = Math.min(Math.max(next, min), max);
        this.update();
      };
      point.read = () => now;
      point.tell = () => {
        point.setAttribute("cx", plot.X(now));
        point.setAttribute("cy", plot.Y(y));
        point.setAttribute("aria-valuenow", +now.toPrecision(3));
      };
      point.addEventListener("keydown", (event) => {
        const turn = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        if (!turn) return;
        event.preventDefault();
        set(now + turn * step);
      });
      point.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        point.focus();
        point.setPointerCapture(event.pointerId);
      });
      point.addEventListener("pointermove", (event) => {
        if (!point.hasPointerCapture(event.pointerId)) return;
        const matrix = plot.axes.ownerSVGElement.getScreenCTM().inverse();
        const { x } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
        const [left, right] = [plot.X(plot.x[0]), plot.X(plot.x[1])];
        set(plot.x[0] + ((x - left) / (right - left)) * (plot.x[1] - plot.x[0]));
      });
      this.handles = [...(this.handles || []), point];
      return point;
    }

    /* What is to be seen; read out once the reader pauses. */
    say(words) {
      clearTimeout(this.pause);
      this.pause = setTimeout(() => (this.says.textContent = words), this.says.textContent ? 250 : 0);
    }

    update() {
      for (const field of this.controls.elements) if (field.tell) field.tell();
      this.draw();
      for (const point of this.handles || []) point.tell();
    }
  }

  window.bnExplorables = { number, random };
  window.bnExplorable = function (name, functions, start) {
    window.bnExplorables[name] = functions;
    for (const place of document.querySelectorAll(`[data-explorable="${name}"]`)) {
      const panel = new Panel(place);
      start(panel);
      panel.update();
    }
  };
})();
