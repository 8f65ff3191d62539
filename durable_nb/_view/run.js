/* The live view of one run. What the kernel sends, always a whole state in the trait `state`, is told in state.py; it holds
   the rows that somebody looks at, and others are asked for. All time runs here, from the kernel's own clock. */

const SILENCE_S = 25; // the kernel speaks every ten seconds, unless it is blocked or gone
const ROW = 26; // pixels; run.css has it too
const SPARE = 8; // rows drawn beyond both edges
const STATES = {
  R: "restored", c: "completed", r: "running", s: "sleeping", w: "waiting", y: "retrying",
  p: "pending", f: "failed", i: "interrupted", x: "cancelled",
};

/* A model without a view: its place is the html that the kernel displayed, wherever that is in the page, now or later. What is
   saved is html therefore, and never says 'model not found'. */
function initialize({ model }) {
  const places = document.getElementsByClassName(model.get("anchor"));
  const mounted = new Map(); // place -> what was put there
  let frame;
  const find = () => {
    frame = undefined;
    const state = model.get("state");
    if (state?.rows && state.heard === undefined) {
      // each state bears the time it came, so that a place that is found later shows the present
      model.set("state", { ...state, heard: Date.now() / 1000 });
    }
    const what = state?.rows ? live : state?.ended ? offer : undefined;
    for (const [place, found] of mounted) if (!place.isConnected || found.what !== what) leave(place);
    for (const place of what ? places : []) {
      if (!mounted.has(place)) mounted.set(place, { what, unmount: what(model, place) });
    }
  };
  const leave = (place) => {
    mounted.get(place).unmount();
    mounted.delete(place);
  };
  const later = () => {
    frame ??= requestAnimationFrame(find);
  };
  const watch = new MutationObserver(later);
  const stop = () => {
    watch.disconnect();
    cancelAnimationFrame(frame);
    model.off("change:state", later);
    model.off("comm_live_update", lost);
    for (const place of [...mounted.keys()]) leave(place);
  };
  model.on("change:state", later);
  const lost = () => {
    // the kernel that knew of it was restarted; should it be heard again, its next state says so
    const state = model.get("state");
    if (state?.rows) model.set("state", { ...state, gone: true });
    else stop();
  };
  model.on("comm_live_update", lost);
  watch.observe(document.body, { childList: true, subtree: true });
  find();
  return stop;
}

/* Put the live form where the static one is; what is returned puts that back. */
function live(model, place) {
  const still = [...place.children];
  for (const node of still) node.hidden = true;
  const el = make("div");
  place.append(el);
  const unmount = mount(model, el);
  return () => {
    unmount();
    el.remove();
    for (const node of still) node.hidden = false;
  };
}

/* A run that has failed, or that nobody executes, is html that stays; as long as its kernel lives, the page has these buttons
   beside it. */
function offer(model, place) {
  const { ended, again, offered } = model.get("state");
  const side = make("div", "durable-nb dnb-again");
  const made = {};
  const press = (action, words) => () => {
    for (const name of offered) made[name].set("asked for", name === action ? words : undefined);
    if (action !== "retry" || again === "run") model.send({ ask: action, run: ended });
    else if (!runCell(place)) made.retry.set("run the cell again to resume it");
  };
  made.retry = button("Retry", press("retry", "Retrying…"));
  made.restart = button("Restart", press("restart", "Restarting…"), "", RESTART);
  made.cancel = button("Cancel", press("cancel", "Cancelling…"));
  side.append(...offered.map((name) => made[name].node));
  place.prepend(side);
  return () => side.remove();
}

/* Run the cell that shows `node` as its reader would, where the page is JupyterLab or Notebook; else false. */
function runCell(node) {
  const cell = node.closest(".jp-Cell");
  const run = cell?.closest(".jp-NotebookPanel")?.querySelector('[data-command^="notebook:run-cell"]');
  if (!run) return false;
  const mouse = (node, type) => node.dispatchEvent(new MouseEvent(type, { bubbles: true, cancelable: true, button: 0 }));
  mouse(cell, "mousedown"); // it becomes the active cell
  mouse(cell, "mouseup");
  mouse(run, "mousedown"); // tool bars act on one of the two, never on both
  mouse(run, "click");
  return true;
}

