// The charts of loss and speed, drawn by uPlot.

import uPlot from "/uPlot.esm.js";
import { short } from "/story.js";

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function smoothed(values, weight = 0.1) {
  let mean = null;
  return values.map((value) => (value == null ? mean : (mean = mean == null ? value : mean + weight * (value - mean))));
}

class Chart {
  constructor(place, label, series) {
    this.place = place;
    this.label = label;
    this.series = series;
    this.byTime = false;
    this.columns = null;
    new ResizeObserver(() => this.#fit()).observe(place);
  }

  #size() {
    return { width: Math.max(this.place.clientWidth, 200), height: 215 };
  }

  #fit() {
    const size = this.#size();
    if (this.plot && size.width !== this.plot.width) this.plot.setSize(size);
  }

  // Anew, with the colours and the axis as they are now.
  build() {
    this.plot?.destroy();
    const axis = { stroke: color("soft"), grid: { stroke: color("grid"), width: 1 }, ticks: { stroke: color("grid") } };
    this.place.replaceChildren();
    this.plot = new uPlot(
      {
        ...this.#size(),
        scales: { x: { time: this.byTime } },
        axes: [
          { ...axis, size: 34, values: this.byTime ? undefined : (_, ticks) => ticks.map(short) },
          { ...axis, size: 52, values: (_, ticks) => ticks.map(short) },
        ],
        cursor: { points: { size: 6 } },
        series: [
          { label: this.byTime ? "time" : "step", value: this.byTime ? undefined : (_, value) => short(value) },
          ...this.series.map(([name, tint, options]) => ({
            label: name,
            stroke: color(tint),
            width: 1.6,
            spanGaps: true,
            points: { show: false },
            value: (_, value) => (value == null ? "–" : short(value)),
            ...options?.(color),
          })),
        ],
      },
      this.columns ?? [[], ...this.series.map(() => [])],
      this.place,
    );
    const canvas = this.place.querySelector("canvas");
    canvas?.setAttribute("role", "img");
    canvas?.setAttribute("aria-label", this.label);
  }

  show(columns) {
    this.columns = columns;
    if (this.plot) this.plot.setData(columns);
    else this.build();
  }
}

export class Charts {
  constructor(lossPlace, speedPlace) {
    this.loss = new Chart(lossPlace, "Loss over the run; the figures above say where it is now", [
      ["training", "baseline", () => ({ width: 1, alpha: 0.45 })],
      ["smoothed", "train", () => ({ width: 2.2 })],
      ["held out", "heldout", (tint) => ({ width: 2, dash: [7, 4], points: { show: true, size: 6, fill: tint("heldout") } })],
      ["zlib -9", "baseline", () => ({ width: 1.4, dash: [2, 4] })],
    ]);
    this.speed = new Chart(speedPlace, "Tokens per second over the run; the figures above say how fast it is now", [
      ["tokens/s", "train", () => ({ width: 2, fill: `${color("train")}22` })],
    ]);
    this.rates = [];
    this.ratesUpTo = -1;
  }

  restyle(byTime = this.loss.byTime) {
    for (const chart of [this.loss, this.speed]) {
      chart.byTime = byTime;
      chart.build();
    }
  }

  // The story up to that place in its rounds.
  show(story, place) {
    const rounds = place === story.rounds.length - 1 ? story.rounds : story.rounds.slice(0, place + 1);
    const column = this.loss.byTime ? 1 : 0;
    const xs = rounds.map((row) => row[column]);
    const losses = rounds.map((row) => row[4]);
    const end = rounds.at(-1)?.[1] ?? Infinity;
    const evaluations = story.evaluations.filter((row) => row[1] <= end + 1);
    const zlib = evaluations.at(-1)?.[4];
    const line = zlib ? xs.map(() => zlib * Math.LN2) : xs.map(() => null);
    const main = [xs, losses, smoothed(losses), xs.map(() => null), line];
    this.loss.show(evaluations.length ? this.#joined(main, evaluations, column, zlib) : main);

    const tokens = story.run.sample_tokens || 1;
    const first = rounds[0]?.[0];
    if (first !== this.ratesFrom || story.rates !== this.rates) { this.rates = story.rates = []; this.ratesFrom = first; }
    for (let each = Math.max(0, Math.min(this.rates.length, rounds.length) - 64); each < rounds.length; each++) {
      const rate = story.rate(each);
      this.rates[each] = rate == null ? null : rate * tokens;
    }
    this.speed.show([xs, this.rates.slice(0, xs.length)]);
  }

  // Evaluations lie between rounds: the columns with a row for each of them, too.
  #joined([xs, losses, means, , line], evaluations, column, zlib) {
    const out = [[], [], [], [], []];
    let next = 0;
    const put = (...values) => values.forEach((value, place) => out[place].push(value));
    for (let each = 0; each < xs.length; each++) {
      while (next < evaluations.length && evaluations[next][column] < xs[each]) {
        const row = evaluations[next++];
        put(row[column], null, null, row[2], zlib ? zlib * Math.LN2 : null);
      }
      if (next < evaluations.length && evaluations[next][column] === xs[each]) {
        put(xs[each], losses[each], means[each], evaluations[next++][2], line[each]);
      } else put(xs[each], losses[each], means[each], null, line[each]);
    }
    while (next < evaluations.length) {
      const row = evaluations[next++];
      put(row[column], null, null, row[2], zlib ? zlib * Math.LN2 : null);
    }
    return out;
  }
}
