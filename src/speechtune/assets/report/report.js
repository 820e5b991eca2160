"use strict";
// Everything stands without this script; it stops other players when one starts and reads curves under the pointer.
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  player.addEventListener("play", () => players.filter((other) => other !== player).forEach((other) => other.pause()));
}
const short = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3))));
for (const plot of document.querySelectorAll("svg.plot")) {
  const axis = {};
  for (const [name, text] of Object.entries(plot.dataset)) axis[name] = Number(text);
  const cursor = plot.querySelector(".cursor");
  const reading = plot.parentElement.querySelector(".reading");
  let lines = null;
  const parse = () => [...plot.querySelectorAll("path.line")].map((path) => ({
    label: path.dataset.label,
    points: path.getAttribute("d").slice(1).split(/[ML]/).map((pair) => pair.split(" ").map(Number)),
  }));
  const valueAt = (y) => {
    const share = (axis.bottom - y) / (axis.bottom - axis.top);
    return axis.log ? axis.low * (axis.high / axis.low) ** share : axis.low + (axis.high - axis.low) * share;
  };
  const read = (event) => {
    lines = lines || parse();
    if (!lines.length) return;
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
    const near = (points) => points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    const found = lines.map((line) => [line.label, near(line.points)]);
    const place = near(found.map(([, point]) => point))[0];
    const step = axis.first + ((place - axis.left) / (axis.right - axis.left)) * (axis.last - axis.first);
    const values = found.map(([label, point]) => (lines.length > 1 ? label + " " : "") + "≈ " + short(valueAt(point[1])));
    reading.textContent = "step " + Math.round(step).toLocaleString("en") + ": " + values.join(", ");
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.classList.add("on");
  };
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", () => { cursor.classList.remove("on"); reading.textContent = ""; });
}
