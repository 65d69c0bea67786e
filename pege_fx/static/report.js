"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text ?? "" });
const ink = getComputedStyle(document.body).color;
const colour = bits => bits ? data.colours[bits] : "#d9d9d9";
const round = value => typeof value === "number" ? String(Number(value.toPrecision(4))) : value;
const open = new Set();
const nodes = new Map(data.nodes.map(node => [node.id, node]));

const above = path => path ? path.split(".").map((_, i, names) => names.slice(0, i + 1).join(".")) : [];
const place = node => { const shut = above(node.module).find(path => !open.has(path)); return shut ? "module " + shut : node.id; };

const cy = cytoscape({ container: by("graph"), style: [
  { selector: "node", style: { label: "data(label)", shape: "round-rectangle", width: 150, height: 34, "background-color": "data(colour)",
    "text-valign": "center", "font-size": 11, "text-wrap": "ellipsis", "text-max-width": 145, color: "#000" } },
  { selector: "edge", style: { label: "data(label)", width: 1.5, "line-color": "#888", "target-arrow-color": "#888", "target-arrow-shape": "triangle",
    "curve-style": "bezier", "font-size": 10, color: ink } },
  { selector: ":selected", style: { "border-width": 4, "border-color": "#3b82f6" } } ] });
window.cy = cy;

function show() {
  const elements = new Map();
  for (const node of data.nodes) {
    const id = place(node);
    const shut = id !== node.id, old = elements.get(id);
    const bits = shut && old ? Math.min(old.data.bits || 99, node.weight_bits || 99) % 99 : node.weight_bits;
    const name = shut ? "+ " + id.slice(7) : (node.path || node.name);
    elements.set(id, { data: { id, bits, colour: colour(bits), label: name + (bits ? " W" + bits : "") } });
  }
  const edges = new Map();
  for (const [source, target, label] of data.edges) {
    const from = place(nodes.get(source)), to = place(nodes.get(target));
    const old = edges.get(from + ">" + to);
    if (from !== to && (!old || label)) edges.set(from + ">" + to, { data: { id: from + ">" + to, source: from, target: to, label } });
  }
  cy.elements().remove();
  cy.add([...elements.values(), ...edges.values()]);
  cy.layout({ name: "dagre", rankSep: 30, nodeSep: 20, animate: false }).run();
}

function plot(site) {
  const top = Math.max(...site.continuous, ...site.quantized, 1), n = site.continuous.length;
  const bars = (counts, fill) => counts.map((c, i) => `<rect x="${i}" y="${1 - c / top}" width="1" height="${c / top}" fill="${fill}"/>`).join("");
  return `<svg class="plot" role="img" aria-label="Histogram" viewBox="0 0 ${n} 1" preserveAspectRatio="none">${bars(site.quantized, "#f4987a")}${bars(site.continuous, "#3b82f6aa")}</svg>`;
}

function details(id) {
  const node = nodes.get(id), box = by("details");
  box.replaceChildren(make("h2", id));
  if (!node) return box.append(make("p", "A module; double-click or Enter opens it."));
  for (const key of ["path", "function", "weight_bits", "shape", "dtype", "code", "reason", "batch_norm"])
    if (node[key]) box.append(make("p", `${key.replace("_", " ")}: ${node[key]}`));
  for (const site of data.sites.filter(site => node.sites.includes(site.site))) {
    box.append(make("h3", site.site), make("p", `${site.bits} bits, ${site.signed ? "signed" : "unsigned"}, ${site.method}, ${site.estimator}; ${site.rule}; scale ${round(site.scale) ?? "not calibrated"}; relative error ${round(site.error) ?? "not measured"}`));
    if (site.continuous) box.insertAdjacentHTML("beforeend", plot(site) + `<p>${round(site.low)} to ${round(site.high)}: continuous blue, quantized orange</p>`);
  }
}

function select(id) {
  const node = nodes.get(id);
  if (node) { const shut = above(node.module).filter(path => !open.has(path)); if (shut.length) { shut.forEach(path => open.add(path)); show(); } }
  cy.$(":selected").unselect();
  const found = cy.getElementById(id).select();
  if (found.nonempty()) cy.animate({ center: { eles: found }, zoom: 1, duration: 0 });
  details(id);
}
function close() {
  const id = cy.$("node:selected").first().id(), node = nodes.get(id), path = node ? node.module : (id || "").slice(7).split(".").slice(0, -1).join(".");
  if (!path) return;
  for (const inner of [...open]) if (inner === path || inner.startsWith(path + ".")) open.delete(inner);
  show();
  select("module " + path);
}
function enter(id) { if (id.startsWith("module ")) { open.add(id.slice(7)); show(); } }

