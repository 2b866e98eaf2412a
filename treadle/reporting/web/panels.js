"use strict";
// What a report and a live page share: a run's curves, samples, events, and text coloured by its loss. A run is what
// reporting/run_data.py reads; a column is a list parallel to "steps", or {at, values} with places in "steps".

const AXES = { step: "step", tokens: "tokens", bytes: "bytes", seconds: "time" };
const KNOWN = {
  loss: ["Loss", "nats a label"], bpb: ["Bits per byte", "lower is better"], accuracy: ["Accuracy", "share of next tokens that come first", "share"],
  top5_accuracy: ["Top-5 accuracy", "", "share"],
  learning_rate: ["Learning rate", ""], grad_norm: ["Gradient norm", "before clipping"], tokens_per_second: ["Throughput", "tokens a second"],
  memory_gb: ["Memory", "GB of this process"], data_wait: ["Waiting for data", "seconds", "seconds"], mfu: ["Utilisation", "share of the device's peak", "share"],
  skipped_steps: ["Skipped steps", "so far"], routing_sigma: ["Routing spectrum", "singular values of the mixing between streams; 1: nothing grows or fades"],
  routing_composite: ["Routing through all layers", "singular values of the product of the layers' mixing"],
  routing_entropy: ["Routing entropy", "nats"], routing_effective_components: ["Effective components", "exp of the routing's entropy"],
  routing_pre_norm: ["Routing: into a layer", "norm of the weights that read the streams"], routing_post_norm: ["Routing: out of a layer", "norm of the weights that write to the streams"],
  routing_max_share: ["Largest share of a component", "mean over positions", "share"], mu: ["Dynamics: equilibrium", "mu, which activations are pulled towards"], mu_std: ["Dynamics: spread of mu", ""],
  beta_max_seen: ["Dynamics: largest beta", "strength of the pull"], velocity_rms: ["Dynamics: velocity", "root mean square"],
  boundary_rate: ["Boundary rate", "share of positions that begin a chunk"], ratio_loss: ["Ratio loss", "1: chunks as long as wanted"],
  tokens_per_chunk: ["Tokens per chunk", "of each stage"], loss_: ["Terms of the loss", ""],
};
const TRAINING = ["learning_rate", "grad_norm", "tokens_per_second", "memory_gb", "data_wait", "mfu", "skipped_steps"];
const QUIET = new Set(["tokens", "seconds", "epoch", "labels", "bytes", "step", "split", "rows", "perplexity"]);
const QUALITY = ["loss", "bpb", "accuracy", "top5_accuracy"];
const BAD = new Set(["nonfinite", "spike", "rolled_back", "save_failed", "mirror_failed", "anomaly", "leak", "diverged", "failed"]);
const MARKED = new Set(["resumed", "nonfinite", "spike", "rolled_back", "command", "stopped", "discovery", "anomaly", "leak", "save_failed", "failed", "diverged"]);

const words = name => { const text = name.replace(/_+$/, "").replaceAll("_", " "); return text.charAt(0).toUpperCase() + text.slice(1); };
const titleOf = name => (KNOWN[name] || [words(name)])[0];
const noteOf = name => (KNOWN[name] || ["", ""])[1] || "";
const kindOf = (name, metrics) => (KNOWN[name] || [])[2] || (metrics && metrics[name] && String(metrics[name].format || "").endsWith("%") ? "share" : undefined);
const valuesOf = column => Array.isArray(column) ? column : column.values;
const pick = (list, column) => Array.isArray(column) || !column.at ? list : column.at.map(place => list[place]);

// What the horizontal axis shows, for every logged row; null where the run does not say.
function axisOf(run, axis) {
  if (axis === "step") return run.steps;
  const column = run.columns[axis === "seconds" ? "seconds" : "tokens"];
  if (!column) return null;
  const full = Array.isArray(column) || !column.at ? valuesOf(column) : spread(column, run.steps.length);
  if (axis !== "bytes") return full;
  return run.bytes_per_token ? full.map(value => present(value) ? value * run.bytes_per_token : null) : null;
}

