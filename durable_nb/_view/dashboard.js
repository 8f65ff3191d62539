/* The dashboard: the cells and runs of a store. What it is told is described in dashboard.py. Its `model` may be any object
   with get("state"), on("change:state", f), off and send(message): a widget's, or a page's own. All time runs here. */

const SILENCE_S = 40; // the kernel answers each look, unless it is blocked or gone
const LOOK_EVERY_S = 12;
const GONE_MS = 60_000;
const NOTICE_MS = 15_000;

/* A model without a view: its place is the html that the kernel displayed, wherever that is in the page, now or later. */
function initialize({ model }) {
  const places = document.getElementsByClassName(model.get("anchor"));
  const mounted = new Map();
  const find = () => {
    const now = Date.now();
    for (const place of places) {
      if (!mounted.has(place)) mounted.set(place, { unmount: replace(model, place) });
      mounted.get(place).seen = now;
    }
    for (const [place, { unmount, seen }] of mounted) {
      // a notebook takes cells out of the page while they are scrolled away, and puts them back
      if (place.isConnected || now - seen < GONE_MS) continue;
      unmount();
      mounted.delete(place);
    }
  };
  const timer = setInterval(find, 150);
  find();
  return () => {
    clearInterval(timer);
    for (const { unmount } of mounted.values()) unmount();
  };
}

/* Put the live form where the static one is; what is returned puts that back. */
function replace(model, place) {
  const still = [...place.childNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE);
  for (const node of still) node.hidden = true;
  const el = make("div");
  place.append(el);
  const unmount = mount({ model, el });
  return () => {
    unmount();
    el.remove();
    for (const node of still) node.hidden = false;
  };
}

function mount({ model, el }) {
  const root = make("section", "durable-nb dnb-board");
  root.setAttribute("aria-label", "Durable cells and runs");
  let state;
  let heard = Date.now() / 1000;
  let query = {};
  let asked = 0;
  let gone = false;
  let noted = { n: model.get("state")?.notice?.n, until: 0 }; // what was told to an earlier reader is not news
  const pressed = new Map(); // runs whose buttons were, and the version of the state then

  const look = (change = {}) => {
    query = { ...query, ...change };
    asked = Date.now() / 1000;
    tell({ ask: "look", query });
  };
  const act = (run, action, more) => {
    pressed.set(run, state.version);
    tell({ ask: action, run, ...more });
    draw();
  };
  const tell = (message) => {
    try {
      model.send(message);
      gone = false;
    } catch {
      gone = true; // the kernel was restarted, and knows nothing of this display
    }
  };

  const head = make("header", "dnb-board-head");
  const title = make("strong", "dnb-name", "Durable cells and runs");
  const path = make("code", "dnb-quiet dnb-cut");
  const word = make("span", "dnb-quiet dnb-board-word");
  head.append(title, path, word);

  const trouble = make("p", "dnb-board-trouble");
  trouble.setAttribute("role", "alert");
  const notice = make("p", "dnb-board-notice");
  notice.setAttribute("role", "status");
  const empty = make("p", "dnb-quiet");

  const filters = filterBar(look);
  const cells = list("Cells", CELL_COLUMNS, cellLine, (page) => look({ cells_page: page }));
  const unfold = (run) => look({ open: query.open === run ? "" : run });
  const runs = list("Runs", RUN_COLUMNS, (key) => runLine(key, act, unfold, pressed), (page) => look({ page }));
  root.append(head, trouble, notice, empty, filters.node, cells.node, runs.node);
  el.append(root);

  const draw = () => {
    const next = model.get("state");
    if (!next?.runs) return;
    if (next !== state) heard = Date.now() / 1000;
    state = next;
    if (Date.now() / 1000 - asked > 2) query = state.query; // else what was asked for is still on its way
    for (const [run, version] of pressed) if (state.version > version + 1) pressed.delete(run);
    put(path, state.store);
    const nothing = !state.cells.total && !state.runs.total;
    show(trouble, state.trouble);
    if (state.notice?.n !== noted.n) noted = { ...state.notice, until: Date.now() + NOTICE_MS };
    notice.dataset.status = noted.bad ? "failed" : "completed";
    show(empty, state.trouble || !nothing ? "" : "Nothing yet: put %%durable NAME above a cell.");
    filters.node.hidden = !state.runs.total;
    cells.node.hidden = !state.cells.total;
    runs.node.hidden = !state.runs.total;
    filters.draw(state, query);
    cells.draw(state.cells, query.cells_page, "");
    const unread = state.unread ? `${count(state.unread)} that can't be read: see “durable-nb doctor”` : "";
    runs.draw(state.runs, query.page, unread, state.steps);
    if (nothing && unread) show(empty, unread);
    tick();
  };
  const tick = () => {
    if (!state) return;
    const here = Date.now() / 1000;
    const silent = gone || here - heard > SILENCE_S;
    root.classList.toggle("dnb-silent", silent);
    const since = gone ? "the kernel was restarted: run the cell again" : `no word from the kernel for ${clock(Math.floor(here - heard))}`;
    put(word, silent ? since : "");
    show(notice, Date.now() < noted.until ? noted.text : "");
    const now = state.now + (here - heard); // by the kernel's clock, whatever the time is here
    cells.tick(now, silent);
    runs.tick(now, silent);
    if (document.visibilityState === "visible" && root.isConnected && here - asked > LOOK_EVERY_S) look();
  };

  model.on("change:state", draw);
  const timer = setInterval(tick, 1000);
  query = model.get("state")?.query ?? {};
  look();
  draw();
  return () => {
    clearInterval(timer);
    model.off("change:state", draw);
    root.remove();
  };
}

