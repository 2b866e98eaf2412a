// The page of a live run: asks the server what is new, every second while it is looked at, and draws it with the report's pieces.

const EVERY = 1000; // ms between two questions
const HIDDEN = 15000; // the same of a tab that nobody looks at
const WAIT = 30000; // until an answer counts as lost
const MOST_ANSWERS = 50;
const SETTABLE = ["optim.learning_rate", "optim.min_lr_ratio", "log.logging_steps", "eval.eval_steps", "checkpoint.save_steps", "alerts.alert_steps", "train.on_spike"];
const ACTIVE = new Set(["training", "preparing"]);
const STATES = { training: "live", preparing: "live", running: "live", finished: "good", done: "good", failed: "bad", diverged: "bad", gone: "bad", interrupted: "bad" };
const at = id => document.getElementById(id);

const live = { kind: "", cursor: "", runs: new Map(), group: null, path: "", readOnly: false, token: "", chosen: 0, failures: 0 };
const view = { axis: "step", log: false, smooth: 0, hidden: new Set() };
const side = new Map(); // number of a run that a suite makes on its way -> whether it is drawn; null where nobody said
const drawn = { quality: null, training: null, model: null, axes: "", table: "", jobs: "" };

function headers(more) {
  return live.token ? { Authorization: `Bearer ${live.token}`, ...more } : { ...more };
}

// ---- what is new ----

function take(news) {
  if (news.whole) live.runs.clear();
  Object.assign(live, { kind: news.kind, path: news.path, name: news.name, readOnly: news.read_only, cursor: news.cursor });
  if (news.group) live.group = news.group;
  for (const told of news.runs) merge(told);
}

function merge(told) {
  const before = live.runs.get(told.number), from = told.from;
  const run = from.rows && before ? before : { steps: [], columns: {}, evals: [], events: [], samples: [], summary: null, config: {} };
  run.steps = run.steps.slice(0, from.rows).concat(told.steps);
  for (const name of new Set([...Object.keys(run.columns), ...Object.keys(told.columns)])) {
    const kept = (run.columns[name] || []).slice(0, from.rows);
    while (kept.length < from.rows) kept.push(null);
    run.columns[name] = kept.concat(told.columns[name] || told.steps.map(() => null));
  }
  run.evals = run.evals.slice(0, from.evals).concat(told.evals);
  run.events = run.events.slice(0, from.events).concat(told.events);
  if (told.config) Object.assign(run, { config: told.config, summary: told.summary });
  run.summary ||= { ranking_metric: told.status.metric }; // what is ranked by comes first
  run.samples = told.sample ? [told.sample] : [];
  const scored = run.evals.filter(row => row.bytes > 0 && row.labels > 0).pop();
  Object.assign(run, { number: told.number, label: told.label, name: told.label, folder: told.folder, status: told.status, bytes_per_token: scored ? scored.bytes / scored.labels : null });
  live.runs.set(told.number, run);
}

async function ask() {
  const leave = new AbortController(), late = setTimeout(() => leave.abort(), WAIT);
  try {
    const answer = await fetch(`run/data?since=${encodeURIComponent(live.cursor)}`, { headers: headers(), signal: leave.signal });
    if (answer.status === 401) { locked(); return; }
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    take(await answer.json());
    live.failures = 0;
    at("lost").hidden = true;
    at("locked").hidden = true;
    at("live").hidden = at("charts").hidden = false;
    draw();
  } catch (problem) {
    if (++live.failures < 2) return;
    at("lost").hidden = false;
    at("lost").textContent = `The page's server does not answer; the training goes on without it. Start it again: treadle watch ${live.path || "RUN"}`;
  } finally {
    clearTimeout(late);
  }
}

let timer = 0, asking = false;
async function round() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  await ask();
  asking = false;
  clearTimeout(timer);
  timer = setTimeout(round, document.hidden ? HIDDEN : EVERY * Math.min(10, 1 + live.failures));
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) round(); });

