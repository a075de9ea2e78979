"use strict";
// Draws the figures, sorts and filters the tables, and lets one look at a quantizer at a time.

const DATA = JSON.parse(document.getElementById("data").textContent);
const OPTIONS = {responsive: true, displayModeBar: false};
const GREY = "#7d8590", LINES = "rgba(128, 128, 128, 0.22)", LEVEL = "#d0245e", CLEAR = "rgba(0, 0, 0, 0)";
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

for (const swatch of all("[data-colour]")) swatch.style.background = swatch.dataset.colour;

// The element has the figure's height, so that a change of the window's size changes the width alone.
function show(div, data, {height, ...layout}) {
  div.style.height = `${height}px`;
  Plotly.react(div, data, {...layout, autosize: true}, OPTIONS);
}
for (const div of all("[data-figure]")) {
  const {data, layout} = DATA.figures[div.dataset.figure];
  show(div, data, layout);
}

// A click on a cell of a confusion matrix shows some of its images.
for (const div of all("[data-examples]")) {
  const examples = DATA.examples[Number(div.dataset.examples)], place = div.parentNode.querySelector(".examples");
  div.on("plotly_click", ({points: [point]}) => {
    const found = examples[`${point.y},${point.x}`] ?? [];
    const note = document.createElement("span");
    note.innerHTML = `${point.customdata} `;
    place.replaceChildren(note, ...found.map((picture) => Object.assign(new Image(96), {
      src: `data:image/png;base64,${picture}`, alt: note.textContent,
    })));
  });
}

// Tables ---------------------------------------------------------------------------------------------

function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const heads = [...head.parentNode.children], column = heads.indexOf(head);
  const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const key = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([one], [two]) => {
    if (one === "" || two === "") return (one === "") - (two === ""); // empty ones stay last
    const difference = Number(one) - Number(two);
    return direction * (Number.isNaN(difference) ? one.localeCompare(two, "en", {numeric: true}) : difference);
  });
  body.append(...rows.map(([, row]) => row));
}

function filter(field) {
  const table = (field.closest(".panel") ?? field.closest("section")).querySelector("table");
  const words = field.value.toLowerCase().split(/\s+/);
  const differences = table.id === "fields" && byId("differences")?.checked;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word)) || (differences && !row.classList.contains("differs"));
  }
}

for (const button of all(".sort")) button.addEventListener("click", () => sortBy(button.closest("th")));
for (const field of all(".filter")) field.addEventListener("input", () => filter(field));
byId("differences")?.addEventListener("change", () => filter(byId("configuration").querySelector(".filter")));
filter(byId("configuration").querySelector(".filter"));

for (const tabs of all(".tabs")) {
  const buttons = all("button", tabs);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) {
        other.setAttribute("aria-selected", String(other === button));
        byId(other.getAttribute("aria-controls")).hidden = other !== button;
      }
    });
  }
}

// Quantizers -----------------------------------------------------------------------------------------

const RUNS = DATA.runs.filter((run) => run.shown.length > 0);

function layout(title, xTitle, more = {}) {
  const axis = {gridcolor: LINES, zerolinecolor: LINES, linecolor: LINES, automargin: true};
  return {
    title: {text: title, font: {size: 13}, x: 0, xref: "paper"}, height: 300, showlegend: false, hovermode: "closest",
    margin: {l: 56, r: 16, t: 40, b: 44}, paper_bgcolor: CLEAR, plot_bgcolor: CLEAR, bargap: 0,
    font: {color: GREY, family: "system-ui, sans-serif", size: 12}, ...more,
    xaxis: {...axis, title: {text: xTitle, standoff: 4}, ...more.xaxis}, yaxis: {...axis, ...more.yaxis},
  };
}

// As many figures as there are runs with something to show; places that are not needed stay, hidden.
function draw(parent, figures) {
  while (parent.children.length < figures.length) {
    parent.append(Object.assign(document.createElement("div"), {className: "figure"}));
  }
  [...parent.children].forEach((div, i) => { div.hidden = i >= figures.length; });
  figures.forEach(([data, form], i) => show(parent.children[i], data, form));
}