/* -- filters */

function filterBar(look) {
  const node = make("div", "dnb-filters");
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", "Which runs");
  const chips = make("div", "dnb-chips");
  const named = choice("Workflow or cell", (value) => {
    const [kind, workflow] = value ? JSON.parse(value) : ["", ""];
    look({ kind, workflow, page: 0, cells_page: 0 });
  });
  const label = choice("Label", (value) => look({ label: value, page: 0, cells_page: 0 }));
  node.append(chips, named.node, label.node);
  const buttons = new Map();
  return {
    node,
    draw(state, query) {
      const all = Object.values(state.counts).reduce((sum, n) => sum + n, 0);
      const wanted = [["", all], ...Object.entries(state.counts)];
      if (query.status && !(query.status in state.counts)) wanted.push([query.status, 0]);
      for (const [status, n] of wanted) {
        if (!buttons.has(status)) {
          const chip = make("button", "dnb-chip");
          chip.type = "button";
          const badge = make("span", "dnb-badge");
          const number = make("span", "dnb-quiet");
          chip.append(badge, number);
          chip.addEventListener("click", () => look({ status, page: 0, cells_page: 0 }));
          buttons.set(status, { chip, badge, number });
        }
        const { chip, badge, number } = buttons.get(status);
        if (status) sign(badge, status);
        else put(badge, "all");
        put(number, count(n));
        chip.setAttribute("aria-pressed", String(query.status === status));
      }
      arrange(
        chips,
        [...new Set(wanted.map(([status]) => status))].map((status) => buttons.get(status).chip),
      );
      const value = query.kind || query.workflow ? JSON.stringify([query.kind, query.workflow]) : "";
      const kinds = [["workflow", "any workflow"], ["cell", "any cell"]];
      const known = state.names.map(([kind, name, n]) => [kind, name, `${kind === "cell" ? "cell " : ""}${name} (${count(n)})`]);
      const options = [["", "all"]];
      for (const [kind, any] of kinds) {
        if (known.some(([of]) => of === kind)) options.push([JSON.stringify([kind, ""]), any]);
      }
      for (const [kind, name, text] of known) options.push([JSON.stringify([kind, name]), text]);
      named.draw(options, value);
      label.draw([["", "all"], ...state.labels.map(([text, n]) => [text, `${text} (${count(n)})`])], query.label);
      label.node.hidden = !state.labels.length && !query.label;
    },
  };
}

