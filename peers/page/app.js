// The page: what the monitor tells, put where it is to be seen. Texts are strangers' and only ever set as text.

import { Charts } from "/charts.js";
import { Story, clock, count, now, short, span } from "/story.js";
import { Timeline } from "/timeline.js";

const $ = (id) => document.getElementById(id);
const story = new Story();
const charts = new Charts($("loss-chart"), $("speed-chart"));
const timeline = new Timeline($("timeline"), $("round-detail"), $("more-rows"));
const STATES = {
  joining: "joining", catching_up: "catching up", accumulating: "training", averaging: "training", paused: "paused",
  leaving: "leaving", left: "left", gone: "gone", unknown: "no answer", bootstrap: "bootstrap",
};
const PHASES = { training: ["▶", ""], waiting: ["◔", "warn"], paused: ["❚❚", "warn"], empty: ["○", "warn"], looking: ["…", "quiet"], complete: ["✔", ""] };

let back = null; // the step that is looked back at; null: live
let drawn = false;

const shown = new WeakMap(); // what a node says; to ask the node itself takes longer

function set(node, text) {
  if (shown.get(node) === text) return;
  shown.set(node, text);
  node.textContent = text;
}

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

// -- drawing ------------------------------------------------------------------------------------------------

function draw() {
  drawn = false;
  const place = back === null ? story.rounds.length - 1 : story.place(back);
  const row = story.rounds[place];
  figures(row, place);
  incidents();
  if (!document.hidden) {
    charts.show(story, place);
    timeline.show(story, back ?? Infinity);
  }
  peers();
  sample(row);
  log(row);
  slider(place);
}

function redraw() {
  if (!drawn) {
    drawn = true;
    requestAnimationFrame(draw);
  }
}

function figures(row, place) {
  const run = story.run;
  const step = back === null ? run.step : row?.[0];
  document.title = `${run.id || "p2ptrain"}${step ? ` · step ${count(step)}` : ""}`;
  set($("run-name"), run.id || "p2ptrain");
  const [sign, tone] = PHASES[run.phase] ?? ["…", "quiet"];
  set($("phase"), back === null ? `${sign} ${run.phase ?? "connecting"}${run.why ? `: ${run.why}` : ""}` : "◀ looking back");
  $("phase").className = `badge ${back === null ? tone : "warn"}`;
  set($("step"), step == null ? "–" : count(step));
  set($("of"), run.total_steps ? `of ${count(run.total_steps)}` : "");
  const share = run.total_steps ? Math.min(100, (100 * (step ?? 0)) / run.total_steps) : 0;
  $("progress").firstElementChild.style.width = `${share}%`;
  $("progress").setAttribute("aria-valuenow", share.toFixed(0));
  const recent = story.rounds.slice(Math.max(0, place - 9), place + 1).map((each) => each[4]).filter((loss) => loss != null);
  set($("loss"), recent.length ? (recent.reduce((sum, loss) => sum + loss, 0) / recent.length).toFixed(3) : "–");
  set($("loss-note"), recent.length > 1 ? `mean of ${recent.length} steps` : "");
  const end = back === null ? Infinity : row?.[1] ?? 0;
  const evaluation = story.evaluations.findLast((each) => each[1] <= end + 1);
  set($("bits"), evaluation?.[3] != null ? evaluation[3].toFixed(2) : "–");
  set($("bits-note"), evaluation?.[4] != null ? `${evaluation[3] < evaluation[4] ? "✔ beats" : "not yet"} zlib at ${evaluation[4].toFixed(2)}` : "held-out text");
  const rate = back === null ? run.samples_per_second : story.rate(place);
  set($("speed"), short(rate == null ? null : Math.round(rate * (run.sample_tokens || 1))));
  set($("speed-note"), rate ? `${short(rate)} samples/s` : "");
  set($("whole"), back === null && run.samples ? `${short(run.samples * (run.sample_tokens || 1))} tokens so far` : "");
  const training = [...story.peers.values()].filter((peer) => peer.role === "train" && !["left", "gone"].includes(peer.state));
  const paused = training.filter((peer) => peer.state === "paused").length;
  set($("peers-count"), back === null ? `${training.length - paused}` : `${row?.[3] ?? "–"}`);
  set($("peers-note"), back === null ? (paused ? `and ${paused} paused` : row ? `${row[3]} in the last round` : "") : "in that round");
  ago();
}

function ago() {
  const run = story.run;
  if (back !== null) {
    const row = story.rounds[story.place(back)];
    set($("ago"), row ? clock(row[1]) : "–");
    set($("eta"), "");
  } else {
    const seconds = run.last_commit ? Math.max(now(story) - run.last_commit, 0) : null;
    set($("ago"), seconds == null ? "–" : story.replay ? clock(run.last_commit) : seconds < 1.5 ? "now" : `${span(Math.round(seconds))} ago`);
    set($("eta"), run.eta_seconds ? `${span(run.eta_seconds)} to go` : "");
  }
}

