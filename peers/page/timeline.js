// What each peer did in the last rounds: a row for each, a bar for each round. Failures are marked, not only red.

import { clock, count, short, span } from "/story.js";

const ROW = 22, TOP = 4, AXIS = 20, FEW_ROWS = 16, ROUNDS = 40;
const PARTS = [["compute", 3], ["wait", 4], ["reduce", 5], ["apply", 6]];

export class Timeline {
  constructor(canvas, detail, more) {
    Object.assign(this, { canvas, detail, more, chosen: null, all: false, hits: [] });
    this.words = {};
    this.names = {};
    new ResizeObserver(() => this.redraw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    more.addEventListener("click", () => { this.all = !this.all; this.redraw(); });
  }

  restyle() {
    this.words = {};
    this.redraw();
  }

  #color(name) {
    return (this.words[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  }

  show(story, until) {
    Object.assign(this, { story, until });
    this.redraw();
  }

  redraw() {
    const { story, canvas } = this;
    if (!story) return;
    const known = [...story.parts.keys()].filter((step) => step <= this.until).sort((a, b) => a - b);
    const steps = known.slice(-ROUNDS);
    const peers = this.#peers(steps);
    const rows = this.all ? peers : peers.slice(0, FEW_ROWS);
    const place = new Map(rows.map((peer, row) => [peer, row]));
    // Of the rows that are shown alone: of a large swarm the others are most of what there is to look at.
    const parts = [];
    for (const step of steps) {
      const members = story.parts.get(step);
      for (const peer of rows) {
        const part = members.get(peer);
        if (part) parts.push(part);
      }
    }
    let began = Infinity, ended = -Infinity;
    for (const part of parts) {
      began = Math.min(began, part[2]);
      ended = Math.max(ended, part[2] + part[3] + part[4] + part[5] + part[6]);
    }
    const aborts = story.aborts.filter((row) => row[0] >= began && row[0] <= ended + 60);
    if (Object.keys(this.names).length > 2000) this.names = {};
    this.more.hidden = peers.length <= FEW_ROWS;
    this.more.textContent = this.all ? "Show fewer peers" : `Show all ${peers.length} peers`;

    const height = TOP + Math.max(rows.length, 1) * ROW + AXIS, width = canvas.clientWidth;
    const scale = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.style.height = `${height}px`;
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    this.hits = [];
    this.steps = steps;
    if (!parts.length) {
      pen.fillStyle = this.#color("soft");
      pen.fillText("no round yet", 4, TOP + ROW / 2);
      return;
    }
    const names = Math.min(150, width * 0.28);
    const seconds = Math.max(ended - began, 0.001);
    const x = (at) => names + ((at - began) / seconds) * (width - names - 4);
    this.#axis(pen, x, began, seconds, width, names, TOP + rows.length * ROW);
    rows.forEach((peer, row) => {
      const y = TOP + row * ROW;
      pen.fillStyle = this.#color("ink");
      pen.fillText(this.#clipped(pen, this.#name(peer), names - 10), 2, y + ROW / 2);
      pen.fillStyle = this.#color("line");
      pen.fillRect(names, y + ROW - 1, width - names, 1);
    });
    for (const [name, column] of PARTS) {
      pen.fillStyle = this.#color(name);
      for (const part of parts) {
        const row = place.get(part[1]);
        let from = part[2];
        for (let before = 3; before < column; before++) from += part[before];
        const left = x(from), right = x(from + part[column]);
        const thin = name === "wait" ? 6 : 3;
        pen.fillRect(left, TOP + row * ROW + thin, Math.max(right - left - 0.4, 0.3), ROW - 2 * thin - 1);
      }
    }
    for (const part of parts) {
      const row = place.get(part[1]);
      this.hits.push([x(part[2]), x(part[2] + part[3] + part[4] + part[5] + part[6]), row, part[0]]);
    }
    for (const [at, step, peer, cause, took] of aborts) {
      const row = place.get(peer);
      if (row === undefined) continue;
      const left = x(at), right = Math.max(x(at + took), left + 4), y = TOP + row * ROW;
      pen.fillStyle = this.#color("failed");
      pen.fillRect(left, y + 3, right - left, ROW - 7);
      pen.fillText("✕", left - 1, y + 4);
      this.hits.push([left - 6, right + 6, row, step, cause]);
    }
    if (this.chosen !== null) this.#mark(pen, height);
    this.#describe();
  }

  // Those that took part in one of these steps or failed at one, who gave most first.
  #peers(steps) {
    const seen = new Set();
    for (const step of steps) for (const peer of this.story.parts.get(step).keys()) seen.add(peer);
    for (const [, step, peer] of this.story.aborts) if (step >= steps[0] && step <= steps.at(-1) + 1) seen.add(peer);
    return [...seen].sort((a, b) => (this.story.peers.get(b)?.samples ?? 0) - (this.story.peers.get(a)?.samples ?? 0) || (a < b ? -1 : 1));
  }

  #name(peer) {
    const facts = this.story.peers.get(peer);
    return facts?.name || facts?.short || `…${peer.slice(-8)}`;
  }

  #clipped(pen, text, width) {
    const key = `${width} ${text}`;
    return (this.names[key] ??= this.#cut(pen, text, width));
  }

  #cut(pen, text, width) {
    let shown = text;
    while (shown.length > 1 && pen.measureText(shown).width > width) shown = `${shown.slice(0, -2)}…`;
    return shown;
  }

