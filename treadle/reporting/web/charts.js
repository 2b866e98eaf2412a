"use strict";
// chart(element, options): lines and points as SVG, with a readout under the pointer and under the arrow keys. No library.

const node = (tag, name, text) => {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};

const shape = (tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

const COLOURS = 7; // --c0 ... in page.css; the next seven series are drawn dashed
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];
const present = value => value !== null && value !== undefined && Number.isFinite(value);

// A number as people write it: 4 significant digits, k / M / G above 9999.
function number(value, kind) {
  if (!present(value)) return "–";
  if (kind === "seconds") return duration(value);
  if (kind === "share") return (100 * value).toFixed(Math.abs(value) < 0.1 ? 2 : 1) + "%";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15) return value.toExponential(2).replace(/\.?0+e\+/, "e");
  if (size >= 1e4) {
    const power = Math.min(4, Math.floor(Math.log10(size) / 3));
    return trimmed((value / 1000 ** power).toPrecision(3)) + ["", "k", "M", "G", "T"][power];
  }
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

const trimmed = text => text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;

function duration(seconds) {
  if (seconds < 60) return trimmed(seconds.toPrecision(3)) + " s";
  const whole = Math.round(seconds), two = value => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  return (hours ? hours + ":" + two(Math.floor(whole / 60) % 60) : Math.floor(whole / 60)) + ":" + two(whole % 60) + (hours ? " h" : " min");
}

// The labels of an axis: as many digits as its ticks need.
function labelled(values, kind) {
  const largest = Math.max(...values.map(Math.abs)), factor = kind === "share" ? 100 : 1;
  if (kind === "seconds") return values.map(duration);
  if (largest >= 1e4 || (largest > 0 && largest < 1e-3)) return values.map(value => number(value));
  let digits = 0;
  while (digits < 6 && values.some(value => Math.abs(value * factor - (value * factor).toFixed(digits)) > largest * factor * 1e-6)) digits++;
  return values.map(value => (value * factor).toFixed(digits) + (kind === "share" ? "%" : ""));
}

// Round values between low and high, about `wanted` of them; decades and their 2 and 5 on a logarithmic axis.
function ticks(low, high, wanted, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const first of [1, 2, 5]) {
        const value = first * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    const decades = found.filter(value => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9);
    if (found.length > wanted && decades.length > 1) {
      const every = Math.ceil(decades.length / wanted);
      return decades.filter((_, at) => at % every === 0);
    }
    return found.length > 1 ? found : ticks(low, high, wanted, false);
  }
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find(one => one * power >= rough * 0.999) * power;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step)
    found.push(Math.abs(value) < step * 1e-9 ? 0 : Number(value.toPrecision(12)));
  return found;
}

