"use strict";
// The page of `treadle report`: one run, or several beside each other, from the data in #data.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, one = runs.length === 1 ? runs[0] : null;
const view = { axis: "step", log: false, smooth: 0, hidden: new Set() };
const main = node("main"), redraws = [];
const redraw = () => { for (const again of redraws) again(runs, view); };

function section(title, note, name) {
  const made = node("section", name || "");
  const heading = node("h2", "", title);
  made.append(heading);
  if (note) made.append(node("p", "soft", note));
  main.append(made);
  return made;
}

// ---- the head ----

const STATES = { finished: "good", diverged: "bad", failed: "bad", stopped: "plain", unfinished: "live" };
const header = document.querySelector("header.top");
if (one) header.append(node("span", `badge ${STATES[one.status] || "plain"}`, one.status));
const tools = node("div", "tools"), print = node("button", "", "Print");
print.type = "button";
print.addEventListener("click", () => window.print());
themeSwitch(tools);
tools.append(print);
header.append(tools, node("p", "lead", data.lead));

const bar = node("nav", "bar"), inside = node("div");
bar.setAttribute("aria-label", "View of the curves");
bar.append(inside);
if (runs.length) {
  viewSwitches(inside, runs, view, redraw);
  if (runs.length > 1) {
    const legend = node("span", "legend runs");
    legend.setAttribute("role", "group");
    legend.setAttribute("aria-label", "Runs that are shown");
    runs.forEach((run, place) => {
      const button = node("button", "key", run.label);
      button.type = "button";
      button.style.setProperty("--key", `var(--c${place % COLOURS})`);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!view.hidden.delete(run.label)) view.hidden.add(run.label);
        button.setAttribute("aria-pressed", String(!view.hidden.has(run.label)));
        redraw();
      });
      legend.append(button);
    });
    inside.append(legend);
  }
}

const page = document.getElementById("page");
page.replaceChildren(...(runs.length ? [bar] : []), main);

// ---- the sections ----

if (data.tiles.length) {
  const tiles = node("div", "tiles");
  for (const tile of data.tiles) {
    const made = node("div", "tile");
    made.append(node("b", "", trimmed(number(tile.value, tile.kind))), node("span", "", tile.title));
    tiles.append(made);
  }
  main.append(tiles);
}

for (const board of data.boards) {
  const made = section(board.title, board.note), card = node("div", "card");
  made.append(card);
  drawBoard(card, board, board.problems, () => {
    const second = node("div", "card");
    second.style.marginTop = "1rem";
    made.append(second);
    return second;
  });
}

const GROUPS = [
  ["quality", "Quality", one ? "Lines: what training logged; dots: evaluations on held-out text or data." : "A colour a run. Lines: what training logged; dots: evaluations."],
  ["training", "Training", "Learning rate, gradients, speed and memory."],
  ["model", "Inside the model", "What the architectures themselves log: routing, dynamics, chunks, terms of their losses."],
];
for (const [group, title, note] of GROUPS) {
  if (!families(runs).some(family => family.group === group && !family.single)) continue;
  redraws.push(curves(section(title, note), group, runs, view));
}

// What was measured once has no curve: the newest evaluation as a table.
const once = families(runs).filter(family => family.single).flatMap(family => family.members).filter(name => runs.some(run => run.evals.some(row => present(row[name]))));
if (once.length) {
  const card = node("div", "card"), latest = (run, name) => run.evals.map(row => row[name]).filter(present).pop();
  const metrics = Object.assign({}, ...runs.map(run => run.metrics || {}));
  comparison(card, one
    ? { columns: [{ key: "value", title: "value" }], rows: once.map(name => ({ label: titleOf(name), cells: { value: number(latest(one, name), kindOf(name, metrics)) } })) }
    : { columns: once.map(name => ({ key: name, title: titleOf(name), kind: kindOf(name, metrics) })), rows: runs.map((run, colour) => ({ label: run.label, colour, cells: Object.fromEntries(once.map(name => [name, latest(run, name)])) })) }, one ? "metric" : "run");
  section("The newest evaluation", "What was measured once has no curve.").append(card);
}

const coloured = runs.filter(run => run.text && run.text.length);
if (coloured.length) {
  const made = section("Text by its loss", "Held-out text; a token's shade is what it cost the model to predict it from the text before. Computed from the checkpoint when this report was made.", "page");
  const card = node("div", "card long"), choice = node("div", "tools"), holder = node("div");
  let run = coloured[0], passage = 0;
  const show = () => {
    holder.replaceChildren();
    const text = run.text[Math.min(passage, run.text.length - 1)];
    const known = text.losses.filter(present), mean = known.reduce((sum, value) => sum + value, 0) / (known.length || 1);
    colouredText(holder, text);
    holder.append(node("p", "soft", `${text.title}: ${known.length} predicted tokens, ${number(mean)} nats each on average` + (text.per_chunk ? `; tokens per chunk: ${text.per_chunk.map(value => number(value)).join(", ")}` : "") + "."));
  };
  if (coloured.length > 1) choice.append(chooser(coloured, chosen => { run = chosen; show(); }));
  const most = Math.max(...coloured.map(each => each.text.length));
  if (most > 1) {
    const passages = node("span", "choice");
    passages.setAttribute("role", "group");
    passages.setAttribute("aria-label", "Passage");
    for (let i = 0; i < most; i++) {
      const button = node("button", "", `passage ${i + 1}`);
      button.type = "button";
      button.setAttribute("aria-pressed", String(i === 0));
      button.addEventListener("click", () => {
        passage = i;
        for (const other of passages.children) other.setAttribute("aria-pressed", String(other === button));
        show();
      });
      passages.append(button);
    }
    choice.append(passages);
  }
  if (choice.children.length) card.append(choice);
  card.append(holder);
  made.append(card);
  show();
}
const silent = runs.filter(run => run.text_note);
if (silent.length) {
  const made = coloured.length ? main.lastChild : section("Text by its loss");
  for (const run of silent) made.append(node("p", "soft", (one ? "" : `${run.label}: `) + run.text_note));
}