function locked() {
  at("refused").textContent = live.token ? "That is not the token." : "";
  at("locked").hidden = false;
  at("live").hidden = at("charts").hidden = at("bar").hidden = true;
  at("lead").textContent = "";
}
at("unlock").addEventListener("submit", event => {
  event.preventDefault();
  live.token = at("token").value.trim();
  live.cursor = "";
  round();
});

// ---- what is shown ----

const several = () => live.kind !== "run";
const runs = () => [...live.runs.values()];
const tile = (value, text) => { const made = node("div", "tile"); made.append(node("b", "", value), node("span", "", text)); return made; };
const quote = text => /^[\w./@:+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

function badge(state) {
  const made = node("span", `badge ${STATES[state] || "plain"}`, state);
  return made;
}

function draw() {
  document.title = `${titleState()}${live.name} – treadle`;
  at("name").textContent = live.name;
  if (several()) drawGroup(); else drawRun(live.runs.get(0));
  drawCharts();
  drawSteering();
}

function titleState() {
  const list = runs();
  if (several()) { const busy = list.filter(run => ACTIVE.has(run.status.state)).length; return busy ? `${busy} running · ` : ""; }
  const status = list.length ? list[0].status : null;
  if (!status) return "";
  return status.state === "training" && status.max_steps ? `${Math.floor(100 * status.step / status.max_steps)}% · ` : `${status.state} · `;
}

function replaceBadge(state) {
  if (at("badge").dataset.state === state) return; // said once by a screen reader
  at("badge").dataset.state = state;
  at("badge").replaceChildren(badge(state));
}

function drawRun(run) {
  if (!run) return;
  const status = run.status, last = status.last || {};
  replaceBadge(status.state);
  at("lead").textContent = [run.config["model.arch"], run.summary && run.summary.parameters ? `${number(run.summary.parameters)} parameters` : "", run.folder].filter(Boolean).join(" · ");
  ended(run);
  const share = status.max_steps ? status.step / status.max_steps : 0;
  at("progress").hidden = !status.max_steps;
  at("progress").setAttribute("aria-valuemax", status.max_steps || 0);
  at("progress").setAttribute("aria-valuenow", status.step);
  at("progress").firstElementChild.style.width = `${Math.min(100, 100 * share)}%`;
  const tiles = [tile(status.max_steps ? `${status.step} / ${status.max_steps}` : String(status.step), "step")];
  const scored = run.evals.filter(row => present(row[status.metric]));
  if (scored.length) tiles.push(tile(number(scored[scored.length - 1][status.metric], kindOf(status.metric)), `${titleOf(status.metric).toLowerCase()}, held out, step ${scored[scored.length - 1].step}`));
  if (present(last.loss)) tiles.push(tile(number(last.loss), "training loss"));
  if (present(status.seconds_left)) tiles.push(tile(duration(status.seconds_left), "left"));
  else if (present(last.seconds)) tiles.push(tile(duration(last.seconds), "of training"));
  for (const [name, text] of [["tokens_per_second", "tokens a second"], ["learning_rate", "learning rate"], ["grad_norm", "gradient norm"], ["memory_gb", "GB of memory"]])
    if (present(last[name])) tiles.push(tile(number(last[name]), text));
  if (present(status.saved)) tiles.push(tile(`step ${status.saved}`, "last checkpoint"));
  const attention = run.events.filter(event => BAD.has(event.event) || event.text && !["data", "command"].includes(event.event));
  if (attention.length) { const made = tile(String(attention.length), attention.length === 1 ? "warning, see Events" : "warnings, see Events"); made.classList.add("bad"); tiles.push(made); }
  at("tiles").replaceChildren(...tiles);
  const sample = run.samples[0];
  at("sampled").hidden = !sample;
  if (sample && at("sample").dataset.step !== `${sample.step}:${sample.text.length}`) {
    at("sample").dataset.step = `${sample.step}:${sample.text.length}`;
    at("sample").textContent = sample.text.trim() || "(nothing)";
    at("sample-step").textContent = `written by the model after step ${sample.step}`;
  }
  at("happened").hidden = !run.events.length;
  if (drawn.events !== run.events.length) {
    drawn.events = run.events.length;
    at("events").replaceChildren();
    events(at("events"), run);
    const list = at("events").firstElementChild;
    list.append(...[...list.children].reverse()); // the newest first
  }
  const config = Object.entries(run.config).map(([key, value]) => `${key} = ${JSON.stringify(value)}`).join("\n");
  at("settings").hidden = !config;
  if (at("config").textContent !== config) at("config").textContent = config;
}

// What is said when nobody trains the run any more, and what to type next.
function ended(run) {
  const { state, reason, step, max_steps } = run.status, folder = quote(run.folder), again = `treadle train ${quote(run.folder + "/config.toml")}`;
  const said = {
    finished: [`Finished at step ${step}.`, `treadle report ${folder}`, `treadle generate ${folder}`],
    stopped: [`Stopped${reason ? ` by ${reason}` : ""} at step ${step}${max_steps ? ` of ${max_steps}` : ""}; saved. To go on:`, again, `treadle report ${folder}`],
    diverged: [`It diverged at step ${step}; Events say what came before.`, `treadle report ${folder}`],
    failed: [`It failed at step ${step}; its terminal and Events say why. To try again:`, again],
    interrupted: [`Its process is gone and left no word (killed, or the machine went down). To go on from the last checkpoint:`, again],
    gone: [`${run.folder} is no longer there. This page waits for it.`],
    waiting: ["Nothing has been trained here yet. This page waits for it."],
  }[state];
  const key = said ? said.join("\n") : "";
  if (at("ended").dataset.key === key) return;
  at("ended").dataset.key = key;
  at("ended").hidden = !said;
  if (said) at("ended").replaceChildren(node("span", "", said[0]), ...said.slice(1).map(line => node("code", "", line)));
}

function drawGroup() {
  const list = runs(), group = live.group, busy = list.filter(run => ACTIVE.has(run.status.state)).length;
  const jobs = jobsOf(list, group), done = jobs.filter(job => STATES[job.state] === "good").length, failed = jobs.filter(job => STATES[job.state] === "bad").length;
  const state = busy ? "running" : group && group.done === true || jobs.length && done + failed === jobs.length ? "done" : "waiting";
  replaceBadge(state);
  at("lead").textContent = `${{ suite: "Suite", sweep: "Sweep", folder: "Folder of runs" }[live.kind]} · ${live.path}`;
  at("progress").hidden = !jobs.length;
  at("progress").setAttribute("aria-valuemax", jobs.length);
  at("progress").setAttribute("aria-valuenow", done + failed);
  const begun = list.reduce((sum, { status }) => sum + (ACTIVE.has(status.state) && status.max_steps ? Math.min(1, status.step / status.max_steps) : 0), 0);
  at("progress").firstElementChild.style.width = `${jobs.length ? 100 * (done + failed + begun) / jobs.length : 0}%`;
  const tiles = [tile(`${done} / ${jobs.length}`, "runs done"), tile(String(busy), "running now")];
  if (failed) { const made = tile(String(failed), "failed or interrupted"); made.classList.add("bad"); tiles.push(made); }
  const best = group && group.board && group.board.bars && group.board.bars.ranked !== false && group.board.bars.rows[0];
  if (best && present(best.mean)) tiles.push(tile(number(best.mean, group.board.bars.kind), `best ${group.board.bars.title} so far: ${best.label}`));
  const spent = group && group.cpu_seconds ? group.cpu_seconds : list.reduce((sum, run) => sum + (run.summary.cpu_seconds || 0), 0);
  if (spent) tiles.push(tile(duration(spent), "CPU time so far"));
  at("tiles").replaceChildren(...tiles);
  const report = `treadle report ${quote(live.path)}`, key = state === "done" ? report : "";
  if (at("ended").dataset.key !== key) {
    at("ended").dataset.key = key;
    at("ended").hidden = !key;
    at("ended").replaceChildren(node("span", "", failed ? "All runs have ended; some failed." : "All runs are done."), node("code", "", report));
  }
  drawTable(group);
  drawJobs(jobs, group);
}

function jobsOf(list, group) {
  const byFolder = new Map(list.map(run => [run.folder, run]));
  const jobs = (group ? group.jobs : []).map(job => {
    const run = byFolder.get(job.folder);
    if (run) byFolder.delete(job.folder);
    const state = run ? run.status.state : "", settled = ["done", "failed"].includes(job.state);
    const own = ACTIVE.has(state) || !settled && ["interrupted", "diverged"].includes(state) ? state : ""; // the table is written when a run has ended
    if (run) run.colour = job.colour;
    if (run && job.kind !== "run" && !side.has(run.number)) side.set(run.number, null);
    return { name: job.label, state: own || job.state, run, cpu: job.cpu_seconds, problem: job.problem };
  });
  for (const run of byFolder.values()) jobs.push({ name: run.label, state: run.status.state, run, cpu: null });
  return jobs;
}

function drawTable(group) {
  const board = group && group.board, key = JSON.stringify(board);
  at("table").hidden = !board || !board.rows.some(row => Object.values(row.cells).some(Boolean));
  if (at("table").hidden || key === drawn.table) return;
  drawn.table = key;
  at("table-note").textContent = board.note || "";
  at("rows").replaceChildren();
  drawBoard(at("rows"), board); // its problems stand beside the jobs
}

function drawJobs(jobs, group) {
  at("jobs").hidden = !jobs.length;
  const metric = (group && group.metric) || (jobs.find(job => job.run) || { run: { status: { metric: "loss" } } }).run.status.metric;
  at("jobs-metric").textContent = titleOf(metric);
  const rows = jobs.map(({ name, state, run, cpu, problem }) => {
    const scored = run ? run.evals.filter(row => present(row[metric])).pop() : null, status = run ? run.status : {};
    const spent = present(cpu) && cpu ? cpu : run && run.summary && run.summary.cpu_seconds;
    return [name, state, status.max_steps ? `${status.step} / ${status.max_steps}` : status.step || "", scored ? number(scored[metric], kindOf(metric)) : "–", present(spent) && spent ? duration(spent) : "–", run ? run.number : "", problem || ""];
  });
  const colours = new Map(withCurves().map((run, place) => [run.number, run.colour ?? place]));
  const shown = JSON.stringify([rows, [...colours]]);
  if (shown === drawn.jobs) return;
  drawn.jobs = shown;
  const order = { preparing: 0, training: 0, running: 0, failed: 1, diverged: 1, interrupted: 1, stopped: 2 };
  const sorted = rows.map((row, place) => ({ row, place })).sort((a, b) => (order[a.row[1]] ?? 3) - (order[b.row[1]] ?? 3) || a.place - b.place);
  at("job-rows").replaceChildren(...sorted.map(({ row }) => {
    const line = node("tr"), name = node("th"), state = node("td");
    name.scope = "row";
    const run = live.runs.get(row[5]);
    name.append(run && (run.steps.length || run.evals.length) ? key(run, row[0], colours.get(row[5])) : row[0]);
    state.append(badge(row[1]));
    if (row[6]) state.append(node("div", "spread bad", row[6]));
    line.append(name, state, ...row.slice(2, 5).map(text => node("td", "n", String(text))));
    return line;
  }));
}

// A run's name as the key to its curves; a click takes them off the charts or puts them there.
function key(run, name, colour) {
  const made = node("button", "key", name), shown = colour !== undefined && !view.hidden.has(run.label);
  made.type = "button";
  made.style.setProperty("--key", colour === undefined ? "var(--line)" : `var(--c${colour % COLOURS})`);
  if (colour >= COLOURS) made.classList.add("dashed");
  made.setAttribute("aria-pressed", String(shown));
  made.addEventListener("click", () => {
    if (side.has(run.number)) side.set(run.number, !shown);
    else if (!view.hidden.delete(run.label)) view.hidden.add(run.label);
    drawn.shape = drawn.jobs = "";
    draw();
  });
  return made;
}

// Runs that are drawn, in the order of their colours; those that a suite makes on its way (search, probes) last, and only when asked
// for or where there is nothing else yet.
function withCurves() {
  const some = runs().filter(run => run.steps.length || run.evals.length);
  const own = some.filter(run => !side.has(run.number));
  return [...own, ...some.filter(run => side.has(run.number) && (side.get(run.number) ?? !own.length))];
}

function drawCharts() {
  const list = withCurves();
  at("bar").hidden = !list.length;
  if (!list.length) return;
  const axes = axesOf(list).join();
  if (axes !== drawn.axes) {
    drawn.axes = axes;
    if (!axes.split(",").includes(view.axis)) view.axis = "step";
    at("switches").replaceChildren();
    viewSwitches(at("switches"), list, view, () => redraw(withCurves()));
  }
  const shape = list.map(run => `${run.number}:${run.steps.length}:${run.steps[run.steps.length - 1]}:${run.evals.length}:${run.events.length}`).join();
  if (shape === drawn.shape) return;
  drawn.shape = shape;
  redraw(list);
}

function redraw(list) {
  for (const group of several() ? ["quality", "training"] : ["quality", "training", "model"]) {
    if (drawn[group]) drawn[group](list, view);
    else drawn[group] = curves(at(group), group, list, view);
  }
  at("model").hidden ||= several();
}

// ---- what is said to the training ----

function drawSteering() {
  const active = runs().filter(run => ACTIVE.has(run.status.state));
  at("steering").hidden = live.readOnly || !(active.length || at("answers").childElementCount);
  at("whom").hidden = !several();
  const numbers = active.map(run => run.number).join();
  if (at("which").dataset.numbers !== numbers) {
    const before = at("which").value;
    at("which").dataset.numbers = numbers;
    at("which").replaceChildren(...active.map(run => { const one = node("option", "", run.label); one.value = run.number; return one; }));
    if (active.some(run => String(run.number) === before)) at("which").value = before;
  }
  for (const control of at("steering").querySelectorAll("button, select, input")) control.disabled = !active.length;
  if (document.activeElement !== at("value")) suggest();
}

const target = () => live.runs.get(several() ? Number(at("which").value) : 0);

function suggest() {
  const run = target(), key = at("key").value, current = run && run.config[key];
  at("value").placeholder = key === "optim.learning_rate" ? "1e-4" : current === undefined ? "value" : String(current);
}

async function say(line, run) {
  const row = node("p"), text = node("span", "soft", "waits for the end of the step …");
  row.append(node("b", "", several() ? `${run.label}: ${line}` : line), text);
  at("answers").prepend(row);
  while (at("answers").childElementCount > MOST_ANSWERS) at("answers").lastElementChild.remove();
  try {
    const answer = await fetch("run/say", { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ run: run.number, line }) });
    const said = await answer.json();
    text.textContent = answer.ok ? said.answer : said.error.message;
    text.className = answer.ok ? "" : "bad";
  } catch (problem) {
    text.textContent = "the page's server does not answer";
    text.className = "bad";
  }
  round();
}

for (const key of SETTABLE) { const option = node("option", "", key); option.value = key; at("key").append(option); }
at("key").addEventListener("change", suggest);
for (const button of document.querySelectorAll("[data-line]")) button.addEventListener("click", () => { const run = target(); if (run) say(button.dataset.line, run); });
at("set").addEventListener("submit", event => {
  event.preventDefault();
  const value = at("value").value.trim(), run = target();
  if (!value || !run) { at("value").focus(); return; }
  say(`set ${at("key").value}=${value}`, run);
  at("value").value = "";
});
at("stop").addEventListener("click", () => {
  const run = target();
  if (!run) return;
  at("sure-text").textContent = `${run.label} finishes its step, saves and exits.` + (several() ? " The sweep or suite counts this run as not finished; the same command takes it up again." : " The same command continues it later.");
  at("sure").returnValue = "";
  at("sure").onclose = () => { if (at("sure").returnValue === "yes") say("stop", run); };
  at("sure").showModal();
});

themeSwitch(at("tools"));
at("foot").textContent = "This page asks the server on your machine once a second, and nobody else. Closing it changes nothing about the training.";
round();