function spread(column, length) {
  const full = new Array(length).fill(null);
  column.at.forEach((place, i) => { full[place] = column.values[i]; });
  return full;
}

// Where an evaluation of `step` lies on an axis: between the logged rows around it.
function placeOf(run, axis, step) {
  if (axis === "step") return step;
  const full = axisOf(run, axis);
  let before = null, after = null;
  for (let i = 0; full && i < run.steps.length; i++) {
    if (!present(full[i])) continue;
    if (run.steps[i] <= step) before = i;
    else { after = i; break; }
  }
  if (before === null && after === null) return null;
  if (before === null) return full[after] * step / run.steps[after];
  if (run.steps[before] === step || after === null) return full[before] * (run.steps[before] === step ? 1 : step / (run.steps[before] || 1));
  return full[before] + (full[after] - full[before]) * (step - run.steps[before]) / (run.steps[after] - run.steps[before]);
}

// The axes that every run has.
const axesOf = runs => Object.keys(AXES).filter(axis => runs.every(run => { const full = axisOf(run, axis); return full && full.some(present); }));

// Which charts there are: {name, title, note, kind, members, group}; columns that belong together share one.
function families(runs) {
  const names = new Set(), evaluated = new Set(), metrics = {};
  for (const run of runs) {
    Object.assign(metrics, run.metrics || {});
    for (const name of Object.keys(run.columns)) names.add(name);
    for (const row of run.evals) for (const name of Object.keys(row)) if (typeof row[name] === "number") { names.add(name); evaluated.add(name); }
  }
  const found = new Map();
  const ranking = runs[0] && runs[0].summary && runs[0].summary.ranking_metric;
  const isQuality = name => QUALITY.includes(name) || name in metrics || name === ranking || /accuracy$/.test(name);
  for (const name of names) {
    if (QUIET.has(name)) continue;
    if (name === "skipped_steps" && !runs.some(run => run.columns[name] && valuesOf(run.columns[name]).some(value => value > 0))) continue;
    let key = name, group = TRAINING.includes(name) ? "training" : isQuality(name) ? "quality" : "model";
    if (name.startsWith("loss_") && !(name in metrics)) { key = "loss_"; group = "quality"; }
    else if (group === "model") {
      key = name.replace(/_(max|min|mean)$/, (whole, end) => end === "mean" || names.has(name.replace(/_(max|min)$/, end === "max" ? "_min" : "_max")) ? "" : whole);
      if (/\d/.test(key)) key = key.replace(/[._\/]?\d+/g, "");
    }
    if (!found.has(key)) found.set(key, { name: key, title: titleOf(key), note: noteOf(key), kind: kindOf(key, metrics), members: [], group });
    found.get(key).members.push(name);
  }
  for (const family of found.values()) if (family.name === "loss_" && family.members.length === 1) family.title = "Loss term: " + family.members[0].slice(5).replaceAll("_", " ");
  for (const family of found.values()) family.single = !runs.some(run => family.members.some(name => pointsOf(run, name) > 1));
  const place = family => family.name === ranking ? -1 : [...QUALITY, "loss_", ...TRAINING].indexOf(family.name) + 1 || 99;
  return [...found.values()].sort((a, b) => place(a) - place(b));
}

function pointsOf(run, name) {
  const column = run.columns[name];
  return Math.max(column ? valuesOf(column).filter(present).length : 0, run.evals.filter(row => present(row[name])).length);
}

