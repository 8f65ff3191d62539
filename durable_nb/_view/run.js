/* The live view of one run. What the kernel sends is told in state.py: whole states in the trait `state`, differences as
   messages. All time runs here, from the kernel's own clock. Text of the user's only ever becomes textContent. */

const BROKEN = new Set(["failed", "interrupted"]);
const SILENCE_S = 25; // the kernel speaks every ten seconds, unless it is blocked or gone

/* One per model: keeps `state` whole, so that every view of it, also one that is made later, draws the present. */
function initialize({ model }) {
  const stamp = () => {
    const state = model.get("state");
    if (state?.rows && state.heard === undefined) model.set("state", { ...state, heard: Date.now() / 1000 });
  };
  const learn = (message) => {
    const state = model.get("state");
    if (message.base !== state.version) return; // one was missed: a whole state follows within seconds
    const rows = new Map(state.rows.map((row) => [row.i, row]));
    for (const row of message.rows) rows.set(row.i, row);
    for (const gap of message.gaps) {
      for (const i of rows.keys()) if (gap.from <= i && i < gap.to) rows.delete(i);
    }
    const ordered = [...rows.values()].sort((a, b) => a.i - b.i);
    model.set("state", { ...message, rows: ordered, heard: Date.now() / 1000 });
  };
  model.on("change:state", stamp);
  model.on("msg:custom", learn);
  stamp();
  return () => {
    model.off("change:state", stamp);
    model.off("msg:custom", learn);
  };
}

function render({ model, el }) {
  const root = make("section", "durable-nb");
  const head = make("header", "dnb-head");
  const name = make("strong", "dnb-name");
  const status = make("span", "dnb-status");
  const elapsed = make("span", "dnb-elapsed");
  const counts = make("span", "dnb-counts");
  head.append(name, status, elapsed, counts);
  const spoken = make("span", "dnb-spoken");
  spoken.setAttribute("role", "status");
  spoken.setAttribute("aria-live", "polite");

  const steps = make("div", "dnb-steps");
  steps.tabIndex = 0;
  steps.setAttribute("role", "region");
  const table = make("table");
  const columns = ["Step", "Status", "Time", "Attempts", "Timeline"];
  const titles = make("tr");
  for (const column of columns) {
    const title = make("th", `dnb-${column.toLowerCase()}`, column);
    title.scope = "col";
    titles.append(title);
  }
  const thead = make("thead");
  thead.append(titles);
  const body = make("tbody");
  table.append(thead, body);
  steps.append(table);
  root.append(head, spoken, steps);
  el.append(root);

  const lines = new Map();
  let state;
  let timer;
  let frame;
  let following = true; // stay at the newest step until the reader scrolls away from it

  steps.addEventListener("scroll", () => {
    following = steps.scrollTop + steps.clientHeight >= steps.scrollHeight - 8;
  });

  const line = (key, build) => {
    if (!lines.has(key)) lines.set(key, build());
    return lines.get(key);
  };

  const draw = () => {
    frame = undefined;
    state = model.get("state");
    if (!state?.rows) return;
    put(name, state.run.name);
    steps.setAttribute("aria-label", `Steps of ${state.run.name}`);
    put(counts, summary(state));
    table.hidden = state.total === 0;

    const parts = [...state.rows, ...state.gaps].sort((a, b) => (a.i ?? a.from) - (b.i ?? b.from));
    const wanted = [];
    let gaps = 0;
    for (const part of parts) {
      // a gap keeps its button while its borders move: it may have the focus, or the mouse's button down on it
      const key = part.i === undefined ? `gap ${gaps++}` : part.i;
      const shown = line(key, part.i === undefined ? () => gapLine(model) : stepLine);
      shown.show(part);
      wanted.push([key, shown]);
    }
    const kept = new Set(wanted.map(([key]) => key));
    for (const [key, shown] of lines) {
      if (!kept.has(key)) {
        shown.remove();
        lines.delete(key);
      }
    }
    let place = body.firstChild;
    for (const [, shown] of wanted) {
      for (const tr of shown.rows()) {
        if (tr === place) place = place.nextSibling;
        else body.insertBefore(tr, place);
      }
    }
    tick();
    if (following) steps.scrollTop = steps.scrollHeight;
    const active = state.run.ended === undefined && (ACTIVE.has(state.run.status) || state.rows.some(isActive));
    if (active && timer === undefined) timer = setInterval(tick, 1000);
    if (!active) stop();
  };

  const stop = () => {
    clearInterval(timer);
    timer = undefined;
  };

  const tick = () => {
    const run = state.run;
    const here = Date.now() / 1000;
    const heard = state.heard ?? here;
    const silent = run.ended === undefined && here - heard > SILENCE_S;
    root.classList.toggle("dnb-silent", silent);
    sayOfLine(el, run.name, silent);
    if (silent) {
      sign(status, "interrupted", `no word from the kernel for ${clock(Math.floor(here - heard))}`);
      put(spoken, `${run.name}: no word from the kernel`);
      return; // times that went on would claim that the work does
    }
    const now = here - heard + state.now; // by the kernel's clock, whatever the time is here
    sign(status, run.status);
    put(spoken, spokenOf(state));
    put(elapsed, length((run.ended ?? now) - run.started, run.ended === undefined));
    const end = Math.max(run.ended ?? now, state.since + 1);
    for (const shown of lines.values()) shown.tick(now, state.since, end);
  };

  const later = () => {
    frame ??= requestAnimationFrame(draw);
  };
  model.on("change:state", later);
  draw();
  return () => {
    stop();
    cancelAnimationFrame(frame);
    model.off("change:state", later);
  };
}