function drawLevels() {
  const name = byId("layer").value, moment = Number(byId("moment").value);
  const kind = byId("logarithmic").checked ? "log" : "linear";
  const figures = [];
  for (const run of RUNS) {
    const i = Math.round(moment * (run.shown.length - 1)), one = run.histograms[i][name];
    if (!one) continue;
    const total = one.counts.reduce((sum, count) => sum + count, 0) || 1;
    const width = (one.high - one.low) / one.counts.length;
    const bars = {
      type: "bar", x: one.counts.map((_, bin) => one.low + (bin + 0.5) * width), y: one.counts.map((count) => (100 * count) / total),
      width, marker: {color: run.colour, opacity: 0.75}, hovertemplate: "%{x:.4g}: %{y:.3g} %<extra></extra>",
    };
    const drawn = one.positions.length > 0 ? one.positions : [one.range];
    const shapes = drawn.filter((x) => x !== null).map((x) => (
      {type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: {color: LEVEL, width: 1.5}}));
    const title = `${escaped(run.label)}, epoch ${run.shown[i]}: ${one.levels} levels`;
    figures.push([[bars], layout(title, "", {shapes, yaxis: {type: kind, title: {text: "% of values"}, exponentformat: "none", dtick: kind === "log" ? 1 : undefined}})]);
  }
  draw(byId("histograms"), figures);
}

function drawEpochs() {
  const metric = byId("metric").value, tag = byId("tag").value, chosen = byId("layer").value;
  const figures = [];
  for (const run of RUNS) {
    const names = Object.keys(run.series).filter((name) => run.series[name].tag === tag);
    const xaxis = run.shown.at(-1) <= 12 ? {dtick: 1} : {};
    const lines = [];
    names.forEach((name, i) => {
      const one = run.series[name];
      const light = 35 + (40 * i) / Math.max(names.length - 1, 1);
      const line = {color: `hsl(210, 55%, ${light}%)`, width: name === chosen ? 4 : 1.4};
      const add = (y, note) => lines.push({
        x: one.epochs, y, line, mode: one.epochs.length > 1 ? "lines" : "markers", name: escaped(name),
        hovertemplate: `${escaped(name)}${note}<br>epoch %{x}: %{y:.4g}<extra></extra>`,
      });
      if (metric === "basis") {
        const bits = Math.max(...one.basis.map((basis) => basis.length));
        for (let bit = 0; bit < bits; bit++) add(one.basis.map((basis) => basis[bit] ?? null), `, vector ${bit + 1}`);
      } else if (one[metric].some((value) => value !== null)) {
        add(one[metric], "");
      }
    });
    if (lines.length > 0) figures.push([lines, layout(escaped(run.label), "epoch", {xaxis, yaxis: {rangemode: "tozero"}})]);
  }
  draw(byId("over"), figures);
  byId("none").hidden = figures.length > 0;
}

if (RUNS.length > 0) {
  const names = new Set(RUNS.flatMap((run) => Object.keys(run.series)));
  for (const name of names) byId("layer").append(new Option(name, name));
  const tags = new Set(RUNS.flatMap((run) => Object.values(run.series).map((one) => one.tag)));
  for (const option of all("option", byId("tag"))) if (!tags.has(option.value)) option.remove();
  const based = RUNS.some((run) => Object.values(run.series).some((one) => one.basis.some((basis) => basis.length > 0)));
  if (!based) byId("metric").querySelector("[value=basis]").remove();
  byId("layer").addEventListener("change", () => { drawLevels(); drawEpochs(); });
  byId("moment").addEventListener("input", drawLevels);
  byId("logarithmic").addEventListener("change", drawLevels);
  byId("metric").addEventListener("change", drawEpochs);
  byId("tag").addEventListener("change", drawEpochs);
  for (const button of all("[data-quantizer]")) {
    button.addEventListener("click", () => {
      byId("layer").value = button.dataset.quantizer;
      byId("layer").dispatchEvent(new Event("change"));
      byId("levels").scrollIntoView();
    });
  }
  drawLevels();
  drawEpochs();
}