// The series of one chart. One run: a colour a series; several: a colour a run, dots for evaluations.
function seriesOf(family, runs, view) {
  const found = [], many = runs.length > 1;
  runs.forEach((run, r) => {
    if (view.hidden && view.hidden.has(run.label)) return;
    family.members.forEach((member, m) => {
      const label = family.members.length > 1 ? shortened(member, family.name) : "";
      const full = axisOf(run, view.axis), column = run.columns[member];
      const colour = extra => many ? (run.colour ?? r) + COLOURS * m : found.length;
      if (column && full && valuesOf(column).some(present))
        found.push({ name: [many ? run.label : "", label].filter(Boolean).join(" · ") || "training", x: pick(full, column), y: valuesOf(column), colour: colour(0) });
      for (const split of new Set(run.evals.map(row => row.split))) {
        const rows = run.evals.filter(row => row.split === split && present(row[member]));
        if (!rows.length) continue;
        const name = [many ? run.label : "", label, split].filter(Boolean).join(" · ");
        found.push({ name, x: rows.map(row => placeOf(run, view.axis, row.step)), y: rows.map(row => row[member]), points: true, colour: colour(1) });
      }
    });
  });
  return found;
}

const shortened = (member, family) => member.startsWith(family) ? member.slice(family.length).replace(/^[._]/, "").replaceAll("_", " ") || member : member.replaceAll("_", " ");

function marksOf(run, axis) {
  const found = [];
  for (const event of run.events || []) {
    if (!MARKED.has(event.event) || !present(event.step) || event.step === 0) continue;
    const text = `${eventName(event.event)} at step ${event.step}${describe(event) ? ": " + describe(event) : ""}`;
    found.push({ x: placeOf(run, axis, event.step), text, short: found.length < 8 ? eventName(event.event).toLowerCase() : "", bad: BAD.has(event.event) });
  }
  return found;
}

// The charts of a group in `element`. Returns a function that draws them again for other runs or another view.
function curves(element, group, firstRuns, firstView) {
  const made = new Map(), holder = node("div", "small");
  element.append(holder);
  const redraw = (runs, view) => {
    const wanted = families(runs).filter(family => family.group === group && !family.single);
    wanted.forEach((family, place) => {
      const options = {
        title: family.title, note: family.note, series: seriesOf(family, runs, view), x_title: AXES[view.axis],
        x_kind: view.axis === "seconds" ? "seconds" : undefined, y_kind: family.kind, log: view.log, smooth: family.name === "learning_rate" ? 0 : view.smooth,
        marks: runs.length === 1 ? marksOf(runs[0], view.axis) : [], legend: runs.length === 1 || family.members.length > 1 ? undefined : false,
        height: group === "quality" && place === 0 ? 320 : 190,
        floor: ["learning_rate", "memory_gb", "tokens_per_second", "mfu"].includes(family.name) ? 0 : undefined,
      };
      if (made.has(family.name)) { made.get(family.name).update(options); return; }
      const card = node("div", "card" + (group === "quality" && place === 0 ? " wide" : ""));
      holder.append(card);
      made.set(family.name, chart(card, options));
    });
    element.hidden = wanted.length === 0;
    return wanted.length;
  };
  redraw(firstRuns, firstView);
  return redraw;
}

// The switches over all charts: horizontal axis, logarithm, smoothing. `changed` is called with the new view.
function viewSwitches(element, runs, view, changed) {
  const choice = node("span", "choice");
  choice.setAttribute("role", "group");
  choice.setAttribute("aria-label", "Horizontal axis");
  for (const axis of axesOf(runs)) {
    const button = node("button", "", axis === "step" ? "steps" : AXES[axis]);
    button.type = "button";
    button.setAttribute("aria-pressed", String(view.axis === axis));
    button.addEventListener("click", () => {
      view.axis = axis;
      for (const other of choice.children) other.setAttribute("aria-pressed", String(other === button));
      changed(view);
    });
    choice.append(button);
  }
  const log = node("label"), box = node("input"), smooth = node("label"), range = node("input"), shown = node("output", "soft", "off");
  box.type = "checkbox";
  box.checked = Boolean(view.log);
  box.addEventListener("change", () => { view.log = box.checked; changed(view); });
  log.append(box, "logarithmic");
  Object.assign(range, { type: "range", min: 0, max: 10, value: 0 });
  range.setAttribute("aria-label", "Smoothing");
  range.addEventListener("input", () => {
    view.smooth = Number(range.value) ? 1 - 2 ** -(Number(range.value) / 1.6) : 0; // 0 ... 0.987
    shown.textContent = view.smooth ? view.smooth.toFixed(2) : "off";
    changed(view);
  });
  smooth.append("smoothing", range, shown);
  element.append(choice, log, smooth);
}

