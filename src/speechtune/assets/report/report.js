"use strict";
// Draws the plots from the data in the page, and stops other players when one starts; the text stands without this script.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => players.filter((other) => other !== player).forEach((other) => other.pause()));
}

const WIDTH = 440, HEIGHT = 250; // as the page's viewBox says
const LEFT = 58, RIGHT = 428, TOP = 12, BOTTOM = 212;
const COLOURS = 8; // --c0 to --c7 of the style sheet; more lines repeat them
const SOLID = 4; // later lines are dashed, because not everybody can tell eight colours apart
const LOG_FROM = 50; // ratio of greatest to smallest value from which an axis of losses or norms is logarithmic
const MAX_DOTS = 20; // points of a line up to which each is marked

// Texts of the data set go through textContent and setAttribute alone, never through HTML.
const add = (parent, tag, attributes = {}, text = "") => {
  const element = parent.appendChild(document.createElementNS(parent.namespaceURI, tag));
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
};
const short = (value, digits = 3) =>
  value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(digits - 1).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(digits)));
const compact = (value) =>
  Math.abs(value) >= 1e6 && Math.abs(value) < 1e9 ? short(value / 1e6, 6) + "M"
    : Math.abs(value) >= 1e3 && Math.abs(value) < 1e6 ? short(value / 1e3, 6) + "k"
      : Math.abs(value) < 1e-12 ? short(value, 2) : short(value, 4);

// About `count` round numbers between two values.
const linearTicks = (low, high, count = 5) => {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const spacing = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let n = Math.ceil(low / spacing); n <= Math.floor(high / spacing); n++) ticks.push(spacing * n);
  return ticks;
};
// Powers of ten between two values; of many only some, with few also their multiples by 2 and 5.
const logTicks = (low, high) => {
  const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
  const every = Math.max(1, Math.floor((last - first) / 5));
  const powers = [], fine = [];
  for (let n = first; n <= last; n += every) powers.push(Number(`1e${n}`));
  if (powers.length > 2) return powers;
  for (let n = first - 1; n <= last; n++) for (const factor of [1, 2, 5]) fine.push(Number(`${factor}e${n}`));
  return fine.filter((value) => low <= value && value <= high);
};

// Axes that contain all of a plot, the base's lines too; never of zero length.
const makeScale = (lines, mayBeLog) => {
  const points = lines.flatMap((line) => line.points);
  const values = points.flatMap((p) => (p.value === null ? [] : [p.low, p.high])).concat(lines.map((l) => l.base).filter((v) => v !== null));
  const first = points.reduce((least, p) => Math.min(least, p.step), Infinity);
  const last = points.reduce((most, p) => Math.max(most, p.step), first + 1);
  let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const log = mayBeLog && low > 0 && high / low > LOG_FROM;
  if (log) {
    low /= 1.1;
    high *= 1.1;
  } else {
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    low = low >= 0 && low < Math.max(margin, 0.4 * high) ? 0 : low - margin;
    high += margin;
  }
  const place = log ? (value) => Math.log10(Math.max(value, low)) : (value) => value;
  return {
    x: (step) => LEFT + ((step - first) / (last - first)) * (RIGHT - LEFT),
    y: (value) => BOTTOM - ((place(value) - place(low)) / (place(high) - place(low))) * (BOTTOM - TOP),
    xTicks: linearTicks(first, last).filter(Number.isInteger),
    yTicks: log ? logTicks(low, high) : linearTicks(low, high),
  };
};