  #axis(pen, x, began, seconds, width, names, y) {
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600];
    const most = Math.max(2, Math.floor((width - names) / 110));
    const tick = steps.find((each) => seconds / each <= most) ?? seconds / most;
    pen.fillStyle = this.#color("soft");
    for (let at = Math.ceil(began / tick) * tick; at <= began + seconds; at += tick) {
      pen.fillRect(x(at), y, 1, 4);
      const text = clock(at) + (tick < 1 ? `.${Math.round((at % 1) * 10)}` : "");
      if (x(at) + pen.measureText(text).width < width) pen.fillText(text, x(at) + 3, y + 11);
    }
  }

  #mark(pen, height) {
    const mine = this.hits.filter((hit) => hit[3] === this.chosen);
    if (!mine.length) return;
    const left = Math.min(...mine.map((hit) => hit[0])), right = Math.max(...mine.map((hit) => hit[1]));
    pen.strokeStyle = this.#color("ink");
    pen.lineWidth = 1.5;
    pen.strokeRect(left - 1, 1, Math.max(right - left + 2, 4), height - AXIS);
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, row = Math.floor((event.clientY - box.top - TOP) / ROW);
    const near = this.hits.filter((hit) => hit[2] === row && x >= hit[0] - 2 && x <= hit[1] + 2).at(-1);
    if (near && near[3] !== this.chosen) {
      this.chosen = near[3];
      this.redraw();
    }
  }

  #key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity, Escape: 0 }[event.key];
    if (move === undefined || !this.steps?.length) return;
    event.preventDefault();
    if (event.key === "Escape") this.chosen = null;
    else {
      const from = this.chosen === null ? this.steps.length : this.steps.indexOf(this.chosen);
      this.chosen = this.steps[Math.max(0, Math.min(this.steps.length - 1, from + move))];
    }
    this.redraw();
  }

  #describe() {
    let text = "Point at a round, or choose one with the arrow keys.";
    if (this.chosen !== null) {
      const row = this.story.rounds[this.story.at.get(this.chosen)];
      const parts = [...(this.story.parts.get(this.chosen)?.values() ?? [])];
      const slow = parts.reduce((worst, part) => (!worst || part[3] > worst[3] ? part : worst), null);
      const failed = this.story.aborts.filter((each) => each[1] === this.chosen);
      text = `Step ${count(this.chosen)}`;
      if (row) text += `: ${short(row[2])} samples of ${row[3]} peers, averaged in ${span(row[5])}`;
      if (parts.length) {
        const mean = (column) => parts.reduce((sum, part) => sum + part[column], 0) / parts.length;
        text += `; on the mean, compute ${span(mean(3))}, wait ${span(mean(4))}, reduce ${span(mean(5))}, commit and apply ${span(mean(6))}`;
        if (parts.length > 1) text += `; longest at work: ${this.#name(slow[1])}, ${span(slow[3])}`;
      }
      for (const each of failed.slice(0, 3)) text += `. ✕ Failed at ${this.#name(each[2])} after ${span(each[4])}: ${each[3].replaceAll("_", " ")}`;
    }
    if (this.detail.textContent !== text) this.detail.textContent = text;
  }
}