function choice(name, choose) {
  const node = make("label", "dnb-choice");
  const select = make("select", "dnb-input");
  select.setAttribute("aria-label", name); // the text around it holds the choices too
  node.append(make("span", "dnb-quiet", name), select);
  select.addEventListener("change", () => choose(select.value));
  let drawn = "";
  return {
    node,
    draw(options, value) {
      if (!options.some(([known]) => known === value)) options.push([value, value]);
      const now = JSON.stringify(options);
      if (now !== drawn) {
        drawn = now;
        select.replaceChildren(
          ...options.map(([known, text]) => {
            const option = make("option", "", text);
            option.value = known;
            return option;
          }),
        );
      }
      if (select.value !== value) select.value = value;
    },
  };
}

/* -- lists: a table by its roles, laid out by the style sheet, which puts a row on several lines where the page is narrow */

const CELL_COLUMNS = ["Status", "Cell", "Last run", "Took", "Steps", "Next wake", "A hit saves"];
const RUN_COLUMNS = ["Status", "Run", "Began", "Took", "Steps", "Next wake", "Actions"];
const AREAS = ["status", "name", "at", "took", "steps", "wake", "last"];

function list(name, columns, makeLine, turn) {
  const node = make("section", "dnb-list");
  const head = make("div", "dnb-list-head");
  const title = roled("strong", "heading", "", name);
  title.setAttribute("aria-level", "3");
  const about = make("span", "dnb-quiet");
  head.append(title, about);
  const frame = make("div", "dnb-frame");
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", name);
  const table = roled("div", "table", "dnb-table");
  table.setAttribute("aria-label", name);
  const titles = roled("div", "row", "dnb-line dnb-titles");
  columns.forEach((column, i) => titles.append(roled("div", "columnheader", `dnb-at-${AREAS[i]}`, column)));
  const body = roled("div", "rowgroup");
  table.append(titles, body);
  frame.append(table);
  const none = make("p", "dnb-quiet", "None that match.");
  const pages = pager(name, turn);
  node.append(head, frame, none, pages.node);
  const lines = new Map();
  return {
    node,
    draw(told, page, remark, steps) {
      const few = told.matched !== undefined && told.matched < told.total;
      put(about, [few ? `${count(told.matched)} of ${count(told.total)}` : count(told.total), remark].filter(Boolean).join(" · "));
      const kept = new Map();
      for (const row of told.rows) {
        const key = row.id ?? row.name;
        const line = lines.get(key) ?? makeLine(key);
        line.draw(row, steps?.run === key ? steps : undefined);
        kept.set(key, line);
      }
      lines.clear();
      for (const [key, line] of kept) lines.set(key, line);
      arrange(body, [...kept.values()].map((line) => line.node));
      none.hidden = told.rows.length > 0;
      frame.hidden = told.rows.length === 0;
      pages.draw(page ?? 0, told);
    },
    tick(now, silent) {
      for (const line of lines.values()) line.tick(now, silent);
    },
  };
}

function pager(name, turn) {
  const node = make("nav", "dnb-pages");
  node.setAttribute("aria-label", `Pages of ${name.toLowerCase()}`);
  let at = 0;
  let last = 0;
  const [first, newer, older, oldest] = [
    button("Newest", () => turn(0)),
    button("Newer", () => turn(at - 1)),
    button("Older", () => turn(at + 1)),
    button("Oldest", () => turn(last)),
  ];
  const where = make("span", "dnb-quiet");
  node.append(first.node, newer.node, where, older.node, oldest.node);
  return {
    node,
    draw(page, told) {
      last = told.pages - 1;
      at = Math.min(page, last);
      node.hidden = last === 0;
      const total = told.matched ?? told.total;
      put(where, `${count(at * told.most + 1)} to ${count(Math.min((at + 1) * told.most, total))} of ${count(total)}`);
      for (const control of [first, newer]) control.set(at === 0 ? "these are the newest" : "");
      for (const control of [older, oldest]) control.set(at === last ? "these are the oldest" : "");
    },
  };
}