function mount(model, el) {
  const root = make("section", "durable-nb dnb-run");
  const head = header((action) => model.send({ ask: action, run: state.run.id }));
  const asks = questions((action, step, comment) => model.send({ ask: action, run: state.run.id, step, comment }));
  const list = rowList({
    look: (from, to) => model.send({ ask: "rows", from, to }),
    unfold: (row, open) => model.send({ ask: "unfold", row, open }),
  });
  const footer = make("footer", "dnb-foot dnb-quiet");
  const spoken = make("span", "dnb-spoken");
  spoken.setAttribute("role", "status");
  root.append(head.node, asks.node, list.node, footer, spoken);
  el.append(root);

  let state;
  let timer;
  let frame;

  const draw = () => {
    frame = undefined;
    const next = model.get("state");
    if (!next?.rows) return; // nothing yet, or no more
    state = next;
    root.dataset.status = state.run.status;
    root.setAttribute("aria-label", `Run of ${state.run.name}`);
    head.show(state);
    asks.show(state);
    list.show(state);
    put(footer, state.saved);
    footer.hidden = !state.saved;
    tick();
    const active = state.run.ended === undefined;
    if (active && timer === undefined) timer = setInterval(tick, 1000);
    if (!active) stop();
  };

  const tick = () => {
    const here = Date.now() / 1000;
    const heard = state.heard ?? here;
    const silent = state.run.ended === undefined && (state.gone || here - heard > SILENCE_S);
    const silence = silent ? Math.max(here - heard, 1) : 0;
    root.classList.toggle("dnb-silent", silence > 0);
    const now = silence ? state.now : here - heard + state.now; // times that went on would claim that the work does
    head.tick(now, silence);
    asks.tick(now);
    list.tick(now);
    put(spoken, silence ? `${state.run.name}: no word from the kernel` : spokenOf(state));
  };

  const stop = () => {
    clearInterval(timer);
    timer = undefined;
  };
  const later = () => {
    frame ??= requestAnimationFrame(draw);
  };
  model.on("change:state", later);
  draw();
  return () => {
    stop();
    cancelAnimationFrame(frame);
    list.forget();
    model.off("change:state", later);
    root.remove();
  };
}

/* What a screen reader says aloud: only what matters, not each step. */
function spokenOf(state) {
  const broken = ["failed", "interrupted"].filter((word) => state.counts[word]).map((word) => `${state.counts[word]} ${word}`);
  const waits = state.approvals.length ? ["waits for a decision"] : [];
  return [`${state.run.name} ${state.run.status}`, ...broken, ...waits].join(", ");
}