const drawAxes = (svg, scale) => {
  for (const value of scale.yTicks) {
    const y = scale.y(value);
    add(svg, "line", { class: "grid", x1: LEFT, x2: RIGHT, y1: y, y2: y });
    add(svg, "text", { class: "tick", x: LEFT - 6, y: y + 4, "text-anchor": "end" }, compact(value));
  }
  for (const step of scale.xTicks) {
    add(svg, "text", { class: "tick", x: scale.x(step), y: BOTTOM + 17, "text-anchor": "middle" }, compact(step));
  }
  add(svg, "line", { class: "axis", x1: LEFT, x2: RIGHT, y1: BOTTOM, y2: BOTTOM });
  add(svg, "text", { class: "name", x: (LEFT + RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "step");
};

const drawLine = (svg, line, scale) => {
  if (line.base !== null) {
    const y = scale.y(line.base);
    const base = add(svg, "line", { class: "base " + line.colour, x1: LEFT, x2: RIGHT, y1: y, y2: y });
    add(base, "title", {}, `zero-shot base, ${line.label}: ${short(line.base, 4)}`);
  }
  const segments = [[]]; // runs of points without a gap
  for (const point of line.points) {
    if (point.value !== null) segments.at(-1).push(point);
    else if (segments.at(-1).length) segments.push([]);
  }
  const path = (points, name) => "M" + points.map((p) => scale.x(p.step).toFixed(1) + " " + scale.y(p[name]).toFixed(1)).join("L");
  const drawn = segments.filter((segment) => segment.length);
  for (const segment of drawn) {
    if (segment.every((p) => p.low === p.high)) continue;
    const edge = path(segment, "high") + path([...segment].reverse(), "low").replace("M", "L");
    add(svg, "path", { class: "band " + line.colour, d: edge + "Z" });
  }
  const route = drawn.map((segment) => path(segment, "value")).join("");
  if (route) add(svg, "path", { class: `line ${line.colour} ${line.dashed ? "dashed" : ""}`, d: route });
  for (const p of line.points.length > MAX_DOTS ? [] : drawn.flat()) {
    const dot = add(svg, "circle", { class: "dot " + line.colour, cx: scale.x(p.step), cy: scale.y(p.value), r: 3.5 });
    add(dot, "title", {}, `step ${p.step}, ${line.label}: ${short(p.value, 4)}`);
  }
  for (const step of line.broken) {
    const mark = add(svg, "text", { class: "broken", x: scale.x(step), y: BOTTOM - 3, "text-anchor": "middle" }, "×");
    add(mark, "title", {}, `step ${step}, ${line.label}: NaN or infinite`);
  }
};

const drawLegend = (legend, note, lines) => {
  if (note) add(legend, "li", {}, note);
  for (const line of lines.length > 1 ? lines : []) {
    const item = add(legend, "li", { class: line.colour });
    add(item, "i", line.dashed ? { class: "dash" } : {});
    item.append(line.label);
  }
  const withBase = lines.find((line) => line.base !== null);
  if (withBase) {
    const item = add(legend, "li", { class: withBase.colour });
    add(item, "i", { class: "dot" });
    item.append("zero-shot base" + (lines.length === 1 ? " " + short(withBase.base, 4) : ""));
  }
};

// The values of all lines at the step under the pointer, below the plot.
const readUnderPointer = (svg, cursor, reading, lines, scale) => {
  const read = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const distance = (point) => Math.abs(scale.x(point.step) - x);
    const near = lines.map((line) => line.points.filter((p) => p.value !== null)).map((points) =>
      points.reduce((best, point) => (best && distance(best) <= distance(point) ? best : point), null));
    const place = near.find((point) => point);
    if (!place) return;
    const values = lines.map((line, i) => near[i] && (lines.length > 1 ? line.label + " " : "") + "≈ " + short(near[i].value));
    reading.textContent = "step " + Math.round(place.step).toLocaleString("en") + ": " + values.filter(Boolean).join(", ");
    cursor.setAttribute("x1", scale.x(place.step));
    cursor.setAttribute("x2", scale.x(place.step));
    cursor.classList.add("on");
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", () => { cursor.classList.remove("on"); reading.textContent = ""; });
};

for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const [title, note, mayBeLog, rows] = JSON.parse(figure.dataset.plot);
  const lines = rows.map(([label, number, points, base, broken]) => ({
    label, base, broken, colour: "c" + (number % COLOURS), dashed: number >= SOLID,
    points: points.map(([step, value, low = value, high = value]) => ({ step, value, low, high })),
  }));
  const scale = makeScale(lines, mayBeLog);
  const [legend, svg, reading] = [".legend", ".plot", ".reading"].map((name) => figure.querySelector(name));
  drawLegend(legend, note, lines);
  svg.setAttribute("aria-label", title + " by step");
  drawAxes(svg, scale);
  for (const line of lines) drawLine(svg, line, scale);
  const cursor = add(svg, "line", { class: "cursor", y1: TOP, y2: BOTTOM });
  readUnderPointer(svg, cursor, reading, lines, scale);
}