// Samples over the run: the last first, the others under a slider.
function samples(element, runs) {
  const having = runs.filter(run => run.samples.length);
  element.hidden = !having.length;
  if (!having.length) return;
  const card = node("div", "card long"), tools = node("div", "tools"), text = node("pre", "prose"), where = node("output", "soft");
  const range = node("input");
  let run = having[0];
  const show = () => {
    const sample = run.samples[Number(range.value)];
    text.textContent = sample.text.trim() || "(nothing)";
    where.textContent = `step ${sample.step}`;
  };
  const choose = () => { Object.assign(range, { type: "range", min: 0, max: run.samples.length - 1 }); range.value = run.samples.length - 1; show(); };
  range.setAttribute("aria-label", "Which sample");
  range.addEventListener("input", show);
  if (having.length > 1) tools.append(chooser(having, chosen => { run = chosen; choose(); }));
  tools.append(range, where);
  text.tabIndex = 0;
  card.append(tools, text);
  element.append(card);
  choose();
}

function chooser(runs, chosen) {
  const select = node("select");
  select.setAttribute("aria-label", "Run");
  runs.forEach((run, place) => { const option = node("option", "", run.label || run.name); option.value = place; select.append(option); });
  select.addEventListener("change", () => chosen(runs[Number(select.value)]));
  return select;
}

const EVENTS = { nonfinite: "Not finite", rolled_back: "Rolled back", save_failed: "Save failed", mirror_failed: "Mirror failed", command: "Command", search_ended: "Search ended" };
const eventName = event => EVENTS[event] || words(event);

function describe(event) {
  if (event.event === "command") return event.line || "";
  if (event.event === "rolled_back") return `to step ${event.to}: ${event.reason}`;
  if (event.event === "saved") return event.best ? "the best so far" : "";
  if (event.event === "started" || event.event === "resumed") return [event.precision, event.processes > 1 ? `${event.processes} processes, ${event.parallel}` : ""].filter(Boolean).join(", ");
  const known = new Set(["event", "time", "step", "plan", "rows"]);
  return event.text || event.reason || Object.entries(event).filter(([key, value]) => !known.has(key) && value !== null).map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
}

// What happened; saves together where they follow one another.
function events(element, run) {
  const list = node("ol", "events"), all = run.events || [];
  for (let i = 0; i < all.length; i++) {
    const event = all[i], row = node("li");
    let last = i;
    if (["saved", "nonfinite", "spike"].includes(event.event)) while (last + 1 < all.length && all[last + 1].event === event.event) last++;
    const many = last - i + 1, step = present(event.step) ? `step ${event.step}` + (many > 1 ? ` – ${all[last].step}` : "") : "";
    const best = all.slice(i, last + 1).filter(one => one.best);
    const text = many > 1 && event.event !== "saved" ? `${many} steps` : many > 1 ? `${many} checkpoints` + (best.length ? `, the best at step ${best[best.length - 1].step}` : "") : describe(event);
    row.append(node("span", "at", step), node("span", BAD.has(event.event) ? "bad" : "", eventName(event.event)), node("span", "soft", text));
    const time = node("time", "unseen", event.time || "");
    row.append(time);
    row.title = event.time || "";
    list.append(row);
    i = last;
  }
  element.append(list);
}

