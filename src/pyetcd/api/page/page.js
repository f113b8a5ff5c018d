"use strict";
// What the server says goes into text nodes only: the page's policy forbids every other way.

// ---- tools

const $ = id => document.getElementById(id);
const on = (id, event, act) => $(id).addEventListener(event, act);
const base = location.pathname.replace(/ui\/?$/, "");
const server = location.origin + base.slice(0, -1);

/** Give a node these children: nodes, text, or lists of them. */
function fill(node, ...children) {
  node.replaceChildren(...children.flat(9).filter(child => child != null && child !== false));
  return node;
}
/** Make an element, `tag.class.class`; functions among its properties are listeners. */
function h(tag, properties, ...children) {
  const [name, ...classes] = tag.split("."), node = document.createElement(name);
  node.classList.add(...classes);
  if (properties == null || properties.constructor !== Object) {
    children.unshift(properties);
    properties = {};
  }
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, children);
}
function svg(tag, properties) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in properties) node.setAttribute(name, properties[name]);
  return node;
}
const gap = () => h("span.grow");
const button = (label, kind, act) => h("button", {class: kind, click: guarded(act)}, label);
const show = (id, is) => { $(id).hidden = !is; };
const number = (value, digits = 0) => value.toLocaleString("en", {maximumFractionDigits: digits});
const rate = value => number(value, value < 10 ? 1 : 0);
const ms = value => value ? number(value, value < 1 ? 2 : value < 100 ? 1 : 0) + " ms" : "–";
const size = bytes => bytes < 2048 ? bytes + " B"
  : bytes < 2 << 20 ? number(bytes / 1024, 1) + " KB" : number(bytes / (1 << 20), 1) + " MB";
function span(seconds) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (seconds >= 2 * length) return Math.floor(seconds / length) + " " + unit;
  return Math.max(0, Math.round(seconds)) + " s";
}
let skew = 0, state = null, account = null, declined = false;      // account: who is logged in
const clock = () => Date.now() / 1000 + skew;
const time = date => date.toLocaleTimeString("en-GB");
const encoded = key => key.split("/").map(encodeURIComponent).join("/");
const parentOf = key => key.slice(0, key.lastIndexOf("/")) || "/";
const nameOf = key => key.slice(key.lastIndexOf("/") + 1);
const cleaned = text => "/" + text.trim().split("/").filter(Boolean).join("/");
const link = key => "#/keys" + encoded(key);
const visit = key => { location.hash = link(key); };

// ---- requests

class Refused extends Error {
  constructor(status, {message, cause, errorCode}) {
    super((message || `HTTP ${status}`) + (cause ? ` (${cause})` : ""));
    this.code = errorCode;
  }
}
/** Ask the server.  Throws Refused, or TypeError if there was no answer. */
async function ask(method, path, {form, signal} = {}) {
  const headers = {};
  if (method !== "GET") headers["X-Pyetcd-Page"] = "1";        // no form of another page has it
  if (account) headers.Authorization = "Basic " + account.secret;
  const reply = await fetch(base + path, {method, headers, signal,
    body: form && new URLSearchParams(form), cache: "no-store", credentials: "omit"});
  if (reply.ok) return reply;
  const text = await reply.text();
  let said = {message: text.trim()};
  try { said = JSON.parse(text); } catch { /* it is plain */ }
  if (reply.status === 401 && account)
    said.message = `${account.user} may not do this, or the password is wrong`;
  else if (reply.status === 401 && !$("dialog").open && !declined) logIn(said.message);
  throw new Refused(reply.status, said);
}
const json = async (...request) => (await ask(...request)).json();
const keyPath = (key, query) => "v2/keys" + encoded(key) + (query ? "?" + query : "");
const readNode = async (key, signal) => (await json("GET", keyPath(key), {signal})).node;

