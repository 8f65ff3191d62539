/* The page of a server: the notebook's dashboard and the view of a run, fed by a socket instead of a kernel. A row of the
   dashboard that is unfolded shows its run below. */
import { mount as mountBoard } from "./dashboard.js";
import { mount as mountRun } from "./run.js";

const FORGOTTEN = 4401; // the server's word for a token that is missing or wrong
const door = document.getElementById("door");

/* What the views take for a widget's model. */
class Model {
  #heard = new Set();
  #state = {};
  #closed = false;
  #tries = 0;

  constructor(show) {
    this.show = show;
    this.#open();
  }
  get() {
    return this.#state;
  }
  on(_event, heard) {
    this.#heard.add(heard);
  }
  off(_event, heard) {
    this.#heard.delete(heard);
  }
  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }
  close() {
    this.#closed = true;
    this.socket.close();
  }
  #open() {
    const url = new URL("page/live", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(url);
    this.socket.onopen = () => this.send({ token: sessionStorage.getItem("durable-nb token") ?? "", show: this.show });
    this.socket.onmessage = ({ data }) => {
      this.#tries = 0;
      door.hidden = true;
      this.#state = { ...JSON.parse(data), heard: Date.now() / 1000 };
      for (const heard of [...this.#heard]) heard();
    };
    this.socket.onclose = ({ code }) => {
      if (this.#closed) return;
      if (code === FORGOTTEN) return askForToken(() => this.#open());
      this.#tries += 1;
      setTimeout(() => this.#closed || this.#open(), Math.min(500 * 2 ** this.#tries, 15_000));
    };
  }
}

const waiting = [];
function askForToken(again) {
  waiting.push(again);
  const trouble = door.querySelector("p");
  trouble.textContent = "That was not it.";
  trouble.hidden = !sessionStorage.getItem("durable-nb token");
  sessionStorage.removeItem("durable-nb token");
  door.hidden = false;
  document.getElementById("token").focus();
}
door.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("durable-nb token", document.getElementById("token").value);
  for (const again of waiting.splice(0)) again();
});

/* Draw a view when there is something to draw. What is returned takes it away. */
function view(show, mount, el, told = () => {}) {
  const model = new Model(show);
  let unmount;
  model.on("change:state", () => {
    unmount ??= mount(model, el);
    told(model.get());
  });
  return () => {
    unmount?.();
    model.close();
  };
}

let shown = "";
let leave = () => {};
view({ dashboard: true }, (model, el) => mountBoard({ model, el }), document.getElementById("board"), ({ query }) => {
  if (query.open === shown) return;
  leave();
  shown = query.open;
  leave = shown ? view({ run: shown }, mountRun, document.getElementById("run")) : () => {};
});