// Text by what each token cost: {tokens, losses, chunks: [places where chunks begin, a list a stage], given}.
function colouredText(element, text) {
  const tools = node("div", "tools"), prose = node("div", "prose shade"), about = node("output", "soft", "Point at a token, or walk with the arrow keys.");
  const most = 8, shade = node("label"), box = node("input"), ramp = node("span", "ramp");
  Object.assign(box, { type: "checkbox", checked: true });
  box.addEventListener("change", () => prose.classList.toggle("shade", box.checked));
  shade.append(box, " shade by loss");
  ramp.append("0", node("i"), `${most}+ ${text.unit || "nats"}`);
  tools.append(shade, ramp);
  const spans = text.tokens.map((token, place) => {
    const span = node("span", "t", token), loss = text.losses[place];
    if (present(loss)) span.style.setProperty("--surprise", Math.min(1, loss / most).toFixed(3));
    return span;
  });
  if (text.chunks && text.chunks.length) {
    const select = node("select"), label = node("label");
    text.chunks.forEach((_, stage) => { const option = node("option", "", `chunks of stage ${stage}`); option.value = stage; select.append(option); });
    const none = node("option", "", "no chunks");
    none.value = "";
    select.append(none);
    const show = () => {
      const starts = new Set(select.value === "" ? [] : text.chunks[Number(select.value)]);
      let count = 0;
      prose.classList.toggle("chunked", select.value !== "");
      spans.forEach((span, place) => {
        if (starts.has(place)) count++;
        span.classList.toggle("starts", starts.has(place));
        span.classList.toggle("odd", count % 2 === 1);
        span.classList.toggle("even", count % 2 === 0);
      });
    };
    select.setAttribute("aria-label", "Chunks");
    select.addEventListener("change", show);
    label.append(select);
    tools.append(label);
    show();
  }
  let at = -1;
  const show = place => {
    if (at >= 0) spans[at].classList.remove("at");
    at = Math.max(0, Math.min(spans.length - 1, place));
    spans[at].classList.add("at");
    const loss = text.losses[at];
    about.textContent = `${JSON.stringify(text.tokens[at])}: ` + (present(loss) ? `${loss.toFixed(2)} nats, probability ${number(Math.exp(-loss), "share")}` : "given, not predicted");
  };
  spans.forEach((span, place) => span.addEventListener("pointerenter", () => show(place)));
  prose.tabIndex = 0;
  prose.setAttribute("aria-label", "Text coloured by loss; arrow keys walk through its tokens");
  prose.addEventListener("keydown", event => {
    const target = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(target);
    spans[at].scrollIntoView({ block: "nearest" });
  });
  prose.append(...spans);
  about.setAttribute("role", "status");
  element.append(tools, prose, about);
}