if (runs.some(run => run.samples.length)) samples(section("Samples", "What the model wrote at its evaluations."), runs);

const planned = runs.filter(run => run.planned && run.planned.rows.length);
if (planned.length) {
  const made = section("What the planner said, and what was", data.planner_note), card = node("div", "card");
  if (one) comparison(card, { columns: [{ key: "planned", title: "planned" }, { key: "was", title: "was" }, { key: "ratio", title: "was / planned" }], rows: one.planned.rows }, "quantity");
  else {
    const quantities = planned[0].planned.rows.slice(1).map(row => row.label);
    comparison(card, {
      columns: quantities.flatMap((label, i) => [{ key: `p${i}`, title: label, unit: "planned" }, { key: `w${i}`, title: "was" }]),
      rows: planned.map(run => ({ label: run.label, colour: runs.indexOf(run), cells: Object.fromEntries(quantities.flatMap((label, i) => {
        const cells = (run.planned.rows.find(row => row.label === label) || { cells: {} }).cells;
        return [[`p${i}`, cells.planned], [`w${i}`, cells.was]];
      })) })),
    });
  }
  card.append(...[...new Set(planned.map(run => run.planned.note))].map(note => node("p", "soft", note)));
  made.append(card);
}
for (const run of runs) if (run.planned && !run.planned.rows.length && run.planned.note) section("What the planner said").append(node("p", "soft", (one ? "" : `${run.label}: `) + run.planned.note));

if (runs.some(run => run.events.length)) {
  const made = section("Events", "Starts, saves, commands, rollbacks.");
  for (const run of runs) {
    if (!run.events.length) continue;
    const card = node("div", "card long"), holder = one ? card : node("details");
    if (!one) { holder.append(node("summary", "", `${run.label}: ${run.events.length} events`)); card.append(holder); card.style.marginBottom = ".6rem"; }
    events(holder, run);
    if (run.events_note) holder.append(node("p", "soft", run.events_note));
    made.append(card);
  }
}

if (data.differences) {
  const made = section("What differs between the configurations", data.differences.note), card = node("div", "card");
  const tableOf = rows => {
    const scroll = node("div", "scroll"), table = node("table"), head = node("tr"), body = node("tbody"), top = node("thead");
    head.append(node("th", "", "key"), ...runs.map(run => node("th", "", run.label)));
    for (const row of rows) {
      const line = node("tr"), key = node("th", "code", row.key);
      key.scope = "row";
      line.append(key, ...row.values.map(value => node("td", "code" + (row.usual !== null && value !== row.usual ? " changed" : ""), value === null ? "–" : value)));
      body.append(line);
    }
    top.append(head);
    table.append(top, body);
    scroll.append(table);
    return scroll;
  };
  card.append(data.differences.rows.length ? tableOf(data.differences.rows) : node("p", "soft", "Nothing but names, folders and the keys of the architectures."));
  if (data.differences.own.length) {
    const details = node("details");
    details.append(node("summary", "", `${data.differences.own.length} keys of the architectures themselves`), tableOf(data.differences.own));
    card.append(details);
  }
  made.append(card);
}

if (runs.length) {
  const made = section("Settings and machine", one ? "Keys whose value is not the default are marked." : "");
  for (const run of runs) {
    const card = node("div", "card long"), details = node("details"), table = node("table"), body = node("tbody"), changed = new Set(run.changed);
    card.style.marginBottom = ".6rem";
    if (run.command) card.append(node("pre", "", `${run.command}`));
    details.append(node("summary", "", (one ? "" : `${run.label}: `) + `all ${Object.keys(run.config).length} keys`));
    for (const [key, value] of Object.entries(run.config)) {
      const line = node("tr"), name = node("th", "code", key);
      name.scope = "row";
      line.append(name, node("td", "code" + (changed.has(key) ? " changed" : ""), typeof value === "string" ? value : JSON.stringify(value)));
      body.append(line);
    }
    table.append(body);
    details.append(table);
    card.append(details);
    if (run.machine) card.append(node("p", "soft", run.machine));
    made.append(card);
  }
}

page.after(node("footer", "", data.made));