/** Yield the lines of a reply, parsed, as they come. */
async function* lines(path, signal) {
  const reader = (await ask("GET", path, {signal})).body.getReader(), decoder = new TextDecoder();
  for (let rest = ""; ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, {stream: true})).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part.trim()) yield JSON.parse(part);
  }
}
/** Yield the events of a key, or all below it, from an index on; connect again if need be. */
async function* changes(key, {since, recursive = false, signal, told = () => {}}) {
  let skip = 10;                // events that may leave the history before the next request comes
  for (let pause = 250; !signal.aborted; pause = Math.min(2 * pause, 4000)) {
    try {
      const query = `wait=true&stream=true&recursive=${recursive}&waitIndex=${since}`;
      for await (const event of lines(keyPath(key, query), signal)) {
        pause = 250;
        told("");
        since = event.node.modifiedIndex + 1;
        yield event;
      }
      told("The connection has ended; trying again.");
    } catch (error) {
      if (signal.aborted) return;
      const first = /\[(\d+)\//.exec(error.message);      // of a history that is too short
      told(first ? "Some changes were missed." : error.message);
      if (first) {
        since = Number(first[1]) + (skip *= 2);
        continue;
      }
      if (error instanceof Refused) return;
    }
    await new Promise(done => setTimeout(done, pause));
  }
}

// ---- toasts and dialogs

function toast(text, {bad, label, act, seconds = 7} = {}) {
  const node = h("div", {class: "toast" + (bad ? " bad" : "")}, h("span.grow", text),
    label && h("button", {click() { node.remove(); act(); }}, label),
    h("button", {"aria-label": "Close", click: () => node.remove()}, "×"));
  $("toasts").append(node);
  setTimeout(() => node.remove(), seconds * 1000);
}
const guarded = act => async (...given) => {
  try { await act(...given); } catch (error) {
    if (error.name !== "AbortError") toast(error instanceof Refused ? error.message
      : `No answer from the server: ${error.message}`, {bad: true});
  }
};
/** Show a dialog; return the button that closed it, or "".  Its event comes too late: it may meet the next one. */
function choose(title, content, ...buttons) {
  const dialog = $("dialog");
  return new Promise(done => {
    const close = name => { done(name); dialog.close(); };
    fill(dialog, h("h2", {id: "title"}, title), content, h("div.bar",
      [["", buttons.length ? "Cancel" : "Close"], ...buttons].map(([name, label, kind]) =>
        h("button", {class: kind, "data-name": name, click: () => close(name)}, label))));
    dialog.onkeydown = ({key, target}) => {
      if (key === "Enter" && target.tagName === "INPUT") close(buttons[buttons.length - 1][0]);
    };
    dialog.oncancel = () => done("");
    dialog.showModal();
  });
}
const field = (label, input) => h("label.field", label, input);

async function logIn(why) {
  if (account && !why) account = null;
  else {
    const user = h("input", {autofocus: true, autocomplete: "off", value: "root", id: "user"});
    const password = h("input", {type: "password", autocomplete: "off", id: "password"});
    if (await choose("Log in", [why && h("p", why), field("User", user),
      field("Password", password), h("p.note", "Kept in the memory of this page only.")],
    ["ok", "Log in", "primary"]) !== "ok") { declined = true; return; }
    const bytes = new TextEncoder().encode(`${user.value}:${password.value}`);
    account = {user: user.value, secret: btoa(String.fromCharCode(...bytes))};
  }
  $("login").textContent = account ? `${account.user} · log out` : "Log in";
  reload();                     // another user may see something else
  current = "";
  route();
}

// ---- the state of the member, once a second

let samples = [], answered = Date.now();

async function poll() {
  if (!document.hidden) try {
    const last = samples.length ? samples[samples.length - 1][0] : 0;
    state = await json("GET", "ui/status?since=" + last, {signal: AbortSignal.timeout(5000)});
    skew = state.now - Date.now() / 1000;
    samples = samples.concat(state.samples).slice(-300);
    answered = Date.now();
    showState();
  } catch {
    const seconds = (Date.now() - answered) / 1000;
    if (seconds > 2) {
      show("offline", true);
      fill($("offline"), `This member has not answered for ${span(seconds)}. The page keeps trying.`,
        (state ? state.members : []).filter(member => !member.self && member.clientURLs.length)
          .map(member => [" ", h("a", {href: member.clientURLs[0] + "/ui"}, member.name)]));
      pill("bad", "no answer");
    }
  }
  setTimeout(poll, 1000);
}
function pill(kind, text) {
  $("health").className = "pill " + kind;
  $("health").textContent = text;
}
function showState() {
  const {members, problems} = state, self = members.find(member => member.self) || {};
  const up = members.filter(member => !member.silent && member.name).length;
  show("offline", false);
  $("member").textContent = self.name || self.id || "";
  document.title = `${self.name || "?"} · pyetcd`;
  if (problems.length) pill("bad", problems.length > 1 ? `${problems.length} problems` : "1 problem");
  else pill("good", members.length > 1 ? `${up} of ${members.length} members` : "healthy");
  $("health").title = problems.join("\n");
  show("readonly", state.ui === "readonly");
  document.body.classList.toggle("readonly", state.ui === "readonly");
  show("login", state.auth);
  show("problems", problems.length);
  fill($("problems"), problems.map(text => h("p", text)));
  if (current !== "overview") return;
  $("cluster").textContent = `cluster ${state.cluster}`;
  fill($("members"), members.map(memberCard));
  charts.forEach(chart => chart.draw());
}
function memberCard(member) {
  const {name, silent, leader, clientURLs} = member;
  const bad = silent || member.healthy === false;
  const why = silent ? `has not answered for ${span(silent)}` : bad && (member.problem ||
    "knows no leader, or reaches no quorum");
  const facts = member.term == null ? [] : [
    ["Term · index", `${number(member.term)} · ${number(member.index)}`],
    ["Behind", member.lag > 0 ? number(member.lag) + (member.lag > 1 ? " entries" : " entry") : "nothing"],
    ["Version", `etcd ${member.version} · pyetcd ${member.pyetcd}`],
    ["Up for", span(clock() - member.since)]];
  facts.unshift(["Id", h("code", member.id)]);
  facts.push(["Clients", clientURLs.join(", ")], ["Peers", member.peerURLs.join(", ")]);
  return h("article", {class: `card member ${!name ? "new" : bad ? "bad" : ""}`},
    h("div.bar", h("h3", name || "not started"),
      h("span", {class: "badge " + (silent ? "bad" : leader ? "lead" : "")},
        silent ? "silent" : leader ? "leader" : member.role || "member"), gap(),
      member.self ? h("small", "this member") : clientURLs.length > 0 &&
        h("a", {href: clientURLs[0] + "/ui"}, "its page")),
    why && h("p.why", why),
    h("dl", facts.map(([title, value]) => [h("dt", title), h("dd", value)])));
}

// ---- charts

const WIDTH = 300, HEIGHT = 76;

class Chart {
  /** columns: of a sample -> name; write: shows a value. */
  constructor(title, columns, write, note) {
    Object.assign(this, {title, columns: Object.entries(columns), write, hover: null});
    const paths = this.columns.map((_, at) => svg("path", {class: at ? "second" : ""}));
    Object.assign(this, {paths, area: svg("path", {class: "area"}), cross: svg("path", {class: "cross"})});
    this.picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img"});
    this.picture.append(svg("path", {class: "grid", d: `M0 8H${WIDTH}M0 42H${WIDTH}M0 75.5H${WIDTH}`}),
      this.area, ...paths, this.cross);
    this.values = paths.map(() => h("b", "–"));
    this.peak = h("small.peak");
    const move = ({type, offsetX}) => {
      this.hover = type === "pointermove" ? offsetX / this.picture.clientWidth : null;
      this.draw();
    };
    for (const type of ["pointermove", "pointerleave"]) this.picture.addEventListener(type, move);
    $("charts").append(h("article.card.chart",
      h("div", h("h3", title), h("small", note), this.peak),
      h("div", this.values.map((value, at) => [value, h("small",
        {class: paths.length > 1 && "key " + (at && "second")}, this.columns[at][1])])), this.picture));
  }
  draw() {
    if (!samples.length) return;
    const all = samples.flatMap(sample => this.columns.map(([column]) => sample[column])).sort((a, b) => a - b);
    const last = samples[samples.length - 1], peak = all[all.length - 1], most = all[Math.floor(all.length * .97)];
    const top = Math.max(1e-3, most ? Math.min(peak, 2 * most) : peak);       // a rare peak is cut
    const x = sample => WIDTH * (1 - (last[0] - sample[0]) / 299);
    this.columns.forEach(([column], at) => {
      const line = samples.map(sample => `${x(sample).toFixed(1)} ` +
        (HEIGHT - 1 - sample[column] / top * (HEIGHT - 10)).toFixed(1)).join("L");
      this.paths[at].setAttribute("d", "M" + line);
      if (!at) this.area.setAttribute("d", `M${x(samples[0])} ${HEIGHT}L${line}V${HEIGHT}Z`);
    });
    let sample = last;
    if (this.hover != null) sample = samples.reduce((best, other) =>
      Math.abs(x(other) / WIDTH - this.hover) < Math.abs(x(best) / WIDTH - this.hover) ? other : best);
    this.cross.setAttribute("d", this.hover == null ? "" : `M${x(sample)} 0V${HEIGHT}`);
    this.values.forEach((value, at) => { value.textContent = this.write(sample[this.columns[at][0]]); });
    this.peak.textContent = this.hover == null ? `peak ${this.write(peak)}`
      : time(new Date(sample[0] * 1000));
    this.picture.setAttribute("aria-label", `${this.title}: ${this.values[0].textContent}`);
  }
}
const charts = [
  new Chart("Writes", {1: ""}, rate, "per second, of the cluster"),
  new Chart("Reads", {2: ""}, rate, "per second, of this member"),
  new Chart("Time to write", {3: "median", 4: "99 %"}, ms),
  new Chart("Sync of the disk", {5: ""}, ms, "mean"),
  new Chart("Watchers", {6: ""}, number, "waiting"),
  new Chart("Keys", {7: ""}, number, "and directories"),
];

// ---- the tree: the document has the rows that can be seen

/** Where a key is in the sorted children of a directory, or belongs. */
function place(kids, key) {
  let low = 0;
  for (let high = kids.length; low < high;) {
    const middle = (low + high) >> 1;
    if (kids[middle].key < key) low = middle + 1; else high = middle;
  }
  return low;
}
const tree = {
  root: {key: "/", dir: true, level: 0, kids: null}, flat: [], at: 0, found: null,

  /** Load the children of a directory; rows appear while they come. */
  async load(node) {
    if (node.loading) node.loading.abort();
    node.failed = "";
    const {signal} = node.loading = new AbortController(), kids = [], late = node.late = [];
    const known = new Map((node.kids || []).filter(kid => kid.open).map(kid => [kid.key, kid]));
    const prefix = node.key === "/" ? "/" : node.key + "/";
    try {
      for await (const line of lines(
        `ui/keys${encoded(node.key)}${$("hidden").checked ? "?hidden" : ""}`, signal)) {
        if (line.index) node.seen = line.index;
        if (line.more) toast(`${node.key} has more than ${number(kids.length)} keys: search for the others.`);
        if (!Array.isArray(line)) continue;
        for (const row of line) kids.push(this.node(row, prefix + row[0], node.level + 1, known));
        if (!node.kids || node.kids.length < kids.length) node.kids = kids;
        this.drawSoon(true);
      }
    } catch (error) {
      if (signal.aborted) return;
      node.failed = error instanceof Refused && error.message;
      guarded(() => { throw error; })();
    }
    node.kids = kids.sort((a, b) => a.key < b.key ? -1 : 1);
    node.loading = null;
    late.forEach(event => this.take(event));
    this.drawSoon(true);
    for (const kid of kids) if (kid.open) await this.load(kid);
  },
  /** Follow what all clients change, while the keys are shown: a browser has six connections. */
  async follow() {
    for (const each of [this, opened]) if (each && each.followed) each.followed.abort();
    if (current !== "keys" || document.hidden || !state) return;
    if (opened && opened.follow) opened.follow();
    const {signal} = this.followed = new AbortController(), told = text => {
      if (!/missed/.test(text) || this.again) return;
      this.again = setTimeout(() => { this.again = 0; this.load(this.root); }, 500);
    };
    this.since = this.since || state.index + 1;
    for await (const event of changes("/", {since: this.since, recursive: true, signal, told})) {
      this.since = event.node.modifiedIndex + 1;
      this.take(event);
    }
  },
  /** Show a change, if the directory is loaded in which it was made. */
  take(event) {
    const {action, prevNode, node: {key, dir, value = "", expiration, modifiedIndex}} = event;
    const gone = /delete|expire/i.test(action), expires = expiration ? Date.parse(expiration) / 1000 : 0;
    for (let node = this.root; ;) {
      if (node.loading) return node.late.push(event);
      if (!node.kids || modifiedIndex <= node.seen) return;
      const end = key.indexOf("/", node.level && node.key.length + 1 || 1), {kids} = node;
      const path = end < 0 ? key : key.slice(0, end), at = place(kids, path);
      const kid = kids[at] && kids[at].key === path && kids[at];
      this.drawSoon(true);
      if (path !== key && kid) {
        if (!kid.kids && parentOf(key) === path) kid.bytes += gone ? -1 : prevNode ? 0 : 1;
        node = kid;
        continue;
      }
      node.bytes += gone ? -!!kid : !kid;
      if (gone) return kid && kids.splice(at, 1);
      const row = this.node([0, dir || path !== key, value.slice(0, 60), path !== key ? 1 : value.length,
        expires, modifiedIndex], path, node.level + 1);
      row.fresh = Date.now();
      if (!kid) kids.splice(at, 0, row);
      else Object.assign(kid, row, kid.dir && dir && {kids: kid.kids, open: kid.open, bytes: kid.bytes});
      return;
    }
  },
  node([, dir, preview, bytes, expires, index], key, level, known) {
    const {kids, open} = known && known.get(key) || {};
    return {key, dir, preview, bytes, expires, index, level, kids, open};
  },
  async search(text) {
    if (this.searching) this.searching.abort();
    this.found = text ? [] : null;
    this.drawSoon(true);
    if (!text) return;
    const {signal} = this.searching = new AbortController();
    const query = new URLSearchParams({q: text, in: $("where").value});
    if ($("hidden").checked) query.set("hidden", "");
    for await (const line of lines("ui/keys/?" + query, signal)) {
      if (Array.isArray(line)) this.found.push(...line.map(row => this.node(row, row[0], 1)));
      this.more = line.more;
      this.drawSoon(true);
    }
    this.searching = null;
    this.drawSoon();
  },
  flatten() {
    if (this.found) return this.found;
    const flat = [], stack = [[this.root.kids || [], 0]];
    while (stack.length) {
      const top = stack[stack.length - 1], node = top[0][top[1]++];
      if (!node) stack.pop();
      else {
        flat.push(node);
        if (node.open && node.kids) stack.push([node.kids, 0]);
      }
    }
    return flat;
  },
  drawSoon(changed) {
    this.changed = this.changed || changed;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  },
  draw() {
    this.frame = null;
    const box = $("tree"), busy = this.root.loading || this.searching ? " …" : "";
    this.high = parseFloat(getComputedStyle(box).getPropertyValue("--row"));
    if (this.changed) {
      const before = this.flat[this.at], above = Math.floor(box.scrollTop / this.high), top = this.flat[above];
      this.flat = this.flatten();
      if (before && this.flat[this.at] !== before)
        this.at = Math.max(0, this.flat.findIndex(node => node.key === before.key));
      $("space").style.height = `${this.flat.length * this.high}px`;
      // What the reader looks at stays where it is.
      const now = above && top !== this.flat[above] ? this.flat.indexOf(top) : -1;
      if (now >= 0) box.scrollTop += (now - above) * this.high;
      this.changed = false;
    }
    const first = Math.max(0, Math.floor(box.scrollTop / this.high) - 8);
    const some = this.flat.slice(first, first + Math.ceil(box.clientHeight / this.high) + 16);
    $("rows").style.transform = `translateY(${first * this.high}px)`;
    fill($("rows"), some.map((node, at) => this.row(node, first + at)),
      !some.length && !busy && h("p.empty", this.found ? "Nothing found."
        : this.root.failed ? `${this.root.failed}. A key can be opened by its address: #/keys/…` : "No keys yet."));
    box.setAttribute("aria-activedescendant", `row${this.at}`);
    $("count").textContent = number(this.flat.length) + (this.found ? " found" : " rows") +
      (busy || (this.found && this.more ? ", and more" : ""));
  },
  row(node, at) {
    const {key, dir, expires, fresh} = node;
    const line = h("div", {class: fresh > Date.now() - 1500 ? "row fresh" : "row", role: "treeitem", id: `row${at}`, "data-key": key,
      "aria-level": node.level, "aria-expanded": dir && !this.found && String(!!node.open),
      "aria-selected": String(at === this.at)},
    h("span.twist", dir ? node.loading ? "…" : node.open ? "▼" : "▶" : ""),
    h("span", {class: dir ? "name dir" : "name"}, (this.found ? key : nameOf(key)) + (dir ? "/" : "")),
    h("span.dim", dir ? number(node.bytes) : BINARY.test(node.preview) ? "binary"
      : node.preview || size(node.bytes)),
    expires > 0 && h("span.ttl", {title: "until it expires"}, "◷ " + span(expires - clock())));
    line.style.paddingLeft = `${4 + (this.found ? 0 : node.level - 1) * 17}px`;
    return line;
  },
  open(at) {
    const node = this.flat[at];
    if (!node) return;
    this.at = at;
    if (node.dir && !this.found) this.toggle(node);
    this.stay = node.dir && node.key;
    visit(node.key);
    this.drawSoon();
  },
  toggle(node) {
    node.open = !node.open;
    if (node.open && !node.kids && !node.loading) this.load(node);
    this.drawSoon(true);
  },
  move(at) {
    this.at = Math.max(0, Math.min(this.flat.length - 1, at));
    const box = $("tree"), top = this.at * this.high;
    box.scrollTop = Math.min(top, Math.max(box.scrollTop, top + this.high - box.clientHeight));
    this.drawSoon();
  },
  key(event) {
    const node = this.flat[this.at], page = Math.floor($("tree").clientHeight / this.high) - 1;
    const {key} = event, step = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page,
      Home: -1e9, End: 1e9}[key];
    if (!node) return;
    if (step) this.move(this.at + step);
    else if (key === "Enter" || key === " ") this.open(this.at);
    else if (key === "ArrowRight" && node.dir && !node.open) this.toggle(node);
    else if (key === "ArrowRight") this.move(this.at + 1);
    else if (key === "ArrowLeft" && node.open) this.toggle(node);
    else if (key === "ArrowLeft") this.move(this.flat.findIndex(other => other.key === parentOf(node.key)));
    else return;
    event.preventDefault();
  },
  async reveal(key) {
    for (let node = this.root; node; ) {
      if (!node.kids) await this.load(node);
      const next = node.kids.find(kid => key === kid.key || key.startsWith(kid.key + "/"));
      if (next && next.key === key) {
        this.flat = this.flatten();
        this.move(this.flat.indexOf(next));
      } else if (next) next.open = true;
      node = next && next.key !== key ? next : null;
    }
    this.drawSoon(true);
  },
  /** Load the directory again in which this page has changed something. */
  touch(key) {
    let node = this.root, next = node;
    while (next) {
      node = next;
      next = (node.kids || []).find(kid => kid.kids && key.startsWith(kid.key + "/"));
    }
    return this.load(node);
  },
};