function incidents() {
  $("incidents-card").hidden = !story.incidents.length;
  const key = JSON.stringify(story.incidents);
  if ($("incidents").key === key) return;
  $("incidents").key = key;
  $("incidents").replaceChildren(...story.incidents.map((each) => {
    const item = make("li", each.level);
    item.append(make("b", "", each.level === "error" ? "✕ Error" : "⚠ Warning"), each.what, make("span", "", `→ ${each.remedy} · since ${clock(each.since)}`));
    return item;
  }));
}

const AT_ONCE = 25; // rows out of sight that are brought up to date at a time
const rows = new Map();
const inSight = new Set();
let sorted = 0, turn = 0;
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) inSight.add(entry.target);
    else inSight.delete(entry.target);
  }
  redraw();
}, { root: $("peers").parentElement, rootMargin: "150px" });

function peerRow(id) {
  const line = make("tr");
  const who = make("td", "who"), state = make("td"), share = make("td");
  const name = make("b"), tail = make("span"), word = make("span"), why = make("span", "why");
  who.append(name, tail);
  state.append(word, why);
  const box = make("div", "share"), bar = make("div", "bar"), part = make("i"), figure = make("span");
  bar.append(part);
  box.append(bar, figure);
  share.append(box);
  const cells = ["n", "n", "n", "n", "", ""].map((kind) => make("td", kind));
  line.append(who, state, share, ...cells);
  const made = { line, name, tail, who, word, why, bar, part, figure, cells, facts: null, total: 0 };
  rows.set(id, made);
  sight.observe(line);
  return made;
}

function peers() {
  const body = $("peers").tBodies[0];
  const all = [...story.peers.values()];
  const total = all.reduce((sum, peer) => sum + peer.samples, 0);
  for (const [id, row] of rows) {
    if (!story.peers.has(id)) {
      sight.unobserve(row.line);
      inSight.delete(row.line);
      row.line.remove();
      rows.delete(id);
    }
  }
  let fresh = false;
  turn = turn + AT_ONCE < all.length ? turn + AT_ONCE : 0;
  for (const [place, peer] of all.entries()) {
    let row = rows.get(peer.id);
    if (row && !inSight.has(row.line) && !(place >= turn && place < turn + AT_ONCE)) continue;
    if (!row) {
      row = peerRow(peer.id);
      body.append(row.line);
      fresh = true;
    }
    if (row.facts === peer && Math.abs(row.total - total) < 0.001 * total) continue;
    row.facts = peer;
    row.total = total;
    const away = ["left", "gone"].includes(peer.state);
    row.line.className = away ? "away" : "";
    set(row.name, peer.name || peer.short);
    set(row.tail, peer.name ? peer.short : "");
    row.who.title = `${peer.name} ${peer.id}`;
    set(row.word, STATES[peer.state] ?? peer.state);
    set(row.why, peer.pauses.join(" and ") || (!peer.answered && peer.why && !away ? `✕ ${peer.why}` : peer.waiting ? `waiting: ${peer.waiting}` : ""));
    const share = total ? (100 * peer.samples) / total : 0;
    row.bar.hidden = peer.role !== "train";
    row.part.style.width = `${share}%`;
    set(row.figure, peer.role === "train" ? `${share.toFixed(share < 10 ? 1 : 0)} % · ${short(peer.samples)}` : "");
    const [step, given, speed, traffic, reach, version] = row.cells;
    set(step, peer.role === "train" ? count(peer.step) : "");
    set(given, peer.role === "train" ? count(peer.rounds) : "");
    set(speed, away || peer.speed == null ? "" : short(peer.speed));
    set(traffic, away || peer.up == null ? "" : `${bits(peer.up)} · ${bits(peer.down)}`);
    set(reach, away || peer.hidden == null ? "" : `${peer.hidden ? "behind NAT" : "reachable"}${peer.relay ? `, ${peer.relay} by relay` : ""}`);
    set(version, peer.version || (peer.protocol ? `protocol ${peer.protocol}` : ""));
  }
  if (fresh || performance.now() - sorted > 3000) {
    sorted = performance.now();
    const rank = (peer) => (peer.role === "train" ? 0 : 1);
    const order = all.sort((a, b) => rank(a) - rank(b) || b.samples - a.samples || (a.id < b.id ? -1 : 1));
    let next = body.firstElementChild;
    for (const peer of order) {
      const line = rows.get(peer.id).line;
      if (line === next) next = next.nextElementSibling;
      else body.insertBefore(line, next);
    }
  }
}

const bits = (bytes) => `${short(+((bytes * 8) / 1e6).toPrecision(2))} Mbit/s`;