/* Name, status, how long, how far; Cancel and Retry. */
function header(send) {
  const node = make("header", "dnb-head");
  const status = make("span", "dnb-badge");
  const name = make("strong", "dnb-name");
  const why = make("span", "dnb-why dnb-quiet dnb-cut");
  const elapsed = make("span", "dnb-elapsed");
  const far = make("span", "dnb-far dnb-quiet");
  const track = make("div", "dnb-track dnb-whole");
  const bar = make("div", "dnb-bar");
  bar.dataset.status = "running";
  const lost = make("div", "dnb-bar");
  lost.dataset.status = "failed";
  track.append(bar, lost);
  track.setAttribute("role", "progressbar");
  track.setAttribute("aria-label", "Steps done");
  track.setAttribute("aria-valuemin", "0");
  const buttons = make("span", "dnb-buttons");
  const pressed = {};
  const press = (action, words) => () => {
    pressed[action] = Date.now();
    act[action].set("asked for", words);
    if (!state.gone) send(action);
    else if (!runCell(node)) act[action].set("run the cell again to resume it");
  };
  const act = {
    cancel: button("Cancel", () => press("cancel", "Cancelling…")()),
    retry: button("Retry", () => press("retry", "Retrying…")()),
  };
  buttons.append(act.cancel.node, act.retry.node);
  const line = make("div", "dnb-line");
  line.append(status, name, why, elapsed, far, buttons);
  node.append(line, track);
  let state;
  return {
    node,
    show(next) {
      state = next;
      put(name, state.run.name);
      name.title = state.run.name;
      put(why, state.run.why ?? "");
      why.title = state.run.why ?? "";
      const { done, total, counts } = state;
      track.setAttribute("aria-valuemax", String(total));
      track.setAttribute("aria-valuenow", String(done));
      track.classList.toggle("dnb-unknown", Boolean(state.open) || total === 0);
      const broken = counts.failed ?? 0;
      bar.style.width = `${total ? (100 * done) / total : 0}%`;
      lost.hidden = !broken;
      lost.style.left = bar.style.width;
      lost.style.width = `${total ? (100 * broken) / total : 0}%`;
      for (const action of ["cancel", "retry"]) {
        if (state.gone) {
          const may = action === "retry" && state.again === "cell" && !pressed.retry;
          act[action].set(may ? "" : "the kernel was restarted");
          continue;
        }
        if (!pressed[action] || state.actions[action]) act[action].set(state.actions[action]);
        if (state.actions[action]) pressed[action] = 0;
      }
    },
    tick(now, silence) {
      const { run, done, total, rate, left } = state;
      if (state.gone) sign(status, "interrupted", "the kernel was restarted: run the cell again");
      else if (silence) sign(status, "interrupted", `no word from the kernel for ${clock(silence)}`);
      else sign(status, run.status);
      put(elapsed, length((run.ended ?? now) - run.started, run.ended === undefined));
      const parts = [state.open ? `${count(done)} done` : `${count(done)} of ${count(total)}`];
      const word = (status) => (state.counts[status] ? parts.push(`${count(state.counts[status])} ${status}`) : 0);
      word("restored");
      word("failed");
      if (rate && !silence) {
        parts.push(rate >= 1 ? `${rate.toFixed(1)}/s` : `${(rate * 60).toFixed(1)}/min`);
        parts.push(`${clock(Math.max(left - (now - state.now), 0))} left`);
      }
      put(far, parts.join(" · "));
    },
  };
}