// ---- one key

let opened = null;              // {key, node, stop: of its requests, followed: of its events}
const BINARY = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffd]/;
const SHOWN_MAX = 1 << 18, UNDO_MAX = 4 << 20;

function hex(text) {
  const bytes = [...new TextEncoder().encode(text.slice(0, 8192))], out = [];
  for (let at = 0; at < bytes.length; at += 16) {
    const some = bytes.slice(at, at + 16);
    out.push(at.toString(16).padStart(6, "0") + "  " +
      some.map(byte => byte.toString(16).padStart(2, "0")).join(" ").padEnd(49) +
      String.fromCharCode(...some).replace(/[^ -~]/g, "·"));
  }
  return out.join("\n");
}
/** Indent JSON.  Its tokens stay as they are: JavaScript would round long numbers. */
function indent(text) {
  let depth = 0;
  const line = step => "\n" + "  ".repeat(depth += step);
  return text.replace(/"(?:[^"\\]|\\.)*"|\s+|[{[]\s*[}\]]|[{}[\]:,]/g, token =>
    /^\s/.test(token) ? "" : token === "," ? token + line(0) : token === ":" ? ": "
      : token[0] === '"' ? token : token.length > 1 ? token.replace(/\s+/, "")
      : /[{[]/.test(token) ? token + line(1) : line(-1) + token);
}
/** Tell without reading a directory: it may be large. */
async function isDirectory(key, signal) {
  const row = tree.flat.find(other => other.key === key);
  if (key === "/" || row) return key === "/" || row.dir;
  const stop = new AbortController();
  try {
    await ask("GET", "ui/keys" + encoded(key), {signal: stop.signal});
    return true;
  } catch (error) {
    if (error.code === 104) return false;
    throw error;
  } finally { stop.abort(); }
}
const openKey = guarded(async key => {
  if (opened) [opened.stop, opened.followed].forEach(each => each && each.abort());
  const mine = opened = {key, stop: new AbortController()}, {signal} = mine.stop;
  const parts = key.split("/").slice(1);
  $("keys").classList.toggle("open", key !== "/" && key !== tree.stay);     // on a phone
  mine.head = [h("button.back.quiet", {click() { visit("/"); }}, "‹ Keys"),
    h("div.path", h("a", {href: link("/")}, "/"), parts.map((part, at) => [at ? "/" : "",
      at < parts.length - 1 ? h("a", {href: link("/" + parts.slice(0, at + 1).join("/"))}, part) : part]))];
  try {
    mine.dir = await isDirectory(key, signal);
    mine.node = mine.dir ? {key, dir: true} : await readNode(key, signal);
  } catch (error) {
    const absent = error.code === 100;
    if (opened === mine) fill($("detail"), mine.head, h("p.empty", absent ? "There is no such key." : error.message),
      absent && h("div.bar", button("Create it", "write", () => create(key))));
    if (absent) return;
    throw error;
  }
  if (opened !== mine) return;
  const row = tree.flat.findIndex(node => node.key === key);
  if (row >= 0) tree.move(row); else if (!tree.found) tree.reveal(key);
  (mine.dir ? showDirectory : showFile)(mine);
});
const common = (mine, value) => [gap(), button("Copy as …", "", () => copyAs(mine.key, value())),
  button("Watch", "", () => { location.hash = "#/watch" + encoded(mine.key); }),
  mine.key !== "/" && button("Delete", "danger write", () => remove(mine.key, mine.node))];