/* A step: its row and, if it has an error, one more below that unfolds. */
function stepLine() {
  const tr = make("tr", "dnb-row");
  const name = make("th", "dnb-step");
  name.scope = "row";
  const status = make("td", "dnb-status");
  const time = make("td", "dnb-time");
  const attempts = make("td", "dnb-attempts");
  const timeline = make("td", "dnb-timeline");
  const track = make("div", "dnb-track");
  const bar = make("div", "dnb-bar");
  track.setAttribute("aria-hidden", "true");
  track.append(bar);
  timeline.append(track);
  tr.append(name, status, time, attempts, timeline);
  let row;
  let error;

  const unfold = () => {
    if (!row.error) {
      error?.tr.remove();
      error = undefined;
      return;
    }
    error ??= errorLine();
    error.show(row.error);
  };

  return {
    rows: () => (error ? [tr, error.tr] : [tr]),
    show(next) {
      if (next === row) return;
      row = next;
      tr.dataset.status = row.status;
      put(name, row.name);
      name.title = row.path ?? row.name;
      sign(status, row.status);
      status.title = row.status === "restored" ? "from the journal: no code ran" : "";
      put(attempts, row.attempts === undefined ? "" : String(row.attempts));
      unfold();
    },
    tick(now, since, end) {
      put(time, timeOf(row, now));
      const shown = row.started !== undefined && row.status !== "restored";
      track.hidden = !shown;
      if (!shown) return;
      const percent = (at) => Math.min(Math.max(((at - since) / (end - since)) * 100, 0), 100);
      const from = percent(row.started);
      bar.style.left = `${from}%`;
      bar.style.width = `${Math.max(percent(isActive(row) ? now : row.ended ?? now) - from, 0)}%`;
    },
    remove() {
      tr.remove();
      error?.tr.remove();
    },
  };
}

function errorLine() {
  const tr = make("tr", "dnb-error");
  const cell = make("td");
  cell.colSpan = 5;
  const details = make("details");
  const summary = make("summary");
  const full = make("pre");
  details.append(summary, full);
  cell.append(details);
  tr.append(cell);
  return {
    tr,
    show(error) {
      put(summary, error.split("\n", 1)[0]);
      put(full, error);
    },
  };
}

/* Steps out of sight, as a button that brings some of them into it. */
function gapLine(model) {
  const tr = make("tr", "dnb-gap");
  const cell = make("td");
  cell.colSpan = 5;
  const button = make("button");
  button.type = "button";
  cell.append(button);
  tr.append(cell);
  let gap;
  button.addEventListener("click", () => model.send({ ask: "page", from: gap.from }));
  return {
    rows: () => [tr],
    show(next) {
      gap = next;
      const words = Object.entries(gap.counts);
      const total = count(gap.to - gap.from);
      put(button, words.length === 1 ? `… ${total} more ${words[0][0]}` : `… ${total} more: ${told(words).join(", ")}`);
    },
    tick() {},
    remove: () => tr.remove(),
  };
}

/* The line above the output says "running", and a kernel that is gone can't take that back. */
function sayOfLine(el, name, silent) {
  const [running, began] = [`${name} · running: `, `${name} · began: `];
  const [from, to] = silent ? [running, began] : [began, running];
  for (const line of el.closest(".jp-OutputArea")?.querySelectorAll(".jp-RenderedHTMLCommon > div") ?? []) {
    if (line.textContent.startsWith(from)) line.textContent = to + line.textContent.slice(from.length);
  }
}

function isActive(row) {
  return ACTIVE.has(row.status);
}

function summary(state) {
  const words = Object.entries(state.counts).filter(([word]) => word !== "completed");
  return [`${count(state.total)} step${state.total === 1 ? "" : "s"}`, ...told(words)].join(" · ");
}

/* What a screen reader says aloud: only what matters, not each step. */
function spokenOf(state) {
  const broken = Object.entries(state.counts).filter(([word]) => BROKEN.has(word));
  return [`${state.run.name} ${state.run.status}`, ...told(broken)].join(", ");
}

function timeOf(row, now) {
  if (row.wake !== undefined && (row.status === "sleeping" || row.status === "retrying")) {
    const left = Math.ceil(row.wake - now);
    const verb = row.status === "sleeping" ? "wakes" : "retries";
    return left > 0 ? `${verb} in ${clock(left)}` : `${verb} now`;
  }
  if (row.started === undefined || row.status === "restored") return "";
  if (isActive(row)) return length(now - row.started, true);
  return row.ended === undefined ? "" : length(row.ended - row.started, false);
}

function told(words) {
  return words.map(([word, number]) => `${count(number)} ${word}`);
}

export default { initialize, render };
