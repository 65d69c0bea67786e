"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const make = (tag, text, facts) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, facts);
const link = (text, onclick) => make("button", text, { className: "link", onclick });
const theme = name => { // as light-dark() turns out: a computed colour
  const probe = document.body.appendChild(make("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
};
const paint = bits => data.colours[bits] ?? { fill: "#ffffff", ink: "#000000" };
const tiny = value => value !== 0 && Math.abs(value) < 1e-3;
const round = value => typeof value !== "number" ? value : tiny(value) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
const words = site => `${site.bits} bits, ${site.signed ? "signed" : "unsigned"}`;

// --- the graph: nodes in boxes, a shut box is one node ---------------------------------------------------------------

const STARTS = [40, 24, 12, 0], MOST = 300; // nodes to show at first, if they are to be read, and at most
const nodes = new Map(data.nodes.map(node => [node.id, node]));
const home = new Map(data.nodes.flatMap(node => node.members.map(member => [member.id, node])));
const sites = new Map(data.sites.map(site => [site.site, site]));
const reader = new Map(data.nodes.flatMap(node => node.members.flatMap(member => member.sites.map(site => [site, node]))));
const above = path => path ? path.split(".").map((_, i, names) => names.slice(0, i + 1).join(".")) : [];
const last = path => path.slice(path.lastIndexOf(".") + 1);
const inside = new Map([["", new Set()]]);
for (const node of data.nodes) {
  const way = ["", ...above(node.box)];
  way.forEach((path, i) => inside.set(path, (inside.get(path) ?? new Set()).add(way[i + 1] ?? "node " + node.id)));
}
const open = new Set();
const place = node => { const shut = above(node.box).find(path => !open.has(path)); return shut ? "module " + shut : node.id; };

function openToFit(most) {
  open.clear();
  let count = inside.get("").size;
  for (const waiting = [""]; waiting.length;) {
    const children = [...inside.get(waiting.shift())].filter(child => inside.has(child));
    const more = children.reduce((sum, child) => sum + inside.get(child).size - 1, 0);
    if (count + more > most) continue;
    count += more;
    for (const child of children) { open.add(child); waiting.push(child); }
  }
}

const style = () => [
  { selector: "node", style: { label: "data(label)", shape: "round-rectangle", width: "data(width)", height: 38, "background-color": "data(fill)", color: "data(ink)",
    "border-width": 1, "border-color": "#777", "text-valign": "center", "font-size": 12, "text-wrap": "wrap", "line-height": 1.15 } },
  { selector: ":parent", style: { "background-opacity": 0.05, "background-color": "#888", color: theme("--soft"), "text-valign": "top", "text-margin-x": "data(shift)", "text-margin-y": -2, padding: 10 } },
  { selector: "edge", style: { label: "data(label)", width: 1.5, "line-color": "data(paint)", "target-arrow-color": "data(paint)", "target-arrow-shape": "triangle",
    "curve-style": "bezier", "font-size": 12, color: theme("--ink"), "text-background-color": theme("--paper"), "text-background-opacity": 1 } },
  { selector: "edge[bend]", style: { "curve-style": "unbundled-bezier", "control-point-distances": "data(bend)", "control-point-weights": "0.15 0.85" } },
  { selector: "edge[?python]", style: { "line-style": "dashed" } },
  { selector: ":selected", style: { "border-width": 4, "border-color": "#3b82f6" } } ];
const cy = cytoscape({ container: by("graph"), style: style(), minZoom: 0.05, maxZoom: 3 });
window.cy = cy;

function shown(node, id) {
  if (id === node.id) return { id, parent: node.box ? "box " + node.box : undefined, bits: node.bits, title: node.title, rest: node.rest, paint: node.paint };
  const path = id.slice(7), parent = path.slice(0, -last(path).length - 1);
  return { id, parent: parent ? "box " + parent : undefined, bits: [], title: "", rest: "", operations: 0, shut: path };
}
function show() {
  const strong = theme("--soft");
  const elements = new Map(), edges = new Map();
  for (const node of data.nodes) {
    const id = place(node), facts = elements.get(id) ?? shown(node, id);
    elements.set(id, facts);
    if (!facts.shut) continue;
    facts.bits = [...new Set([...facts.bits, ...node.bits])].sort((a, b) => a - b);
    facts.operations += node.operations;
    facts.title = "+ " + last(facts.shut) + " " + facts.bits.map(bits => "W" + bits).join("/");
    facts.rest = `${facts.operations} operation${facts.operations === 1 ? "" : "s"}`;
    facts.paint = facts.bits[0] ?? "plain";
  }
  for (const facts of elements.values()) {
    const { fill, ink } = paint(facts.paint);
    Object.assign(facts, { fill, ink, label: [facts.title, facts.rest].filter(Boolean).join("\n"), width: 20 + 6.6 * Math.max(facts.title.length, facts.rest.length, 6) });
  }
  for (const [source, target, label, python] of data.edges) {
    const from = place(nodes.get(source)), to = place(nodes.get(target)), id = from + ">" + to;
    if (from !== to && (label || !edges.has(id))) edges.set(id, { id, source: from, target: to, label, python, paint: label ? strong : "#9a9a9a" });
  }
  const boxes = [...open].map(path => ({ id: "box " + path, label: last(path), fill: "#888", ink: "#888", width: 1, shift: 0, parent: path.includes(".") ? "box " + path.slice(0, path.lastIndexOf(".")) : undefined }));
  cy.elements().remove();
  cy.add([...boxes, ...elements.values()].map(data => ({ group: "nodes", data })));
  cy.add([...edges.values()].map(data => ({ group: "edges", data })));
  cy.layout({ name: "dagre", rankSep: 32, nodeSep: 24, animate: false }).run();
  cy.nodes(":parent").forEach(box => box.data("shift", Math.min(0, 3.3 * box.data("label").length - box.width() / 2)));
  bend();
  fit();
}
function bend() { // edges go around the nodes that lie in their way
  const leaves = cy.nodes(":childless").map(node => ({ node, ...node.position(), reach: node.width() / 2 + 12 }));
  cy.edges().forEach(edge => {
    const [from, to] = [edge.source().position(), edge.target().position()];
    let left = 0, right = 0;
    for (const { node, x, y, reach } of leaves) {
      const share = (y - from.y) / (to.y - from.y), aside = x - from.x - share * (to.x - from.x);
      if (share <= 0 || share >= 1 || Math.abs(aside) > reach || node.same(edge.source()) || node.same(edge.target())) continue;
      left = Math.min(left, aside - reach);
      right = Math.max(right, aside + reach);
    }
    const aside = -left < right ? left : right;
    if (aside) edge.data("bend", [1, 1].map(() => Math.sign(from.y - to.y) * aside).join(" "));
  });
}
function fit() {
  cy.fit(undefined, 20);
  if (cy.zoom() > 1.1) { cy.zoom(1.1); cy.center(); }
  if (cy.zoom() >= 0.5) return;
  const box = cy.elements().boundingBox(); // too much to be read at once: start at the top
  cy.zoom(0.75);
  cy.pan({ x: cy.width() / 2 - 0.75 * (box.x1 + box.x2) / 2, y: 20 - 0.75 * box.y1 });
}

function select(id) {
  const node = home.get(id) ?? nodes.get(id), shut = node ? above(node.box).filter(path => !open.has(path)) : [];
  shut.forEach(path => open.add(path));
  if (shut.length) show();
  cy.$(":selected").unselect();
  const found = cy.getElementById(node ? node.id : id).select();
  if (found.nonempty()) {
    const box = found.renderedBoundingBox(), seen = box.x1 > 0 && box.y1 > 0 && box.x2 < cy.width() && box.y2 < cy.height();
    if (!seen) cy.center(found);
  }
  details(node ? node.id : id, node && node.id !== id ? id : null);
}
function enter(id) {
  if (id.startsWith("module ")) { open.add(id.slice(7)); show(); select("box " + id.slice(7)); }
}
function close() {
  const id = cy.$("node:selected").first().id() ?? "", node = nodes.get(id);
  const path = node ? node.box : id.startsWith("box ") ? id.slice(4) : id.slice(7).split(".").slice(0, -1).join(".");
  if (!path) return;
  for (const inner of [...open]) if (inner === path || inner.startsWith(path + ".")) open.delete(inner);
  show();
  select("module " + path);
}
function step(key) {
  const here = cy.$("node:selected").first(), leaves = cy.nodes(":childless");
  if (here.empty()) return select(leaves.first().id());
  const ordered = leaves.sort((a, b) => a.position("y") - b.position("y") || a.position("x") - b.position("x"));
  const at = ordered.toArray().findIndex(node => node.id() === here.id());
  const next = { ArrowDown: () => here.outgoers("node"), ArrowUp: () => here.incomers("node"), ArrowLeft: () => ordered.slice(Math.max(at - 1, 0), Math.max(at, 1)), ArrowRight: () => ordered.slice(at + 1, at + 2) }[key]();
  if (next.nonempty()) select(next.first().id());
}

cy.on("tap", "node", event => { if (event.target === event.cy.$(event.target).first()) select(event.target.id()); });
cy.on("dbltap", "node", event => event.target.id().startsWith("box ") ? close() : enter(event.target.id()));
by("expand").onclick = () => { openToFit(MOST); show(); };
by("collapse").onclick = () => { open.clear(); show(); };
by("close").onclick = close;
by("fit").onclick = () => cy.fit(undefined, 20);
new ResizeObserver(() => {
  cy.resize();
  const chosen = cy.$(":selected");
  if (chosen.nonempty()) cy.center(chosen); else fit();
}).observe(by("graph"));
by("graph").onkeydown = event => {
  const here = cy.$("node:selected").first();
  if (event.key.startsWith("Arrow")) step(event.key);
  else if (event.key === "Enter" && here.nonempty()) enter(here.id());
  else if (event.key === "Backspace") close();
  else if (event.key === "+" || event.key === "=") cy.zoom(cy.zoom() * 1.25);
  else if (event.key === "-") cy.zoom(cy.zoom() / 1.25);
  else if (event.key === "0") cy.fit(undefined, 20);
  else return;
  event.preventDefault();
};

// --- search and details ----------------------------------------------------------------------------------------------

let hits = [], hit = 0, asked = "";
function search() {
  const text = by("search").value.trim().toLowerCase();
  if (!text) { by("found").textContent = ""; return; }
  const all = data.nodes.flatMap(node => node.members), names = member => [member.id, member.path].map(name => (name ?? "").toLowerCase());
  const exact = all.filter(member => names(member).includes(text)), part = all.filter(member => names(member).some(name => name.includes(text)));
  hit = text === asked ? (hit + 1) % Math.max(hits.length, 1) : 0;
  hits = [...new Set([...exact, ...part])];
  asked = text;
  by("found").textContent = hits.length ? `${hit + 1} of ${hits.length}` : "nothing found";
  if (hits.length) select(hits[hit].id);
}
by("search").onkeydown = event => { if (event.key === "Enter") search(); };
if (home.size <= 2000) for (const node of data.nodes) for (const member of node.members) by("names").append(make("option", "", { value: member.path || member.id }));

function plot(site) {
  const top = Math.max(...site.continuous, ...site.quantized, 1), n = site.continuous.length;
  const bars = (counts, fill) => counts.map((c, i) => `<rect x="${i}" y="${1 - c / top}" width="1" height="${c / top}" fill="${fill}"/>`).join("");
  return `<svg class="plot" role="img" aria-label="Histogram" viewBox="0 0 ${n} 1" preserveAspectRatio="none">${bars(site.quantized, "#f4987a")}${bars(site.continuous, "#3b82f6aa")}</svg>`;
}
function list(facts) {
  const box = make("dl");
  for (const [name, value] of facts) if (value) box.append(make("dt", name), make("dd", value));
  return box;
}
function details(id, chosen) {
  const node = nodes.get(id), box = by("details");
  box.scrollTop = 0;
  if (!node) return about(id.replace(/^(module|box) /, ""));
  box.replaceChildren(make("h2", node.title));
  if (node.box) box.append(make("p", `in ${node.box}`, { className: "soft" }));
  for (const member of node.members) {
    const head = make("h3", (member.id === chosen ? "▸ " : "") + (member.path || member.id));
    if (node.members.length > 1) box.append(head);
    if (member.id === chosen) requestAnimationFrame(() => { box.scrollTop = head.offsetTop - box.offsetTop; });
    box.append(list([["path", member.path], ["does", member.function], ["shape", member.shape], ["code", member.code], ["BatchNorm", member.batch_norm], [member.place ? "why" : "why float", member.reason], ["line", member.place || member.line]]));
    for (const name of member.sites) describe(box, sites.get(name));
  }
  for (const name of new Set(node.members.flatMap(member => member.quantizes).filter(name => sites.has(name)))) describe(box, sites.get(name), "its result, read through ");
}
function describe(box, site, before = "") {
  box.append(make("h3", `${before}${site.site}`));
  box.append(list([["bits", words(site)], ["method", `${site.method}, ${site.estimator}`], ["rule", site.rule], ["scale", round(site.scale) ?? "not calibrated"], ["relative error", round(site.error) ?? "not measured: give batches"]]));
  if (site.continuous) box.insertAdjacentHTML("beforeend", plot(site) + `<p class="soft">${round(site.low)} to ${round(site.high)}: continuous blue, quantized orange</p>`);
}
function about(path) {
  const within = data.nodes.filter(node => !path || node.box === path || node.box.startsWith(path + ".")), box = by("details");
  box.replaceChildren(make("h2", path || "The model"));
  if (!path) for (const line of data.totals) box.append(make("p", line));
  box.append(make("h3", "Operations"), table(["operation", "weight", "inputs"], within.flatMap(node => node.members).filter(member => member.quantized != null).map(member => {
    const read = member.sites.map(name => sites.get(name)), bits = kind => read.filter(site => site.kind === kind).map(site => (site.signed ? "s" : "u") + site.bits).join(" ");
    return [link(member.path || member.id, () => select(member.id)), bits("weight") || "-", bits("activation") || "-"];
  })));
}
function table(columns, rows) {
  const made = make("table"), head = made.createTHead().insertRow(), body = made.createTBody();
  for (const column of columns) head.append(column instanceof Node ? column : make("th", column));
  for (const row of rows) { const line = body.insertRow(); for (const cell of row) line.insertCell().append(cell ?? ""); }
  return made;
}

// --- tables and curves -----------------------------------------------------------------------------------------------

const columns = ["site", "kind", "bits", "signed", "method", "estimator", "scale", "error", "rule"];
let order = ["", 1];
function showSites() {
  const heads = columns.map(column => {
    const cell = make("th"), button = make("button", column + (order[0] === column ? order[1] > 0 ? " ▲" : " ▼" : ""));
    button.onclick = () => { order = [column, order[0] === column ? -order[1] : 1]; showSites(); by("sites").querySelectorAll("th button")[columns.indexOf(column)].focus(); };
    if (order[0] === column) cell.ariaSort = order[1] > 0 ? "ascending" : "descending";
    cell.append(button);
    return cell;
  });
  const rows = [...data.sites], [by_, sign] = order;
  if (by_) rows.sort((a, b) => sign * ((a[by_] ?? -Infinity) > (b[by_] ?? -Infinity) ? 1 : (a[by_] ?? -Infinity) < (b[by_] ?? -Infinity) ? -1 : 0));
  const made = table(heads, rows.map(site => columns.map(name => name === "site" ? link(site.site, () => go(site)) : round(site[name]) ?? "")));
  [...made.tBodies[0].rows].forEach((row, i) => { const { fill, ink } = paint(rows[i].bits), cell = row.cells[2]; cell.className = "bits"; cell.style.background = fill; cell.style.color = ink; });
  by("sites").replaceChildren(made);
}
function go(site) {
  const node = reader.get(site.site);
  if (node) { select(node.id); by("graph").scrollIntoView({ block: "nearest" }); }
}
function heat() {
  for (const kind of new Set(data.sites.map(site => site.kind))) {
    const row = make("div", "", { className: "row" });
    row.append(make("span", kind));
    for (const site of data.sites.filter(site => site.kind === kind)) {
      const title = `${site.site}: ${words(site)}`, cell = make("button", site.bits, { title, ariaLabel: title, onclick: () => go(site) });
      cell.style.background = paint(site.bits).fill;
      cell.style.color = paint(site.bits).ink;
      row.append(cell);
    }
    by("heat").append(row);
  }
}
function captures() {
  if (!data.captures.length) return by("captures").remove();
  const rows = data.captures.map(capture => [capture.path || "the model", capture.rung, capture.reason, capture.place]);
  by("captures").lastElementChild.append(table(["module", "captured", "why", "line"], rows));
}
const NAMES = { replacement: "replacement rate p", p: "replacement rate p", weight_lambda: "λ for weights", activation_lambda: "λ for activations", error: "relative error", clipped: "share clipped", scale: "scale" };
function curve(box, name, lines, x, mark) {
  const strokes = ["#3b82f6", "#f4987a", "#10b981", "#a855f7"], grid = { stroke: theme("--line"), width: 1 };
  const axis = { stroke: theme("--ink"), grid, ticks: grid, size: 60, values: (_, values) => values.map(value => value == null ? "" : tiny(value) ? value.toExponential(1) : Number(value.toPrecision(4))) };
  const draw = u => { if (mark == null) return; u.ctx.fillStyle = "#e11d48"; u.ctx.fillRect(u.valToPos(mark, "x", true), u.bbox.top, 2, u.bbox.height); };
  const series = [{ label: "step" }, ...Object.keys(lines).map((label, i) => ({ label, stroke: strokes[i % 4], width: 2 }))];
  const legend = { show: series.length > 2 && series.length < 9, live: false };
  new uPlot({ title: NAMES[name], legend, width: 430, height: 230, scales: { x: { time: false } }, axes: [{ ...axis, size: 40 }, axis], series, hooks: { draw: [draw] } }, [x, ...Object.values(lines)], box);
}
function schedule() {
  if (!data.schedule) return by("schedule")?.remove();
  const { t, total, now, curves, standing } = data.schedule, box = by("schedule").lastElementChild;
  by("schedule").querySelector("p").textContent = `Step ${now} of ${total}. ` + Object.entries(standing).map(([group, values]) =>
    `${Object.keys(standing).length > 1 ? group + ": " : ""}p = ${round(values.replacement)}, λ for weights ${round(values.weight_lambda)}, for activations ${round(values.activation_lambda)}`).join("; ") + ".";
  box.replaceChildren();
  for (const [name, groups] of Object.entries(curves)) curve(box, name, groups, t, now);
}
function training() {
  if (!data.history.length) return by("history")?.remove();
  const box = by("history").lastElementChild, chosen = by("which").value;
  const rows = data.history.filter(row => !chosen || row.site === chosen), steps = [...new Set(rows.map(row => row.step))].sort((a, b) => a - b);
  box.replaceChildren();
  for (const name of data.figures) {
    const lines = {};
    for (const row of rows) if (row[name] != null) (lines[row.site] ??= new Map()).set(row.step, row[name]);
    for (const site in lines) lines[site] = steps.map(step => lines[site].get(step) ?? null);
    if (Object.keys(lines).length) curve(box, name, lines, steps);
  }
}

for (const [name, { fill, ink, words }] of Object.entries(data.colours)) if (data.used.includes(name)) {
  const key = make("span", words, { className: "key" });
  Object.assign(key.style, { background: fill, color: ink });
  by("legend").append(key, " ");
}
for (const site of new Set(data.history.map(row => row.site))) by("which").append(make("option", site));
by("which").onchange = training;
matchMedia("(prefers-color-scheme: dark)").onchange = () => { cy.style(style()); show(); schedule(); training(); };
STARTS.some(most => { openToFit(most); show(); return cy.width() > 0.6 * cy.elements().boundingBox().w; });
about(""); showSites(); heat(); captures(); schedule(); training();