function showDirectory(mine) {
  fill($("detail"), mine.head, h("div.bar", button("New key here", "write", () =>
    create(mine.key === "/" ? "/" : mine.key + "/")), common(mine, () => null)),
  h("p.empty", "A directory. Choose a key to see its value."));
}
function showFile(mine) {
  const {node} = mine, {value} = node;
  mine.expires = node.expiration ? Date.parse(node.expiration) / 1000 : 0;
  const crlf = value.includes("\r");           // which a text area makes \n
  const binary = BINARY.test(value) || crlf && /[^\r]\n|^\n|\r(?!\n)/.test(value), large = value.length > SHOWN_MAX;
  const area = h("textarea", {id: "value", "aria-label": "Value",
    readonly: large || state.ui === "readonly"});
  area.value = value.slice(0, SHOWN_MAX);
  const before = area.value, edited = () => crlf ? area.value.replace(/\n/g, "\r\n") : area.value;
  const kind = h("span", {id: "kind"});
  const ttl = h("input", {type: "number", min: 1, id: "ttl", placeholder: mine.expires ? "as it is" : "never"});
  const format = button("Format", "write", () => {
    area.value = indent(area.value);
    judge();
  });
  const save = button("Save", "primary write", () => saveValue(mine, edited(), ttl.value));
  function judge() {
    let text = large ? "only the beginning is shown" : "text", rank = "";
    if (!large) try {
      JSON.parse(area.value);
      [text, rank] = ["valid JSON", "good"];
    } catch (error) {
      if (/^\s*[[{]/.test(area.value)) [text, rank] = [`not JSON: ${error.message}`, "warn"];
    }
    kind.textContent = text;
    kind.className = "badge " + rank;
    format.disabled = rank !== "good";
    save.disabled = large || area.value === before && !ttl.value;
  }
  save.id = "save";
  area.addEventListener("input", judge);
  ttl.addEventListener("input", judge);
  area.addEventListener("keydown", event => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== "s") return;
    event.preventDefault();
    save.click();
  });
  const changed = h("div.changed", {id: "changed", hidden: true});
  const history = h("ol.events", {id: "history"});
  const fact = (title, shown) => h("span", title, " ", h("b", shown));
  const ends = h("b", {"data-expires": mine.expires});
  fill($("detail"), mine.head, h("div.facts", kind, size(new TextEncoder().encode(value).length),
    fact("changed at", number(node.modifiedIndex)), fact("created at", number(node.createdIndex)),
    mine.expires > 0 && h("span", "expires in ", ends)), changed,
  binary ? [h("p.note", "These are its bytes" + (value.includes("\ufffd")
    ? "; ef bf bd stands for what was no UTF-8." : ", as it has control characters.")),
  h("pre.hex", hex(value))] : area,
  h("div.bar", !binary && [save, format,
    h("label.check.write", {title: "seconds to live"}, "TTL", ttl, "s")], common(mine, () => large ? value : edited())),
  h("h3", "History"), history);
  judge();
  tick();
  mine.follow = () => follow(mine, area, history, changed);
  mine.follow();
}
/** The history of a key as far as it goes, and then what happens to it. */
async function follow(mine, area, history, changed) {
  const {signal} = mine.followed = new AbortController();
  mine.since = mine.since || Math.max(1, state.history);
  for await (const {action, node} of changes(mine.key, {since: mine.since, signal})) {
    mine.since = node.modifiedIndex + 1;
    const value = node.value, index = number(node.modifiedIndex);
    history.prepend(h("li", h("span.at", index), badge(action),
      h("code", shorten(value)), value != null && button("Use", "quiet write", () => {
        area.value = value;
        area.dispatchEvent(new Event("input"));
      })));
    if (history.children.length > 200) history.lastChild.remove();
    if (node.modifiedIndex <= mine.node.modifiedIndex) continue;
    changed.hidden = false;
    fill(changed, h("span.grow", value == null ? `The key has gone: ${action} at ${index}.`
      : `The key was changed elsewhere, at ${index}.`), button("Load", "", () => openKey(mine.key)));
  }
}
const badge = action => h("span", {class: "badge " + ({delete: "bad", expire: "warn",
  compareAndDelete: "bad", create: "good"}[action] || "")}, action);