// {columns: [{key, title, unit, lower_is_better}], rows: [{label, colour, cells: {key: number | string | {mean, low, high}}}]}
function comparison(element, table, first) {
  const scroll = node("div", "scroll"), made = node("table"), head = node("thead"), body = node("tbody"), line = node("tr");
  const value = cell => cell !== null && typeof cell === "object" ? cell.mean : cell;
  const best = new Map();
  for (const column of table.columns) {
    if (column.lower_is_better === undefined || column.lower_is_better === null || table.rows.length < 2) continue;
    const numbers = table.rows.map(row => value(row.cells[column.key])).filter(present);
    if (numbers.length > 1 && Math.min(...numbers) !== Math.max(...numbers)) best.set(column.key, column.lower_is_better ? Math.min(...numbers) : Math.max(...numbers));
  }
  const corner = node("th", "", first || "run");
  corner.scope = "col";
  line.append(corner);
  let sorted = null, up = true;
  for (const column of table.columns) {
    const textual = table.rows.every(row => typeof (value(row.cells[column.key]) ?? "") === "string");
    const cell = node("th", textual ? "" : "n"), button = node("button", "key", column.title || words(column.key));
    cell.scope = "col";
    button.style.setProperty("--key", "transparent");
    button.title = "Sort";
    button.addEventListener("click", () => { up = sorted === column.key ? !up : column.lower_is_better !== false; sorted = column.key; fill(); });
    cell.append(button);
    if (column.unit) cell.append(node("div", "soft", column.unit));
    line.append(cell);
  }
  const fill = () => {
    const rows = [...table.rows];
    if (sorted !== null) rows.sort((a, b) => { const x = value(a.cells[sorted]), y = value(b.cells[sorted]); return (x === undefined || x === null) - (y === undefined || y === null) || (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
    body.replaceChildren(...rows.map(row => {
      const tr = node("tr"), name = node("th");
      name.scope = "row";
      if (row.colour !== undefined) { const swatch = node("span", "swatch"); swatch.style.setProperty("--key", `var(--c${row.colour % COLOURS})`); name.append(swatch); }
      name.append(row.label);
      name.className = "name";
      tr.append(name);
      for (const column of table.columns) {
        const cell = row.cells[column.key], plain = value(cell);
        const td = node("td", typeof plain === "string" ? "" : "n", typeof plain === "string" ? plain : number(plain, column.kind));
        if (best.has(column.key) && plain === best.get(column.key)) td.classList.add("best");
        if (cell && typeof cell === "object" && present(cell.low) && Math.abs(cell.high - cell.low) > 0.01 * Math.abs(plain)) td.append(node("div", "spread", `${number(cell.low, column.kind)} – ${number(cell.high, column.kind)}`));
        tr.append(td);
      }
      return tr;
    }));
  };
  head.append(line);
  made.append(head, body);
  scroll.append(made);
  element.append(scroll);
  fill();
}

// Rows {label, mean, low, high, colour} as horizontal bars from below the lowest, as the note says.
function bars(element, rows, title, kind) {
  const usable = rows.filter(row => present(row.mean));
  if (!usable.length) return;
  const low = Math.min(...usable.map(row => row.low ?? row.mean)), high = Math.max(...usable.map(row => row.high ?? row.mean));
  const start = low > 0 && low > 0.5 * high ? low - 0.25 * (high - low || low) : Math.min(0, low), span = high - start || 1, at = value => 82 * (value - start) / span;
  const holder = node("div", "bars");
  for (const row of usable) {
    const track = node("div", "track"), bar = node("i"), range = node("s"), label = node("b", "", number(row.mean, kind));
    track.style.setProperty("--key", `var(--c${(row.colour ?? 0) % COLOURS})`);
    bar.style.width = `${at(row.mean)}%`;
    range.style.left = `${at(row.low ?? row.mean)}%`;
    range.style.width = `${Math.max(0, at(row.high ?? row.mean) - at(row.low ?? row.mean))}%`;
    label.style.left = `${at(row.high ?? row.mean)}%`;
    track.append(bar, range, label);
    holder.append(node("span", "", row.label), track);
  }
  if (title) element.append(node("h3", "", title));
  element.append(holder);
  if (start !== 0) element.append(node("p", "soft", `Bars begin at ${number(start, kind)}${usable.some(row => present(row.low) && row.low !== row.high) ? "; the line is the range over seeds" : ""}.`));
}

// A board (see reporting/tables.py): its table, its problems where they are asked for, its bars, and its curves over sizes in the element
// that `below` gives.
function drawBoard(element, board, problems = [], below = () => element) {
  comparison(element, board, board.first);
  if (problems.length) {
    const list = node("ul", "problems");
    list.append(...problems.map(text => node("li", "", text)));
    element.append(list);
  }
  if (board.bars && board.bars.rows.length > 1) bars(element, board.bars.rows, board.bars.title, board.bars.kind);
  if (!board.scaling || !board.scaling.length) return;
  const series = board.scaling.flatMap((line, place) => [
    { name: line.label, x: line.points.map(point => point.x), y: line.points.map(point => point.value), points: true, colour: line.colour ?? place },
    ...(line.curve ? [{ name: `${line.label}, fitted`, x: line.curve.x, y: line.curve.y, colour: line.colour ?? place }] : [])]);
  chart(below(), { title: "Against size", note: board.scaling_note, series, x_title: board.scaling_x, log_x: true, height: 300 });
}

// A switch between light and dark, beside what the system prefers.
function themeSwitch(element) {
  const button = node("button", "", "Light / dark");
  button.type = "button";
  button.addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  element.append(button);
}