function sample(row) {
  const found = back === null ? story.samples.at(-1) : story.samples.findLast((each) => each.time <= (row?.[1] ?? 0) + 1);
  set($("sample"), found ? found.text.trim() || "(blanks)" : "nothing yet");
  set($("sample-note"), found ? `at step ${count(found.step)}, ${clock(found.time)}` : "");
}

function log(row) {
  const end = back === null ? Infinity : row?.[1] ?? 0;
  const warnings = $("only-warnings").checked;
  const lines = story.log.filter((line) => line.time <= end + 0.5 && (!warnings || line.level !== "info")).slice(-120).reverse();
  const list = $("log");
  const wanted = new Set(lines.map((line) => String(line.number)));
  for (const node of [...list.children]) if (!wanted.has(node.dataset.number)) node.remove();
  let place = list.firstElementChild;
  for (const line of lines) {
    if (place?.dataset.number === String(line.number)) {
      place = place.nextElementSibling;
      continue;
    }
    const item = make("li", line.level);
    item.dataset.number = line.number;
    const facts = story.peers.get(line.peer);
    const text = make("span", "text");
    if (line.level !== "info") text.append(make("span", "mark", line.level === "error" ? "✕ error: " : "⚠ warning: "));
    text.append(line.text);
    item.append(make("time", "", clock(line.time)), make("span", "from", facts?.name || facts?.short || `…${line.peer.slice(-8)}`), text);
    list.insertBefore(item, place);
  }
  if (!lines.length && !list.children.length) list.append(make("li", "", "nothing yet"));
}

function slider(place) {
  const input = $("slider"), last = Math.max(story.rounds.length - 1, 0);
  if (+input.max !== last) input.max = last;
  if (back === null && +input.value !== last) input.value = last;
  const row = story.rounds[place];
  const text = back === null ? (story.replay ? "end of the journal" : "live") : row ? `step ${row[0].toLocaleString("en")}, ${clock(row[1])}` : "before the first";
  set($("slider-note"), text);
  input.setAttribute("aria-valuetext", text);
  $("live").disabled = back === null;
}

// -- the person ---------------------------------------------------------------------------------------------

let asked = 0;

async function lookBack(step) {
  back = step;
  redraw();
  if (step === null || story.parts.has(step)) return;
  const mine = ++asked;
  await new Promise((resume) => setTimeout(resume, 150)); // while the slider is moving
  if (mine !== asked) return;
  try {
    const answer = await fetch(`/api/v1/timeline?until=${step}&count=40`);
    for (const part of (await answer.json()).parts) story.addPart(part);
  } catch {
    return; // the monitor is away; what is here is shown
  }
  redraw();
}

$("slider").addEventListener("input", (event) => {
  const place = +event.target.value;
  lookBack(place >= story.rounds.length - 1 ? null : story.rounds[place][0]);
});
$("live").addEventListener("click", () => lookBack(null));
$("only-warnings").addEventListener("change", redraw);
for (const button of document.querySelectorAll("[data-axis]")) {
  button.addEventListener("click", () => {
    for (const each of document.querySelectorAll("[data-axis]")) each.setAttribute("aria-pressed", String(each === button));
    charts.restyle(button.dataset.axis === "time");
    redraw();
  });
}
const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
function restyle() {
  timeline.restyle();
  charts.restyle();
}
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  restyle();
});
if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("join").textContent);
    set($("copy"), "Copied");
  } catch {
    getSelection().selectAllChildren($("join"));
    set($("copy"), "Selected: copy it");
  }
  setTimeout(() => set($("copy"), "Copy the command"), 2000);
});

// -- the monitor --------------------------------------------------------------------------------------------

function link(text, tone = "quiet") {
  set($("link"), text);
  $("link").className = `badge ${tone}`;
}

function follow(id) {
  const source = new EventSource(`/api/v1/events?after=${encodeURIComponent(id)}`);
  source.onopen = () => link(story.replay ? `replay of ${story.replay}` : "● live");
  source.onmessage = (message) => {
    story.apply(JSON.parse(message.data));
    redraw();
  };
  source.onerror = () => {
    link("⚠ the monitor does not answer; trying again", "warn");
    if (source.readyState === EventSource.CLOSED) setTimeout(start, 2000);
  };
}

async function start() {
  let state;
  try {
    state = await (await fetch("/api/v1/state")).json();
  } catch {
    link("⚠ the monitor does not answer; trying again", "warn");
    setTimeout(start, 2000);
    return;
  }
  story.apply(state);
  if (state.invite) {
    $("join-card").hidden = false;
    set($("join"), `p2ptrain join ${state.invite}`);
    if (!$("qr").src) $("qr").src = "/qr.svg";
  }
  redraw();
  follow(state.id);
}

setInterval(ago, 1000);
start();