const shorten = (value = "") => BINARY.test(value) ? hex(value.slice(0, 16)).slice(8, 56) : value.slice(0, 300);

async function saveValue(mine, value, ttl, index = mine.node.modifiedIndex) {
  const {key, expires} = mine, form = {value, prevIndex: index};
  if (ttl || expires) form.ttl = ttl || Math.max(1, Math.ceil(expires - clock()));
  try {
    await ask("PUT", keyPath(key), {form});
  } catch (error) {
    if (error.code === 101 || error.code === 100) return lost(mine, value, ttl);
    if (error instanceof Refused) throw error;
    return toast("No answer: it is not known whether the change was made. Load the key again.", {bad: true});
  }
  toast(`Saved ${key}`);
  tree.touch(key);
  if (opened === mine) await openKey(key);
}
/** Another client was faster: show both values, and let the reader decide. */
async function lost(mine, value, ttl) {
  const {key} = mine, theirs = await readNode(key).catch(error => {
    if (error.code !== 100) throw error;
  });
  if (!theirs) return create(key, value, "The key was deleted meanwhile: nothing was saved");
  const answer = await choose("The key was changed meanwhile", [h("p", `Nothing was saved. Red is what
    it holds now (index ${number(theirs.modifiedIndex)}), green is yours.`), diff(theirs.value, value)],
  ["theirs", "Take theirs"], ["mine", "Save mine over it", "primary"]);
  if (answer === "theirs") return openKey(key);
  if (answer === "mine") return saveValue(mine, value, ttl, theirs.modifiedIndex);
}
/** The lines that differ, with some around them. */
function diff(before, after) {
  let a = before.split("\n"), b = after.split("\n"), head = 0;
  const shown = [], add = (kind, mark) => line => shown.push(
    h("div", {class: kind}, mark + line.slice(0, 4000)));
  const same = add("", "  "), del = add("del", "- "), ins = add("add", "+ ");
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  a.slice(Math.max(0, head - 3), head).forEach(same);
  a = a.slice(head);
  b = b.slice(head);
  const tail = [];
  while (a.length && b.length && a[a.length - 1] === b[b.length - 1]) tail.unshift(a.pop(), b.pop());
  if (a.length * b.length > 4e6) b.length = a.length = 300;
  const width = b.length + 1, long = new Uint16Array((a.length + 1) * width);     // common lines
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    long[i * width + j] = a[i] === b[j] ? long[(i + 1) * width + j + 1] + 1
      : Math.max(long[(i + 1) * width + j], long[i * width + j + 1]);
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    if (i < a.length && j < b.length && a[i] === b[j]) { same(a[i++]); j++; }
    else if (j === b.length || i < a.length && long[(i + 1) * width + j] >= long[i * width + j + 1]) del(a[i++]);
    else ins(b[j++]);
  }
  tail.filter((_, at) => at % 2 && at < 6).forEach(same);
  return h("pre.diff", {id: "diff"}, shown);
}
async function create(key, text, why = "New key") {
  const path = h("input", {autofocus: true, value: key, id: "newkey"});
  const value = h("textarea", {id: "newvalue"}, text);
  const ttl = h("input", {type: "number", min: 1, placeholder: "never"});
  const dir = h("input", {type: "checkbox"});
  if (await choose(why, [field("Key", path), field("Value", value), h("div.facts",
    h("label.check", "TTL", ttl, "s"),
    h("label.check", dir, "a directory, without a value"))], ["ok", "Create", "primary"]) !== "ok") return;
  const made = cleaned(path.value), form = {prevExist: false};
  if (dir.checked) form.dir = true; else form.value = value.value;
  if (ttl.value) form.ttl = ttl.value;
  try {
    await ask("PUT", keyPath(made), {form});
  } catch (error) {
    if (error.code !== 105) throw error;
    return toast(`${made} exists already.`, {bad: true, label: "Open", act: () => visit(made)});
  }
  toast(`Created ${made}`);
  await tree.touch(made);
  if (opened && opened.key === made) openKey(made); else visit(made);
}
/** What a directory holds; null if that is too much to keep. */
async function contents(key) {
  const stop = new AbortController();
  const reply = await ask("GET", keyPath(key, "recursive=true"), {signal: stop.signal});
  if (reply.headers.get("Content-Length") < UNDO_MAX) return (await reply.json()).node;
  stop.abort();
  return null;
}
const files = node => node.dir ? (node.nodes || []).flatMap(files) : [node];

