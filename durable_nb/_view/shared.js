/* What every view shares; the views' own scripts follow it in one module. Text of the user's only becomes textContent. */

const ACTIVE = new Set(["running", "sleeping", "waiting", "retrying"]);

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  restored: "M3.5 8a4.5 4.5 0 1 0 1.6-3.5M3.4 2.6v2.8h2.8",
  completed: "M3 8.5l3.2 3.2L13 4.8",
  running: "M5.5 3.5v9l7-4.5z",
  sleeping: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M8 5v3.2l2 1.5",
  waiting: "M5.8 3.5v9M10.2 3.5v9",
  retrying: "M12.5 8a4.5 4.5 0 1 1-1.6-3.5M12.6 2.6v2.8H9.8",
  pending: "M8 7.2a.8.8 0 1 0 0 1.6a.8.8 0 1 0 0-1.6",
  failed: "M4 4l8 8M12 4l-8 8",
  interrupted: "M8 3v6M8 12.2v.3",
  cancelled: "M3.5 8h9",
};

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

/* Set only what differs: a text that is set again would be selected, announced and laid out again. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/* Show a status in `node`, of class `dnb-badge`. */
function sign(node, status, words = status) {
  if (node.dataset.status === status && node.lastChild?.textContent === words) return;
  node.dataset.status = status;
  const icon = document.createElementNS(SVG, "svg");
  icon.setAttribute("viewBox", "0 0 16 16");
  icon.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[status] ?? ICONS.pending);
  icon.append(path);
  node.replaceChildren(icon, make("span", "dnb-cut", words));
}

const RESTART = "Discard what is recorded?";
const ASKED_MS = 4000;

/* A button that is safe to press twice: `press` is called once, until `set` tells anew what it may do.
   A reason disables it, and is its title and, for screen readers, part of its name. One that `asks` first is pressed
   again to say yes. */
function button(label, press, className = "", asks = "") {
  const node = make("button", `dnb-button ${className}`, label);
  node.type = "button";
  let reason = "";
  let asked; // a timer, while it waits for the yes
  const unask = () => {
    clearTimeout(asked);
    asked = undefined;
    node.classList.remove("dnb-asks-first");
  };
  const set = (why, text = label) => {
    reason = why;
    if (why) unask();
    if (asked === undefined) put(node, text);
    node.title = why;
    node.setAttribute("aria-disabled", String(Boolean(why)));
    if (why) node.setAttribute("aria-label", `${text}: ${why}`);
    else node.removeAttribute("aria-label");
  };
  node.addEventListener("click", (event) => {
    event.stopPropagation();
    if (reason) return;
    if (asks && asked === undefined) {
      put(node, asks);
      node.removeAttribute("aria-label");
      node.classList.add("dnb-asks-first");
      asked = setTimeout(() => {
        unask();
        put(node, label);
      }, ASKED_MS);
      return;
    }
    unask();
    press();
  });
  set("");
  return { node, set };
}

/* Decisions that a run waits for: a card each, with a comment and two buttons. `of` tells runs apart for those who hear it. */
function questions(send, of = "") {
  const node = make("div", "dnb-asks");
  const more = make("div", "dnb-quiet dnb-more-asks");
  const cards = new Map();
  const card = (path) => {
    const box = make("div", "dnb-ask");
    box.dataset.status = "waiting";
    box.setAttribute("role", "group");
    const prompt = make("div", "dnb-prompt");
    const until = make("span", "dnb-until dnb-quiet");
    const comment = make("input", "dnb-input");
    comment.type = "text";
    comment.maxLength = 2000;
    comment.placeholder = "Comment (optional)";
    comment.setAttribute("aria-label", `Comment on ${path.replace(/#1$/, "")}${of}`);
    const decide = (action, words) => () => {
      decided = true;
      approve.set("the decision was sent", action === "approve" ? words : "Approve");
      reject.set("the decision was sent", action === "reject" ? words : "Reject");
      comment.disabled = true;
      send(action, path, comment.value);
    };
    const approve = button("Approve", () => decide("approve", "Approving…")(), "dnb-primary");
    const reject = button("Reject", () => decide("reject", "Rejecting…")());
    const line = make("div", "dnb-decide");
    line.append(comment, approve.node, reject.node, until);
    box.append(prompt, line);
    let decided = false;
    let ask;
    return {
      box,
      show(next, reason) {
        ask = next;
        put(prompt, ask.prompt || ask.path);
        box.setAttribute("aria-label", `Decision: ${ask.prompt || ask.path}${of}`);
        if (!decided) {
          approve.set(reason);
          reject.set(reason);
        }
      },
      tick: (now) => put(until, ask.deadline === undefined ? "" : `times out in ${clock(ask.deadline - now)}`),
    };
  };
  return {
    node,
    show(state) {
      const wanted = new Set(state.approvals.map((ask) => ask.path));
      for (const [path, { box }] of cards) {
        if (!wanted.has(path)) {
          box.remove();
          cards.delete(path);
        }
      }
      for (const ask of state.approvals) {
        if (!cards.has(ask.path)) {
          cards.set(ask.path, card(ask.path));
          node.append(cards.get(ask.path).box);
        }
        cards.get(ask.path).show(ask, state.actions.approve);
      }
      put(more, state.more_approvals ? `${count(state.more_approvals)} more decisions are asked for after these` : "");
      more.hidden = !state.more_approvals;
      node.append(more);
    },
    tick: (now) => cards.forEach((card) => card.tick(now)),
  };
}

/* 340 ms, 12.4 s, 12 min 5 s, 2 h 3 min; while it still grows whole seconds, which a reader can follow. */
function length(seconds, growing = false) {
  const past = Math.max(seconds, 0);
  if (growing && past < 60) return `${Math.floor(past)} s`;
  if (past < 0.9995) return `${Math.round(past * 1000)} ms`;
  if (past < 59.95) return `${past.toFixed(1)} s`;
  const whole = growing ? Math.floor(past) : Math.round(past);
  for (const [size, big, smallSize, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole < size) continue;
    const rest = Math.floor((whole % size) / smallSize);
    return `${Math.floor(whole / size)} ${big}${rest || growing ? ` ${rest} ${small}` : ""}`;
  }
  return `${whole} s`;
}

/* What is left, as a clock: 0:42, 1:02:03; of days, 6 d 23 h. */
function clock(seconds) {
  const whole = Math.max(Math.ceil(seconds), 0);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  const tail = `${two(minutes)}:${two(whole % 60)}`;
  if (days) return hours ? `${days} d ${hours} h` : `${days} d`;
  return hours ? `${hours}:${tail}` : `${minutes}:${two(whole % 60)}`;
}

function two(number) {
  return String(number).padStart(2, "0");
}

function count(number) {
  return number.toLocaleString("en");
}