// The mean of what came before, older values counting less (an exponential mean without its bias); gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0, whole = 0;
  return values.map(value => {
    if (!present(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    whole = weight * whole + (1 - weight);
    return sum / whole;
  });
}

// Of more points than two a pixel: the lowest and the highest of each pixel, so that no spike is lost.
function thinned(points, buckets) {
  if (points.length <= 4 * buckets) return points;
  const kept = [], first = points[0][0], span = points[points.length - 1][0] - first || 1;
  let at = 0;
  for (let bucket = 1; bucket <= buckets; bucket++) {
    let low = null, high = null;
    while (at < points.length && (bucket === buckets || points[at][0] <= first + span * bucket / buckets)) {
      const point = points[at++];
      if (low === null || point[1] < low[1]) low = point;
      if (high === null || point[1] >= high[1]) high = point;
    }
    if (low !== null) kept.push(...(low === high ? [low] : low[0] <= high[0] ? [low, high] : [high, low]));
  }
  return kept;
}

// options: {title, note, series: [{name, x, y, colour, points, low, high}], x_title, y_title, x_kind, y_kind, log, log_x, smooth,
//   marks: [{x, text}], height, legend, floor}. x and y of a series have the same length; low and high make a band. `colour` is
// a number (its place in the palette); `points` draws dots that are joined. Returns {update(options), element}.
function chart(element, options) {
  const figure = node("figure", "chart"), head = node("figcaption"), legend = node("div", "legend");
  const picture = shape("svg", { tabindex: "0", role: "img" }), readout = node("div", "readout");
  const spoken = node("div", "unseen");
  spoken.setAttribute("role", "status");
  readout.hidden = true;
  const frame = node("div", "frame");
  frame.append(picture, readout);
  figure.append(head, legend, frame, spoken);
  element.append(figure);
  const off = new Set();
  let places = [], at = -1, drawn = [], box = null, X = null, Y = null, cursor = null, wide = 0;

  function caption() {
    head.replaceChildren(node("strong", "", options.title || options.y_title || ""));
    if (options.note) head.append(node("span", "soft", options.note));
    legend.replaceChildren();
    legend.hidden = options.legend === false || options.series.length < 2;
    if (legend.hidden) return;
    options.series.forEach((series, place) => {
      const button = node("button", "key", series.name);
      button.type = "button";
      button.setAttribute("aria-pressed", String(!off.has(series.name)));
      button.style.setProperty("--key", paint(series, place));
      if (series.points) button.classList.add("dots");
      button.addEventListener("click", () => {
        if (!off.delete(series.name)) off.add(series.name);
        button.setAttribute("aria-pressed", String(!off.has(series.name)));
        draw();
      });
      legend.append(button);
    });
  }

  const paint = (series, place) => `var(--c${(series.colour ?? place) % COLOURS})`;
  const dash = (series, place) => DASHES[Math.floor((series.colour ?? place) / COLOURS) % DASHES.length];

  function draw() {
    wide = frame.clientWidth || wide || 600;
    const high = options.height || 230, smooth = options.smooth || 0;
    const shown = options.series.map((series, place) => ({ series, place })).filter(one => !off.has(one.series.name));
    const positive = values => values.some(value => present(value) && value > 0);
    const log = Boolean(options.log) && shown.every(one => positive(one.series.y));
    const logX = Boolean(options.log_x) && shown.every(one => positive(one.series.x));
    const usable = (x, y) => present(x) && present(y) && (!log || y > 0) && (!logX || x > 0);
    const points = (series, values) => series.x.map((x, i) => [x, values[i]]).filter(([x, y]) => usable(x, y));
    drawn = shown.map(one => ({ ...one, raw: points(one.series, one.series.y), line: smooth && !one.series.points && !one.series.low ? points(one.series, smoothed(one.series.y, smooth)) : null,
      band: one.series.low ? [points(one.series, one.series.low), points(one.series, one.series.high)] : null })).filter(one => one.raw.length);
    picture.replaceChildren();
    picture.setAttribute("viewBox", `0 0 ${wide} ${high}`);
    const every = drawn.flatMap(one => [...one.raw, ...(one.band ? one.band.flat() : [])]);
    if (!every.length) {
      picture.append(shape("text", { x: wide / 2, y: high / 2, class: "axis", "text-anchor": "middle" }, "nothing yet"));
      picture.setAttribute("aria-label", `${options.title || ""}: nothing yet`);
      places = [];
      return;
    }
    const ends = (column, log, floor) => {
      let low = Infinity, high = -Infinity;
      for (const point of every) { low = Math.min(low, point[column]); high = Math.max(high, point[column]); }
      if (floor !== undefined && !log) low = Math.min(low, floor);
      // Below a thousandth of the values themselves differences are those of rounding; they are not blown up to the whole height.
      const least = Math.max(Math.abs(low), Math.abs(high)) * 1e-3;
      if (!log && column === 1 && high - low < least && low !== high) return [(low + high - least) / 2, (low + high + least) / 2];
      if (low === high) return log ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
      return [low, high];
    };
    let [x0, x1] = ends(0, logX), [y0, y1] = ends(1, log, options.floor);
    if (log) { const pad = (y1 / y0) ** 0.05; y0 /= pad; y1 *= pad; }
    else { const pad = (y1 - y0) * 0.06; y1 += pad; if (!(options.floor !== undefined && y0 === options.floor)) y0 -= pad; }
    const yTicks = ticks(y0, y1, 5, log), labels = log ? yTicks.map(value => trimmed(number(value, options.y_kind))) : labelled(yTicks, options.y_kind);
    const left = Math.max(34, 12 + 6.6 * Math.max(...labels.map(label => label.length)));
    box = { left, right: wide - 14, top: 8, bottom: high - 34 };
    const scale = (low, high, from, to, log) => log
      ? value => from + (to - from) * Math.log(value / low) / Math.log(high / low)
      : value => from + (to - from) * (value - low) / (high - low);
    X = scale(x0, x1, box.left, box.right, logX);
    Y = scale(y0, y1, box.bottom, box.top, log);
    yTicks.forEach((value, i) => {
      picture.append(shape("line", { x1: box.left, x2: box.right, y1: Y(value), y2: Y(value), class: "grid" }),
        shape("text", { x: box.left - 7, y: Y(value) + 4, class: "axis", "text-anchor": "end" }, labels[i]));
    });
    for (const value of ticks(x0, x1, Math.max(4, Math.floor((box.right - box.left) / 95)), logX)) {
      const anchor = X(value) > box.right - 16 ? "end" : X(value) < box.left + 8 ? "start" : "middle";
      picture.append(shape("line", { x1: X(value), x2: X(value), y1: box.bottom, y2: box.bottom + 4, class: "tick" }),
        shape("text", { x: X(value), y: box.bottom + 17, class: "axis", "text-anchor": anchor }, number(value, options.x_kind)));
    }
    picture.append(shape("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "tick" }),
      shape("text", { x: box.right, y: high - 3, class: "axis title", "text-anchor": "end" }, options.x_title || "step"));
    let free = box.left;
    for (const mark of options.marks || []) {
      if (!present(mark.x) || mark.x < x0 || mark.x > x1) continue;
      const line = shape("line", { x1: X(mark.x), x2: X(mark.x), y1: box.top, y2: box.bottom, class: "mark" + (mark.bad ? " bad" : "") });
      line.append(shape("title", {}, mark.text));
      picture.append(line);
      const room = 8 + 6 * (mark.short || "").length;
      if (wide < 500 || !mark.short || X(mark.x) < free || X(mark.x) + room > box.right) continue; // labels that do not fit are in the readout
      free = X(mark.x) + room;
      picture.append(shape("text", { x: X(mark.x) + 4, y: box.top + 9, class: "axis mark" + (mark.bad ? " bad" : "") }, mark.short));
    }
    const path = points => thinned(points, box.right - box.left).map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    for (const one of drawn) {
      const colour = paint(one.series, one.place), stroke = { class: "line", "stroke-dasharray": dash(one.series, one.place) };
      const add = (attributes, property = "stroke") => { const made = shape("path", attributes); made.style[property] = colour; picture.append(made); };
      if (one.band) add({ class: "band", d: path(one.band[1]) + path([...one.band[0]].reverse()).replace("M", "L") + "Z" }, "fill");
      add({ ...stroke, d: path(one.raw), ...(one.line ? { opacity: 0.28 } : {}) });
      if (one.line) add({ ...stroke, d: path(one.line) });
      if (one.series.points || one.raw.length === 1)
        for (const [x, y] of one.raw.length > 60 ? [] : one.raw) {
          const dot = shape("circle", { cx: X(x).toFixed(1), cy: Y(y).toFixed(1), r: 3.2, class: "dot" });
          dot.style.fill = colour;
          picture.append(dot);
        }
    }
    cursor = shape("g", { class: "cursor" });
    picture.append(cursor);
    places = [...new Set(drawn.flatMap(one => one.raw.map(point => point[0])))].sort((a, b) => a - b);
    const last = drawn.slice(0, 6).map(one => `${one.series.name} ${number(one.raw[one.raw.length - 1][1], options.y_kind)}`).join(", ");
    picture.setAttribute("aria-label", `${options.title || options.y_title}, against ${options.x_title || "step"}. At the end: ${last}. Arrow keys read values.`);
  }

  // What every series says at place number `which`.
  function point(which, speak) {
    if (!places.length) return;
    at = Math.max(0, Math.min(places.length - 1, which));
    const x = places[at], px = X(x);
    cursor.replaceChildren(shape("line", { x1: px, x2: px, y1: box.top, y2: box.bottom, class: "hair" }));
    readout.replaceChildren(node("div", "where", `${options.x_title || "step"} ${number(x, options.x_kind)}`));
    const said = [];
    for (const one of drawn) {
      const found = nearest(one.line || one.raw, x);
      if (Math.abs(X(found[0]) - px) > Math.max(12, (box.right - box.left) / 12)) continue;
      const dot = shape("circle", { cx: X(found[0]), cy: Y(found[1]), r: 4, class: "dot" });
      dot.style.fill = paint(one.series, one.place);
      cursor.append(dot);
      const row = node("div", "row"), key = node("i");
      key.style.background = paint(one.series, one.place);
      const text = number(found[1], options.y_kind) + (found[0] === x ? "" : ` (at ${number(found[0], options.x_kind)})`);
      row.append(key, node("span", "", one.series.name), node("b", "", text));
      readout.append(row);
      said.push(`${one.series.name} ${text}`);
    }
    for (const mark of options.marks || []) if (Math.abs(X(mark.x) - px) < 5) readout.append(node("div", "soft", mark.text));
    readout.hidden = false;
    const ratio = frame.clientWidth / wide, place = px * ratio;
    const side = place > frame.clientWidth / 2 ? place - readout.offsetWidth - 12 : place + 12;
    readout.style.left = `${Math.max(0, Math.min(frame.clientWidth - readout.offsetWidth, side))}px`;
    if (speak) spoken.textContent = `${options.x_title || "step"} ${number(x, options.x_kind)}: ${said.join(", ")}`;
  }

  function hide() {
    readout.hidden = true;
    if (cursor) cursor.replaceChildren();
    at = -1;
  }

  picture.addEventListener("pointermove", event => {
    if (!places.length) return;
    const spot = picture.getBoundingClientRect(), px = (event.clientX - spot.left) * wide / spot.width;
    let best = 0;
    for (let i = 1, least = Math.abs(X(places[0]) - px); i < places.length; i++)
      if (Math.abs(X(places[i]) - px) < least) { least = Math.abs(X(places[i]) - px); best = i; }
    point(best, false);
  });
  picture.addEventListener("pointerleave", () => { if (document.activeElement !== picture) hide(); });
  picture.addEventListener("focus", () => { if (picture.matches(":focus-visible")) point(places.length - 1, true); });
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", event => {
    const from = at < 0 ? places.length - 1 : at, far = Math.max(1, Math.round(places.length / 10));
    const target = { ArrowLeft: from - 1, ArrowRight: from + 1, PageUp: from - far, PageDown: from + far, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (target === undefined) return;
    event.preventDefault();
    point(target, true);
  });
  new ResizeObserver(() => { if (frame.clientWidth && Math.abs(frame.clientWidth - wide) > 1) draw(); }).observe(frame);
  caption();
  draw();
  return {
    element: figure,
    update(changed) {
      const before = options.series.map(series => series.name + series.colour).join("\n");
      options = { ...options, ...changed };
      if (before !== options.series.map(series => series.name + series.colour).join("\n") || changed.title || changed.note !== undefined) caption();
      const shownAt = at;
      draw();
      if (shownAt >= 0 && !readout.hidden) point(shownAt, false);
    },
  };
}

// The point of rising x nearest to `x`.
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return Math.abs(points[high][0] - x) < Math.abs(points[low][0] - x) ? points[high] : points[low];
}