cy.on("tap", "node", event => select(event.target.id()));
cy.on("dbltap", "node", event => enter(event.target.id()));
by("expand").onclick = () => { data.nodes.forEach(node => above(node.module).forEach(path => open.add(path))); show(); };
by("collapse").onclick = () => { open.clear(); show(); };
by("close").onclick = close;
by("fit").onclick = () => cy.fit();
by("search").onchange = event => {
  const text = event.target.value.toLowerCase();
  const names = node => [node.id, node.path].map(name => name.toLowerCase());
  const hit = text && (data.nodes.find(node => names(node).includes(text)) || data.nodes.find(node => names(node).some(name => name.includes(text))));
  if (hit) select(hit.id); else by("details").replaceChildren(make("p", "Nothing found."));
};
by("graph").onkeydown = event => {
  const here = cy.$("node:selected"), step = { ArrowDown: "outgoers", ArrowUp: "incomers" }[event.key];
  if (step) { const next = here.empty() ? cy.nodes().first() : here[step]("node").first(); if (next.nonempty()) select(next.id()); }
  else if (event.key === "Enter" && here.nonempty()) enter(here.id());
  else if (event.key === "Backspace") close();
  else return;
  event.preventDefault();
};
for (const node of data.nodes) by("names").append(Object.assign(make("option"), { value: node.path || node.id }));

const columns = ["site", "kind", "bits", "signed", "method", "estimator", "scale", "error", "rule"];
let order = ["", 1];
function sites() {
  const table = make("table"), head = table.createTHead().insertRow();
  for (const column of columns) {
    const cell = make("th"), button = make("button", column);
    button.onclick = () => { order = [column, order[0] === column ? -order[1] : 1]; sites(); };
    cell.append(button); head.append(cell);
  }
  const body = table.createTBody(), rows = [...data.sites];
  if (order[0]) rows.sort((a, b) => (a[order[0]] > b[order[0]] ? 1 : a[order[0]] < b[order[0]] ? -1 : 0) * order[1]);
  for (const site of rows) { const row = body.insertRow(); for (const column of columns) { const cell = row.insertCell(); cell.textContent = round(site[column]) ?? ""; if (column === "bits") { cell.className = "bits"; cell.style.background = colour(site.bits); } } }
  by("sites").replaceChildren(table);
}
function curve(box, title, lines, x, mark) {
  const paint = ["#3b82f6", "#f4987a", "#10b981", "#a855f7"], axis = { stroke: ink };
  const draw = u => { if (mark == null) return; const at = u.valToPos(mark, "x", true); u.ctx.fillStyle = "#e11"; u.ctx.fillRect(at, u.bbox.top, 2, u.bbox.height); };
  const series = [{}, ...Object.keys(lines).map((label, i) => ({ label, stroke: paint[i % 4] }))];
  new uPlot({ title, legend: { show: series.length < 9 }, width: 420, height: 220, scales: { x: { time: false } }, axes: [axis, axis], series, hooks: { draw: [draw] } }, [x, ...Object.values(lines)], box);
}
const reader = site => data.nodes.find(node => node.sites.includes(site.site));
function heat() {
  for (const kind of new Set(data.sites.map(site => site.kind))) {
    const row = make("div");
    row.append(make("span", kind));
    for (const site of data.sites.filter(site => site.kind === kind)) {
      const cell = make("button", site.bits);
      cell.title = `${site.site}: ${site.bits} bits`;
      cell.setAttribute("aria-label", cell.title);
      cell.style.background = colour(site.bits);
      cell.onclick = () => { const node = reader(site); if (node) select(node.id); };
      row.append(cell);
    }
    by("heat").append(row);
  }
}
function captures() {
  if (!data.captures.length) return by("captures").remove();
  const table = make("table"), head = table.createTHead().insertRow();
  for (const name of ["module", "captured", "why", "line"]) head.append(make("th", name));
  const body = table.createTBody();
  for (const capture of data.captures) { const row = body.insertRow(); for (const text of [capture.path || "the model", capture.rung, capture.reason, capture.place]) row.insertCell().textContent = text; }
  by("captures").lastElementChild.append(table);
}
function schedule() {
  if (!data.schedule) return by("schedule").remove();
  for (const [name, groups] of Object.entries(data.schedule.curves)) curve(by("schedule").lastElementChild, name, groups, data.schedule.t, data.schedule.now);
}
function training() {
  if (!data.history.length) return by("history").remove();
  const box = by("history").lastElementChild, chosen = by("which").value;
  const rows = data.history.filter(row => !chosen || row.site === chosen), steps = [...new Set(rows.map(row => row.step))].sort((a, b) => a - b);
  box.replaceChildren();
  for (const name of ["error", "clipped", "scale", "p", "weight_lambda", "activation_lambda"]) {
    const bySite = {};
    for (const row of rows) if (row[name] != null) (bySite[row.site] ??= new Map()).set(row.step, row[name]);
    const lines = Object.fromEntries(Object.entries(bySite).map(([site, values]) => [site, steps.map(step => values.get(step) ?? null)]));
    if (Object.keys(lines).length) curve(box, name.replace("_", " "), lines, steps);
  }
}
sites(); show(); heat(); captures(); schedule();
for (const site of new Set(data.history.map(row => row.site))) by("which").append(make("option", site));
if (data.history.length) by("which").onchange = training;
training();
