// The charts of loss and speed, drawn by uPlot.

import uPlot from "/uPlot.esm.js";
import { clock, short } from "/story.js";

const MOST_POINTS = 1200;

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
          { ...axis, size: 62, values: (_, ticks) => ticks.map(short) },
        ],
        cursor: { points: { size: 6 } },
        series: [
          { label: this.byTime ? "time" : "step", value: (_, value) => (value == null ? "" : this.byTime ? clock(value) : short(value)) },
          ...this.series.map(([name, tint, options]) => ({
            label: name,
            stroke: color(tint),
            width: 1.6,
            spanGaps: true,
            points: { show: false },
            value: (_, value) => (value == null ? "" : short(value)),
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
    this.rates = new Map();
  }

  restyle(byTime = this.loss.byTime) {
    for (const chart of [this.loss, this.speed]) {
      chart.byTime = byTime;
      chart.build();
    }
  }

  // The story up to that place in its rounds. Of a long one a point stands for several rounds.
  show(story, place) {
    const column = this.loss.byTime ? 1 : 0, tokens = story.run.sample_tokens || 1;
    const stride = Math.max(1, Math.ceil((place + 1) / MOST_POINTS));
    const points = [];
    for (let from = 0; from <= place; from += stride) {
      const to = Math.min(from + stride, place + 1);
      let sum = 0, known = 0;
      for (let each = from; each < to; each++) {
        const loss = story.rounds[each][4];
        if (loss != null) { sum += loss; known += 1; }
      }
      points.push([story.rounds[to - 1][column], known ? sum / known : null, to - 1]);
    }
    const end = story.rounds[place]?.[1] ?? Infinity;
    const evaluations = story.evaluations.filter((row) => row[1] <= end + 1);
    const zlib = evaluations.at(-1)?.[4] ? evaluations.at(-1)[4] * Math.LN2 : null;
    this.loss.show(this.#joined(points, evaluations, column, zlib));

    if (this.known !== story.rounds[0]?.[0]) this.rates.clear();
    this.known = story.rounds[0]?.[0];
    const xs = points.map((point) => point[0]);
    this.speed.show([xs, points.map(([, , last]) => this.#rate(story, last, place) * tokens || null)]);
  }

  // Samples per second there; the newest ones may still change.
  #rate(story, at, last) {
    const step = story.rounds[at][0];
    let rate = this.rates.get(step);
    if (rate === undefined) {
      rate = story.rate(at);
      if (at < last - 64) this.rates.set(step, rate);
    }
    return rate;
  }

  // Columns of rounds and of evaluations, which lie between them.
  #joined(points, evaluations, column, zlib) {
    const out = [[], [], [], [], []], means = smoothed(points.map((point) => point[1]));
    let next = 0;
    const put = (x, loss, mean, heldout) => {
      out[0].push(x); out[1].push(loss); out[2].push(mean); out[3].push(heldout); out[4].push(zlib);
    };
    points.forEach(([x, loss], each) => {
      for (; next < evaluations.length && evaluations[next][column] < x; next++) {
        put(evaluations[next][column], null, null, evaluations[next][2]);
      }
      const same = next < evaluations.length && evaluations[next][column] === x;
      put(x, loss, means[each], same ? evaluations[next++][2] : null);
    });
    for (; next < evaluations.length; next++) put(evaluations[next][column], null, null, evaluations[next][2]);
    return out;
  }
}