/* What a line of either list has. */
function line() {
  const node = roled("div", "row", "dnb-line");
  const parts = AREAS.map((area) => roled("div", "cell", `dnb-at-${area}`));
  const [status, name, at, took, steps, wake, last] = parts;
  const badge = make("span", "dnb-badge");
  status.append(badge);
  name.setAttribute("role", "rowheader");
  took.dataset.narrow = "took";
  node.append(...parts);
  return { node, badge, name, at, took, steps, wake, last };
}

function cellLine(key) {
  const shown = line();
  const name = make("span", "dnb-name", key);
  name.title = key;
  const about = make("span", "dnb-quiet dnb-cut");
  shown.name.append(name, about);
  shown.last.dataset.narrow = "a hit saves";
  let row;
  return {
    node: shown.node,
    draw(next) {
      row = next;
      sign(shown.badge, row.status);
      const kept = row.size ? `${row.variables === 1 ? "1 variable" : `${count(row.variables)} variables`} in ${bytes(row.size)}` : "";
      put(about, kept);
      put(shown.took, row.took === undefined ? "" : length(row.took));
      put(shown.steps, row.steps ? count(row.steps) : "");
      put(shown.last, row.saves === undefined ? "" : length(row.saves));
    },
    tick(now) {
      moment(shown.at, row.at, now);
      wakes(shown.wake, row, now);
    },
  };
}

function runLine(key, act, unfold, pressed) {
  const shown = line();
  const opener = make("button", "dnb-unfold");
  opener.type = "button";
  opener.setAttribute("aria-label", `Steps of run ${key}`);
  opener.addEventListener("click", () => unfold(key));
  const steps = make("div", "dnb-unfolded");
  steps.setAttribute("role", "cell");
  const told = make("p", "dnb-quiet");
  shown.node.append(steps); // below what the run waits to have decided
  const name = make("span", "dnb-name");
  const id = make("span", "dnb-quiet dnb-cut", key);
  id.title = key;
  const labels = make("span", "dnb-labels");
  const details = make("details", "dnb-board-error");
  const summary = make("summary", "dnb-cut");
  const whole = make("pre", "dnb-code");
  details.append(summary, whole);
  shown.name.append(opener, name, id, labels, details);
  const asks = questions((action, step, comment) => act(key, action, { step, comment }), ` in run ${key}`);
  asks.node.classList.add("dnb-unfolded");
  asks.node.setAttribute("role", "cell");
  const buttons = new Map();
  let row;
  let drawnSteps = "";
  const drawActions = (silent) => {
    for (const action of row.actions) {
      if (!buttons.has(action.name)) {
        const made = button(action.label, () => act(key, action.name), "", action.name === "restart" ? RESTART : "");
        buttons.set(action.name, made);
      }
      const made = buttons.get(action.name);
      const why = silent ? "the kernel does not answer" : pressed.has(key) ? "sent" : action.refusal ?? "";
      made.set(why, action.label);
      const asks = made.node.classList.contains("dnb-asks-first");
      if (!why && !asks) made.node.setAttribute("aria-label", `${action.label} run ${key}`);
    }
    arrange(shown.last, row.actions.map((action) => buttons.get(action.name).node));
  };
  return {
    node: shown.node,
    draw(next, unfolded) {
      row = next;
      opener.setAttribute("aria-expanded", String(Boolean(unfolded)));
      steps.hidden = !unfolded;
      if (unfolded) {
        const said = JSON.stringify(unfolded);
        if (drawnSteps !== said) {
          drawnSteps = said; // what is drawn again loses what is selected in it
          const hidden = unfolded.total - unfolded.rows.length;
          put(told, unfolded.total ? (hidden ? `${count(hidden)} more, completed before` : "") : "No steps recorded.");
          steps.replaceChildren(told, ...unfolded.rows.map((step) => stepLine(step)));
        }
      }
      asks.show({ approvals: row.asks ?? [], actions: { approve: "" } });
      if (row.asks && !asks.node.isConnected) shown.node.insertBefore(asks.node, steps);
      if (!row.asks) asks.node.remove();
      sign(shown.badge, row.status);
      put(name, row.kind === "cell" ? `cell ${row.name}` : row.name);
      name.title = row.name;
      const said = JSON.stringify(row.labels ?? []);
      if (labels.dataset.said !== said) {
        labels.dataset.said = said;
        labels.replaceChildren(...(row.labels ?? []).map((label) => make("span", "dnb-label", label)));
      }
      details.hidden = !row.error;
      put(summary, (row.error ?? "").split("\n", 1)[0]);
      put(whole, row.error ?? "");
      put(shown.steps, row.steps ? count(row.steps) : "");
    },
    tick(now, silent) {
      moment(shown.at, row.started, now);
      const live = row.ended === undefined && row.status !== "interrupted";
      put(shown.took, row.ended !== undefined ? length(row.ended - row.started) : live ? length(now - row.started, true) : "");
      wakes(shown.wake, row, now);
      asks.tick(now);
      drawActions(silent);
    },
  };
}