/* The steps: as many as there are, but only those in sight are drawn. A tree grid, moved in with the arrow keys. */
function rowList({ look, unfold }) {
  const node = make("div", "dnb-list");
  node.tabIndex = 0;
  node.setAttribute("role", "treegrid");
  node.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's arrow keys move between cells
  const space = make("div", "dnb-space");
  space.setAttribute("role", "presentation");
  node.append(space);

  const shown = new Map(); // id or place -> row drawn
  const spare = []; // rows that went out of sight: their elements are used again
  const known = new Map(); // place -> what was told of it last
  const heights = new Map(); // id -> height of its panel
  const own = `dnb-${Math.random().toString(36).slice(2)}`;
  let state;
  let panels = [];
  let layout = "";
  let now = 0;
  let current = -1; // the place of the row that the keys act on
  let following = true; // stay at the newest step until the reader scrolls away from it
  let asked = "";
  let drawnAt = 0;
  let frame;

  const offset = (at) => at * ROW + panels.reduce((sum, p) => sum + (p.at < at ? heights.get(p.id) ?? 0 : 0), 0);
  const total = () => offset(state.length);
  const placeAt = (y) => {
    let at = Math.floor(y / ROW);
    while (at > 0 && offset(at) > y) at -= 1;
    return at;
  };

  const draw = () => {
    frame = undefined;
    if (!state || !node.clientWidth) return; // the page is hidden, and would forget where it was
    space.style.height = `${total()}px`;
    if (following) node.scrollTop = node.scrollHeight;
    drawnAt = node.scrollTop;
    const first = Math.max(placeAt(node.scrollTop) - SPARE, 0);
    const last = Math.min(placeAt(node.scrollTop + node.clientHeight) + SPARE, state.length - 1);
    const kept = new Set();
    for (let at = first; at <= last; at += 1) kept.add(known.get(at)?.id ?? `at ${at}`);
    for (const [key, line] of shown) {
      if (kept.has(key)) continue;
      spare.push(line);
      shown.delete(key);
    }
    let lacking = false;
    for (let at = first; at <= last; at += 1) {
      const row = known.get(at);
      const key = row?.id ?? `at ${at}`;
      lacking ||= row === undefined;
      if (!shown.has(key)) {
        const line = spare.pop() ?? rowLine(own, toggle);
        shown.set(key, line);
      }
      const line = shown.get(key);
      const place = space.children[at - first]; // who listens reads in this order
      if (place !== line.node) space.insertBefore(line.node, place ?? null);
      line.show(row, at, panels.find((panel) => panel.id === row?.id));
      line.node.classList.toggle("dnb-current", at === current);
      line.tick(now, state);
      line.node.style.transform = `translateY(${offset(at)}px)`;
    }
    while (spare.length) spare.pop().node.remove();
    measure();
    if (last < first) return;
    const want = `${first} ${last} ${state.length}`;
    const told = state.rows.length === state.length;
    if (!told && want !== asked) {
      // what is in sight is told from now on; what is not known yet is waited for
      asked = want;
      look(first, last);
    }
    node.classList.toggle("dnb-lacking", lacking);
  };

  /* Panels are as high as their text: the rows below move. */
  const measure = () => {
    let moved = false;
    for (const panel of panels) {
      const height = shown.get(panel.id)?.panelHeight();
      if (height && heights.get(panel.id) !== height) {
        heights.set(panel.id, height);
        moved = true;
      }
    }
    if (moved) later();
  };

  const later = () => {
    frame ??= requestAnimationFrame(draw);
  };

  const toggle = (row, open = !row.open) => {
    following = false;
    unfold(row.id, open);
  };

  const move = (to) => {
    current = Math.min(Math.max(to, 0), state.length - 1);
    const top = offset(current);
    if (top < node.scrollTop) node.scrollTop = top;
    if (top + ROW > node.scrollTop + node.clientHeight) node.scrollTop = top + ROW - node.clientHeight;
    node.setAttribute("aria-activedescendant", `${own}-${current}`);
    following = false;
    later();
  };

  node.addEventListener("scroll", () => {
    following = node.scrollTop + node.clientHeight >= node.scrollHeight - 4 && node.scrollHeight > node.clientHeight;
    later();
  });
  node.addEventListener("click", (event) => {
    const at = Number(event.target.closest(".dnb-row")?.dataset.at ?? -1);
    if (at >= 0) move(at);
  });
  node.addEventListener("keydown", (event) => {
    if (!state?.length || event.target !== node || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(Math.floor(node.clientHeight / ROW) - 1, 1);
    const row = known.get(current);
    const acts = {
      ArrowDown: () => move(current + 1),
      ArrowUp: () => move(current - 1),
      PageDown: () => move(current + page),
      PageUp: () => move(current - page),
      Home: () => move(0),
      End: () => move(state.length - 1),
      ArrowRight: () => row && !row.open && toggle(row, true),
      ArrowLeft: () => row && row.open && toggle(row, false),
      Enter: () => row && toggle(row),
      " ": () => row && toggle(row),
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    acts[event.key]();
  });
  const sized = new ResizeObserver(later);
  sized.observe(node);

  return {
    node,
    show(next) {
      state = next;
      panels = state.panels;
      node.hidden = state.length === 0;
      node.setAttribute("aria-label", `Steps of ${state.run.name}`);
      node.setAttribute("aria-rowcount", String(state.length));
      // where rows were unfolded or folded, what was known of a place is another row's
      const open = state.rows.filter((row) => row.open).map((row) => row.id).join();
      if (open !== layout) known.clear();
      layout = open;
      for (const row of state.rows) known.set(row.at, row);
      later();
    },
    tick(time) {
      now = time;
      if (node.scrollTop !== drawnAt) later(); // a page that was hidden comes back without a word
      shown.forEach((line) => line.tick(now, state));
    },
    forget: () => {
      sized.disconnect();
      cancelAnimationFrame(frame);
    },
  };
}

/* One row of the list and, where it is unfolded, the panel below it. */
function rowLine(own, toggle) {
  const node = make("div", "dnb-row");
  node.setAttribute("role", "row");
  const line = make("div", "dnb-cells");
  const cell = (className) => {
    const made = make("span", className);
    made.setAttribute("role", "gridcell");
    line.append(made);
    return made;
  };
  const step = cell("dnb-step");
  const status = cell("dnb-status");
  const time = cell("dnb-time");
  const verb = make("span", "dnb-verb");
  const value = make("span");
  time.append(verb, value);
  const when = cell("dnb-when");
  const twist = make("span", "dnb-twist");
  twist.setAttribute("aria-hidden", "true");
  // one piece of text, as it is read aloud and copied: fold × 20 · median 1.5 s
  const label = make("span", "dnb-cut dnb-said");
  const name = make("span", "dnb-title");
  const times = make("span");
  const more = make("span", "dnb-quiet dnb-more");
  label.append(name, times, more);
  const error = make("span", "dnb-error dnb-cut");
  step.append(twist, label, error);
  const badge = make("span", "dnb-badge");
  status.append(badge);
  const track = make("div", "dnb-track");
  const bar = make("div", "dnb-bar");
  track.append(bar);
  when.append(track);
  when.setAttribute("aria-hidden", "true");
  node.append(line);
  let row;
  let panel;
  line.addEventListener("click", () => row && toggle(row));

  return {
    node,
    panelHeight: () => panel?.node.offsetHeight ?? 0,
    show(next, at, detail) {
      node.id = `${own}-${at}`;
      node.dataset.at = at;
      node.setAttribute("aria-rowindex", String(at + 1));
      if (detail && !panel) {
        panel = panelOf();
        node.append(panel.node);
      }
      if (!detail && panel) {
        panel.node.remove();
        panel = undefined;
      }
      panel?.show(detail);
      if (next === row) return;
      row = next;
      if (!row) {
        // it scrolls by before the kernel has told of it
        put(name, "…");
        for (const part of [times, more, error, verb, value]) put(part, "");
        sign(badge, "pending", "");
        node.removeAttribute("aria-expanded");
        track.hidden = true;
        return;
      }
      node.dataset.status = row.status;
      node.setAttribute("aria-level", String((row.depth ?? 0) + 1));
      node.setAttribute("aria-expanded", String(Boolean(row.open)));
      step.style.paddingLeft = `${8 + 16 * (row.depth ?? 0)}px`;
      put(name, row.n && row.name.length > 40 ? `${row.name.slice(0, 39)}…` : row.name);
      put(times, row.n ? ` × ${count(row.n)}` : "");
      label.title = row.path ?? row.name;
      const notes = row.for ? [`waits for ${row.for}`] : [];
      if (row.median !== undefined) notes.push(`median ${length(row.median)}`);
      if (row.note) notes.push(row.note);
      if (row.tokens !== undefined) notes.push(`${count(row.tokens)} tokens`);
      if (row.cost) notes.push(row.cost);
      if (!notes.length && row.given && !row.error) notes.push(row.given);
      put(more, notes.length ? ` · ${notes.join(" · ")}` : "");
      put(error, row.error ? firstLine(row.error) : "");
      error.title = row.error ?? "";
      sign(badge, row.status, wordsOf(row));
      badge.title = row.status === "restored" ? "from the journal: no code ran" : "";
      track.classList.toggle("dnb-strip", row.strip !== undefined);
      if (row.strip !== undefined) track.style.background = gradient(row.strip);
      else track.style.background = "";
    },
    tick(now, state) {
      if (!row) return;
      const [before, words] = timeOf(row, now);
      put(verb, before);
      put(value, words);
      const started = row.started !== undefined && row.status !== "restored";
      track.hidden = row.strip === undefined && !started;
      bar.hidden = row.strip !== undefined;
      if (track.hidden || bar.hidden) return;
      const end = Math.max(state.run.ended ?? now, state.since + 1);
      const percent = (at) => Math.min(Math.max(((at - state.since) / (end - state.since)) * 100, 0), 100);
      const [from, to] = row.progress?.[1]
        ? [0, Math.min((100 * row.progress[0]) / row.progress[1], 100)]
        : [percent(row.started), percent(ACTIVE.has(row.status) ? now : row.ended ?? now)];
      bar.style.left = `${Math.min(from, 99)}%`;
      bar.style.width = `${Math.max(to - from, 0)}%`;
    },
  };
}

/* What a step was given, what it gave, what it says and how it failed. */
function panelOf() {
  const node = make("div", "dnb-panel");
  const parts = {};
  for (const [key, label] of [["arguments", "Arguments"], ["log", "Log"], ["result", "Result"], ["traceback", "Error"]]) {
    const part = make("div", "dnb-part");
    const text = make("pre", "dnb-code");
    text.tabIndex = 0;
    text.setAttribute("aria-label", label);
    part.append(make("div", "dnb-label dnb-quiet", label), text);
    parts[key] = { part, text };
    node.append(part);
  }
  const none = make("div", "dnb-quiet dnb-none");
  node.append(none);
  return {
    node,
    show(detail) {
      let any = false;
      for (const [key, { part, text }] of Object.entries(parts)) {
        const words = key === "log" ? (detail.log ?? []).join("\n") : detail[key] ?? "";
        const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
        const changed = text.textContent !== words;
        put(text, words);
        part.hidden = !words;
        any ||= Boolean(words);
        if (key === "log" && changed && atEnd) text.scrollTop = text.scrollHeight;
      }
      put(none, any ? "" : detail.cut ? "too much is unfolded: fold another row" : "nothing was recorded of its arguments and result");
      none.hidden = any;
    },
  };
}

function wordsOf(row) {
  if (row.n) {
    const done = row.done === row.n ? row.status : `${count(row.done)} of ${count(row.n)}`;
    return row.broken ? `${done} · ${count(row.broken)} failed` : done;
  }
  if (row.progress) {
    const [done, total] = row.progress;
    return total ? `${count(done)} of ${count(total)}` : `${count(done)} done`;
  }
  return row.attempts === undefined ? row.status : `${row.status} · ${row.attempts} attempts`;
}

/* A verb, for which a narrow page has no room, and how long. */
function timeOf(row, now) {
  if (row.wake !== undefined && ["sleeping", "retrying", "waiting"].includes(row.status)) {
    const verb = { sleeping: "wakes ", retrying: "retries ", waiting: "times out " }[row.status];
    return [verb, row.wake > now ? `in ${clock(row.wake - now)}` : "now"];
  }
  if (row.started === undefined || row.status === "restored") return ["", ""];
  if (ACTIVE.has(row.status)) return ["", length(now - row.started, true)];
  return ["", row.ended === undefined ? "" : length(row.ended - row.started)];
}

/* The states of many steps as one background: however many there are, one element. */
function gradient(strip) {
  const stops = [];
  let start = 0;
  for (let i = 0; i < strip.length; i += 1) {
    if (strip[i + 1] === strip[i]) continue;
    const colour = { c: "completed", R: "restored", r: "running", f: "failed" }[strip[i]];
    const name = colour ?? ("swyi".includes(strip[i]) ? "waiting" : STATES[strip[i]] === "cancelled" ? "idle" : "track");
    stops.push(`var(--dnb-${name}) ${((100 * start) / strip.length).toFixed(2)}% ${((100 * (i + 1)) / strip.length).toFixed(2)}%`);
    start = i + 1;
  }
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

function firstLine(text) {
  return text.split("\n", 1)[0];
}

export { mount };
export default { initialize };