async function remove(key, node) {
  const kept = node.dir ? await contents(key) : node;
  if (await choose(node.dir ? "Delete this directory?" : "Delete this key?", [h("p.path", key),
    h("p", !kept ? "It holds more than the page can keep: this cannot be undone."
      : (node.dir ? `With the ${number(files(kept).length)} keys in it. Hidden keys are lost; all others` : "It") +
      " can be made again for a minute, while this page is open.")], ["ok", "Delete", "danger"]) !== "ok") return;
  try {
    await ask("DELETE", keyPath(key, node.dir ? "recursive=true" : "prevIndex=" + node.modifiedIndex));
  } catch (error) {
    if (error.code !== 101) throw error;
    toast(`${key} was changed meanwhile: nothing was deleted.`, {bad: true});
    return openKey(key);
  }
  toast(`Deleted ${key}`, {seconds: 60, ...kept && {label: "Undo", act: guarded(() => undo(key, kept))}});
  tree.touch(key);
  visit(parentOf(key));
}
async function undo(key, kept) {
  async function bring({key, dir, value, expiration, nodes = []}) {
    const form = {prevExist: false, ...dir ? {dir} : {value}};
    if (expiration) form.ttl = Math.ceil(Date.parse(expiration) / 1000 - clock());
    if (form.ttl <= 0) return;
    await ask("PUT", keyPath(key), {form}).catch(error => {
      if (error.code !== 105) throw error;      // it is there again
    });
    for (const node of nodes) await bring(node);
  }
  await bring(kept);
  toast(`${key} is back.`);
  await tree.touch(key);
  visit(key);
}
async function copy(text) {
  try { await navigator.clipboard.writeText(text); } catch {      // it needs https, or localhost
    const area = h("textarea");
    area.value = text;
    ($("dialog").open ? $("dialog") : document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied.");
}
const code = text => h("div.code", h("pre", text), button("Copy", "", () => copy(text)));
const shell = text => "'" + text.replace(/'/g, "'\\''") + "'";

function copyAs(key, value) {
  const quoted = JSON.stringify(key), curl = "curl " + (account ? `-u ${shell(account.user)} ` : "") +
    shell(`${server}/v2/keys${encoded(key)}`);
  const login = account ? `, username=${JSON.stringify(account.user)}, password=input()` : "";
  const python = `from pyetcd_client import Client\n\nclient = Client(${JSON.stringify(server)}${login})\n` +
    (value == null ? `for node in client.get(${quoted}).children:\n    print(node.key, node.value)`
      : `print(client.get(${quoted}).value)\nclient.set(${quoted}, ${JSON.stringify(value)})`);
  choose("Copy as …", [h("h3", "curl"), code(curl),
    value != null && code(`${curl} -XPUT --data-urlencode ${shell("value=" + value)}`),
    h("h3", "Python"), code(python)]);
}

// ---- watch

const watch = {events: []};

async function startWatch() {
  const key = cleaned($("watched").value), running = watch.stop;
  if (running) running.abort();
  watch.stop = running && watch.key === key ? null : new AbortController();
  Object.assign(watch, {key, paused: null, trouble: "", seen: 0});
  showWatch();
  if (!watch.stop) return;
  const {signal} = watch.stop, told = text => { watch.trouble = text; showWatch(); };
  for await (const event of changes(key, {since: state.index + 1, recursive: true, signal, told})) {
    event.at = new Date();
    watch.seen++;
    (watch.paused || watch.events).push(event);
    if (watch.events.length > 1000) watch.events.shift();
    if (!watch.paused) addEvent(event);
    else if (watch.paused.length > 1000) watch.paused.shift();
    showWatch();
  }
}
function showWatch() {
  $("start").textContent = watch.stop ? "Stop" : "Watch";
  $("pause").disabled = !watch.stop;
  $("pause").textContent = watch.paused ? `Go on (${watch.paused.length})` : "Pause";
  $("watching").textContent = watch.trouble || (watch.stop
    ? `Watching ${watch.key} and all below it: ${number(watch.seen)} changes so far.`
    : "Every change appears here as soon as it is made.");
}
function addEvent({action, node, at}) {
  const wanted = $("filter").value.toLowerCase(), list = $("events");
  if (!`${action} ${node.key} ${node.value}`.toLowerCase().includes(wanted)) return;
  list.prepend(h("li", h("time", time(at)), badge(action),
    h("a.what", {href: link(node.key)}, node.key), h("code", shorten(node.value)),
    h("span.at", number(node.modifiedIndex))));
  if (list.children.length > 300) list.lastChild.remove();
}
function drawEvents() {
  fill($("events"));
  watch.events.forEach(addEvent);
}

// ---- discovery, users, log

const REGISTRY = "/_etcd/registry";
let discovery = null;

/** When a token was made, which a UUID of version 7 tells; else 0. */
function madeAt(token) {
  const at = parseInt(token.slice(0, 12), 16) / 1000;
  return token[12] === "7" && "89ab".includes(token[16]) && at < clock() + 3600 ? at : 0;
}
const loadTokens = guarded(async () => {
  const tokens = [];
  try {
    for await (const line of lines("ui/keys" + REGISTRY))
      if (Array.isArray(line)) tokens.push(...line.filter(row => row[1]));
  } catch (error) { if (error.code !== 100) throw error; }
  tokens.sort((a, b) => b[5] - a[5]);
  fill($("tokens"), await Promise.all(tokens.slice(0, 24).map(row => tokenCard(row[0]))),
    tokens.length !== Math.min(Math.max(tokens.length, 1), 24) && h("p.empty",
      tokens.length ? "Older ones are not shown." : "No tokens yet."));
});
async function tokenCard(token) {
  const key = `${REGISTRY}/${token}`, [config, all] = await Promise.all([
    readNode(key + "/_config/size").catch(() => ({})), readNode(key).catch(() => ({}))]);
  const total = Number(config.value) || 0, at = madeAt(token), url = `${server}/${token}`;
  const members = (all.nodes || []).filter(node => node.value).sort((a, b) => a.createdIndex - b.createdIndex);
  const missing = Math.max(0, total - members.length);
  const command = `python3 pyetcd.py -name machine${members.length + 1} \\
  -listen-peer-urls http://0.0.0.0:2380 -initial-advertise-peer-urls 'http://$private_ipv4:2380' \\
  -listen-client-urls http://0.0.0.0:2379 -advertise-client-urls 'http://$private_ipv4:2379' \\
  -discovery ${url}`;
  return h("article.card", h("div.bar",
    h("h3", total ? `${members.length} of ${total} registered` : "no size"),
    h("span", {class: "badge " + (missing ? "warn" : "good")}, missing ? `${missing} missing` : "complete"),
    gap(), h("small", at ? `${span(clock() - at)} old` : "age unknown")),
  h("div.slots", members.map(node => h("span.slot", {title: nameOf(node.key)}, node.value)),
    Array.from({length: Math.min(missing, 20)}, () => h("span.slot.missing", "waiting …"))),
  code(url), missing > 0 && h("details", h("summary", "The next member"), code(command)));
}
async function watchTokens(signal) {
  loadTokens();
  for await (const _ of changes(REGISTRY, {since: state.index + 1, recursive: true, signal})) {
    clearTimeout(watchTokens.timer);
    watchTokens.timer = setTimeout(loadTokens, 200);
  }
}
const showAccess = guarded(async () => {
  const view = $("access"), names = list => (list || []).join(", ") || "–";
  fill(view, h("div.card.empty", state.auth ? "Only root may see users and roles."
    : "Users and roles are off. To turn them on: pyetcdctl user add root && pyetcdctl auth enable"));
  if (!state.auth) return;
  const {users} = await json("GET", "v2/auth/users"), {roles} = await json("GET", "v2/auth/roles");
  const table = (heads, rows) => h("div.card.scroll", h("table", [heads, ...rows].map((cells, at) =>
    h("tr", cells.map(cell => h(at ? "td" : "th", {}, cell))))));
  fill(view, h("h2", "Users"), table(["User", "Roles"], (users || []).map(({user, roles}) =>
    [h("b", user), names((roles || []).map(({role}) => role))])),
  h("h2", "Roles"), table(["Role", "May read", "May write"], (roles || []).map(({role, permissions: {kv}}) =>
    [h("b", role), h("code", names(kv.read)), h("code", names(kv.write))])));
});
let logged = [];
const loadLog = guarded(async () => {
  logged = (await json("GET", "ui/log")).lines;
  drawLog();
  if (current === "log") timer = setTimeout(loadLog, 2000);
});
function drawLog() {
  const wanted = $("logfilter").value.toLowerCase(), box = $("lines");
  const kinds = {WARNING: "warn", ERROR: "bad", CRITICAL: "bad"};
  const atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 30;
  fill(box, logged.filter(([, ...words]) => words.join(" ").toLowerCase().includes(wanted))
    .map(([at, kind, from, text]) => h("p", {class: kinds[kind]},
      h("span", time(new Date(at * 1000))), h("span", from), text)));
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// ---- views, keyboard, colours

const VIEWS = ["overview", "keys", "watch", "discovery", "access", "log"];
let current = "", timer = 0, saved = {};
try { saved = localStorage; } catch { /* the browser keeps nothing */ }

function go(view) {
  if (view === current) return;
  current = view;
  declined = false;
  for (const tab of $("tabs").children) {
    show(tab.dataset.view, tab.dataset.view === view);
    tab.ariaCurrent = tab.dataset.view === view ? "page" : null;
  }
  clearTimeout(timer);
  if (discovery) discovery.abort();
  tree.follow();
  if (!state) return;
  if (view === "overview") showState();
  if (view === "keys" && !tree.root.kids) tree.load(tree.root);
  if (view === "keys") tree.drawSoon();
  if (view === "discovery") watchTokens((discovery = new AbortController()).signal);
  if (view === "access") showAccess();
  if (view === "log") loadLog();
}
function route() {
  const [, view, rest] = /^#\/(\w+)(.*)/.exec(location.hash) || [0, "overview", ""];
  let key = "/";
  try { key = cleaned(decodeURIComponent(rest)); } catch { /* no key */ }
  go(VIEWS.includes(view) ? view : "overview");
  if (!state) return;
  if (view === "keys" && (!opened || opened.key !== key)) openKey(key);
  if (view === "watch" && rest && !(watch.stop && watch.key === key)) {
    $("watched").value = key;
    startWatch();
  }
}
function theme(step) {
  const names = ["as the system has them", "light", "dark"], at = ((saved.theme || 0) % 3 + step) % 3;
  saved.theme = at;
  document.documentElement.style.colorScheme = ["light dark", "light", "dark"][at];
  $("theme").textContent = "◐☀☾"[at];
  $("theme").title = "Colours: " + names[at];
}
function tick() {
  for (const node of document.querySelectorAll("[data-expires]"))
    node.textContent = span(node.dataset.expires - clock());
  if (current === "keys") tree.drawSoon();
}
const help = () => choose("Keyboard", h("dl", ["1 – 6", "the views", "/", "search", "n", "new key", "r",
  "load again", "↑ ↓ ← →", "move in the tree", "Enter", "open", "Ctrl S", "save", "t", "colours"]
  .map((text, at) => at % 2 ? h("dd", text) : h("dt", h("kbd", text)))));
function reload() {
  if (tree.root.kids) tree.load(tree.root);
  if (opened) openKey(opened.key);
}
const createHere = guarded(() => {
  const {key, dir} = tree.flat[tree.at] || tree.root;
  return create(cleaned(dir ? key : parentOf(key)).replace(/([^/])$/, "$1/"));
});
function keyboard(event) {
  const {key, target, ctrlKey, metaKey, altKey} = event;
  if ($("dialog").open || ctrlKey || metaKey || altKey || /INPUT|TEXTAREA|SELECT/.test(target.tagName)) return;
  if (VIEWS[key - 1]) location.hash = "#/" + VIEWS[key - 1];
  else if (key === "/") {
    if (current !== "keys") visit(opened ? opened.key : "/");
    go("keys");
    $("query").focus();
  }
  else if (key === "n" && state && state.ui === "true") createHere();
  else if (key === "r" && current === "keys") reload();
  else if (key === "t") theme(1);
  else if (key === "?") help();
  else return;
  event.preventDefault();
}
let typing = 0;
function search() {
  clearTimeout(typing);
  typing = setTimeout(guarded(() => tree.search($("query").value.trim())), 250);
}
for (const view of VIEWS) $("tabs").append(
  h("a", {href: "#/" + view, "data-view": view}, view[0].toUpperCase() + view.slice(1)));
on("theme", "click", () => theme(1));
on("help", "click", help);
on("login", "click", () => logIn());
on("query", "input", search);
on("where", "change", search);
on("hidden", "change", () => { tree.load(tree.root); search(); });
on("reload", "click", reload);
on("create", "click", createHere);
on("tree", "scroll", () => tree.drawSoon());
on("tree", "keydown", event => tree.key(event));
// By place: the row may be drawn again before it is released.
on("tree", "click", ({clientY}) => tree.open(
  Math.floor((clientY - $("space").getBoundingClientRect().top) / tree.high)));
on("start", "click", startWatch);
on("watched", "keydown", ({key}) => { if (key === "Enter") startWatch(); });
on("pause", "click", () => {
  const missed = watch.paused;
  watch.paused = missed ? null : [];
  watch.events = watch.events.concat(missed || []).slice(-1000);
  (missed || []).forEach(addEvent);
  showWatch();
});
on("filter", "input", drawEvents);
on("token", "click", guarded(async () => {
  const url = await (await ask("POST", "new", {form: {size: $("size").value}})).text();
  toast("A new token: " + url, {label: "Copy", act: () => copy(url), seconds: 20});
  loadTokens();
}));
on("logfilter", "input", drawLog);
addEventListener("hashchange", route);
addEventListener("keydown", keyboard);
document.addEventListener("visibilitychange", () => tree.follow());
addEventListener("resize", () => tree.drawSoon());
theme(0);
route();
poll().then(() => { current = ""; route(); });
setInterval(tick, 1000);