function stepLine(step) {
  const node = make("div", "dnb-step");
  const badge = make("span", "dnb-badge");
  sign(badge, step.status);
  const took = step.started !== undefined && step.ended !== undefined ? length(step.ended - step.started) : "";
  const attempts = step.attempts ? `${step.attempts} attempts` : "";
  const facts = make("span", "dnb-quiet", [attempts, step.status === "restored" ? "" : took].filter(Boolean).join(" · "));
  node.append(badge, make("span", "dnb-cut", step.name), facts);
  if (step.given || step.gave) {
    const said = make("div", "dnb-said dnb-quiet", [step.given, step.gave && `→ ${step.gave}`].filter(Boolean).join(" "));
    said.setAttribute("aria-label", [step.given && `given ${step.given}`, step.gave && `gave ${step.gave}`].filter(Boolean).join(", "));
    node.append(said);
  }
  if (step.error) node.append(make("pre", "dnb-code", step.error));
  return node;
}

/* -- words */

/* When something was: roughly how long ago, and on demand which moment. */
function moment(node, at, now) {
  if (at === undefined) return put(node, "");
  const past = Math.max(now - at, 0);
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([seconds]) => past >= seconds) ?? [];
  put(node, size ? `${Math.floor(past / size)} ${unit} ago` : "just now");
  node.title = new Date(at * 1000).toLocaleString();
}

/* When a sleep or a retry is due. Nothing wakes without a process. */
function wakes(node, row, now) {
  if (row.wake === undefined) return put(node, "");
  node.title = new Date(row.wake * 1000).toLocaleString();
  if (row.status === "interrupted") return put(node, `${time(row.wake, now)}, no process is running this`);
  put(node, row.wake > now ? `in ${clock(row.wake - now)}` : "now");
}

function time(at, now) {
  const [then, today] = [new Date(at * 1000), new Date(now * 1000)];
  const hour = `${two(then.getHours())}:${two(then.getMinutes())}`;
  return then.toDateString() === today.toDateString() ? hour : `${then.toLocaleDateString()} ${hour}`;
}

function bytes(size) {
  for (const unit of ["B", "KB", "MB"]) {
    if (size < 1000) return `${Math.round(size)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(1)} GB`;
}

function show(node, text) {
  put(node, text);
  node.hidden = !text;
}

function roled(tag, role, className, text) {
  const node = make(tag, className, text);
  node.setAttribute("role", role);
  return node;
}

/* Give `parent` these children, in this order; what is there already is not touched: it may have the focus. */
function arrange(parent, nodes) {
  for (const child of [...parent.children]) if (!nodes.includes(child)) child.remove();
  let place = parent.firstChild;
  for (const node of nodes) {
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
}

export { mount };
export default { initialize };
