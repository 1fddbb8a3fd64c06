// The picture of the swarm as the monitor sent it, brought up to date by what it sends since. Knows no DOM.

const MOST_ROUNDS = 10000, MOST_PARTS = 12000, MOST_ABORTS = 500, MOST_LINES = 400;

export class Story {
  constructor() {
    this.clear();
  }

  clear() {
    this.run = {};
    this.peers = new Map();
    this.rounds = []; // [step, time, samples, peers, loss, seconds], ascending
    this.at = new Map(); // step → its place in rounds
    this.parts = new Map(); // step → Map(peer → [step, peer, began, compute, wait, reduce, apply, mine])
    this.partCount = 0;
    this.aborts = []; // [began, step, peer, cause, seconds]
    this.evaluations = []; // [step, time, loss, bits, zlib]
    this.samples = [];
    this.log = [];
    this.incidents = [];
    this.clockAhead = 0; // of the monitor's clock, in seconds
    this.replay = "";
  }

  apply(update) {
    if (update.all) this.clear();
    this.clockAhead = update.now - Date.now() / 1000;
    if (update.replay) this.replay = update.replay;
    if (update.run) this.run = update.run;
    if (update.incidents) this.incidents = update.incidents;
    for (const [id, facts] of Object.entries(update.peers ?? {})) this.peers.set(id, facts);
    for (const id of update.forgotten ?? []) this.peers.delete(id);
    for (const row of update.rounds ?? []) this.#round(row);
    for (const part of update.parts ?? []) this.addPart(part);
    this.#append(this.aborts, update.aborts, MOST_ABORTS);
    this.#append(this.evaluations, update.evaluations, 4000);
    this.#append(this.samples, update.samples, 200);
    this.#append(this.log, update.log, MOST_LINES);
    this.#trim();
  }

  #append(list, more, most) {
    if (!more) return;
    list.push(...more);
    if (list.length > most) list.splice(0, list.length - most);
  }

  #round(row) {
    const place = this.at.get(row[0]);
    if (place !== undefined) {
      this.rounds[place] = row;
    } else if (!this.rounds.length || row[0] > this.rounds.at(-1)[0]) {
      this.at.set(row[0], this.rounds.push(row) - 1);
    } else {
      this.rounds.push(row);
      this.rounds.sort((a, b) => a[0] - b[0]);
      this.#index();
    }
  }

  addPart(part) {
    let members = this.parts.get(part[0]);
    if (!members) this.parts.set(part[0], (members = new Map()));
    if (!members.has(part[1])) this.partCount += 1;
    members.set(part[1], part);
  }

  #index() {
    this.at = new Map(this.rounds.map((row, place) => [row[0], place]));
  }

  #trim() {
    if (this.rounds.length > MOST_ROUNDS * 1.05) {
      this.rounds.splice(0, this.rounds.length - MOST_ROUNDS);
      this.#index();
    }
    if (this.partCount > MOST_PARTS * 1.5) {
      for (const step of [...this.parts.keys()].sort((a, b) => a - b)) {
        if (this.partCount <= MOST_PARTS) break;
        this.partCount -= this.parts.get(step).size;
        this.parts.delete(step);
      }
    }
  }

  // Where that step is in `rounds`, or the last one before it; -1: before all.
  place(step) {
    let low = 0, high = this.rounds.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rounds[middle][0] <= step) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  }

  // Samples per second over the minute before that place in `rounds`; null if nobody knows.
  rate(place) {
    const last = this.rounds[place];
    if (!last) return null;
    let first = place, samples = 0;
    while (first > 0 && last[1] - this.rounds[first - 1][1] <= 60) samples += this.rounds[first--][2];
    const seconds = last[1] - this.rounds[first][1];
    return seconds > 0 ? samples / seconds : null;
  }
}

export const now = (story) => Date.now() / 1000 + story.clockAhead;

const grouping = new Intl.NumberFormat("en"), wall = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

// Formatters are made once: `toLocaleString` makes one at each call, which is most of what a large table costs.
export const count = (number) => grouping.format(number);

export function short(number) {
  if (number == null || !isFinite(number)) return "–";
  if (Math.abs(number) >= 1e9) return `${(number / 1e9).toFixed(1)} G`;
  if (Math.abs(number) >= 1e6) return `${(number / 1e6).toFixed(1)} M`;
  if (Math.abs(number) >= 1e4) return `${(number / 1e3).toFixed(1)} k`;
  if (Math.abs(number) >= 100 || Number.isInteger(number)) return count(Math.round(number));
  return number.toPrecision(3);
}

export function span(seconds) {
  if (seconds == null || !isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 100) return `${minutes} min`;
  const hours = Math.round(seconds / 3600);
  return hours < 48 ? `${hours} h` : `${count(Math.round(hours / 24))} d`;
}

export function clock(seconds) {
  return wall.format(seconds * 1000);
}
