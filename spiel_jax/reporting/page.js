"use strict";

// The button goes from the system's theme to the other one, and back.
const root = document.documentElement;
const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");
function show(theme) {
  if (theme === "auto") root.removeAttribute("data-theme");
  else root.setAttribute("data-theme", theme);
  button.textContent = "theme: " + theme;
}
let theme = "auto";
try { theme = localStorage.getItem("spiel_jax theme") || "auto"; } catch { /* a page of a disk may keep nothing */ }
if (!themes.includes(theme)) theme = "auto";
show(theme);
button.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  show(theme);
  try { localStorage.setItem("spiel_jax theme", theme); } catch { /* likewise */ }
});

// Of some charts one is shown at a time.
for (const select of document.querySelectorAll("select.choice")) {
  const charts = select.closest(".card").querySelectorAll(".one");
  const choose = () => charts.forEach((chart, number) => { chart.hidden = number !== select.selectedIndex; });
  select.addEventListener("change", choose);
  choose();
}

// Values under the pointer: each chart is followed by its numbers.
const tip = document.getElementById("tip");
function nearest(line, x, before) {
  let best = -1;
  line.x.forEach((at, number) => {
    if (line.y[number] === null || (before && at > x)) return;
    if (best < 0 || Math.abs(at - x) <= Math.abs(line.x[best] - x)) best = number;
  });
  return best;
}
function ofLines(data, x) {
  const value = data.x[0] + x * (data.x[1] - data.x[0]);
  const found = data.lines.map((line) => [line, nearest(line, value, data.kind === "steps")]).filter((pair) => pair[1] >= 0);
  if (!found.length) return null;
  const at = found.map(([line, number]) => line.x[number]).reduce((a, b) => (Math.abs(a - value) <= Math.abs(b - value) ? a : b));
  const rows = found.filter(([line, number]) => line.x[number] === at || data.lines.length > 1)
    .filter(([line, number]) => data.kind !== "steps" || line.y[number] > 0)
    .map(([line, number]) => {
      const beside = line.x[number] === at ? "" : " (at " + line.x[number] + ")";
      return line.name + ": " + line.y[number].toLocaleString("en", { maximumSignificantDigits: 5 }) + data.unit + beside;
    });
  if (data.kind === "steps") rows.reverse();
  return [data.label + " " + at + "\n" + rows.join("\n"), (at - data.x[0]) / (data.x[1] - data.x[0])];
}
function ofBars(data, x) {
  const bin = Math.min(Math.floor(x * data.names.length), data.names.length - 1);
  return [data.names[bin] + "\n" + data.texts[bin], null];
}
function ofGrid(data, x, y) {
  const row = Math.min(Math.floor(y * data.rows.length), data.rows.length - 1);
  const column = Math.min(Math.floor(x * data.columns.length), data.columns.length - 1);
  const text = data.texts[row * data.columns.length + column];
  return text ? [data.rows[row] + ", " + data.columns[column] + "\n" + text + data.unit, null] : null;
}
for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.nextElementSibling.textContent);
  const guide = chart.querySelector(".guide");
  const [left, top, width, height] = data.box;
  const leave = () => { tip.style.display = "none"; guide.setAttribute("d", ""); };
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / box.width;
    const x = ((event.clientX - box.left) * scale - left) / width;
    const y = ((event.clientY - box.top) * scale - top) / height;
    if (x < -0.02 || x > 1.02 || y < 0 || y > 1) return leave();
    const inside = Math.min(Math.max(x, 0), 1);
    const found = data.kind === "grid" ? ofGrid(data, inside, y) : data.kind === "bars" ? ofBars(data, inside) : ofLines(data, inside);
    if (!found) return leave();
    guide.setAttribute("d", found[1] === null ? "" : "M" + (left + found[1] * width) + " " + top + "v" + height);
    tip.textContent = found[0];
    tip.style.display = "block";
    const space = tip.getBoundingClientRect();
    const beyond = event.clientX + 16 + space.width > innerWidth;
    tip.style.left = (beyond ? event.clientX - 16 - space.width : event.clientX + 16) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - space.height - 6)) + "px";
  });
}
