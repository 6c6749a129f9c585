"""Style and script of the page of `inspect --html`. Constants, which contain nothing of a bundle."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: light-dark(#fbfaf8, #15171a); --card: light-dark(#ffffff, #1c1f23); --line: light-dark(#e4e1db, #30353b);
  --ink: light-dark(#22252a, #e3e5e8); --soft: light-dark(#6a6f78, #979da6); --accent: light-dark(#2b5fa8, #8db8f2);
  --good: light-dark(#2c7a4b, #7fcf9b); --bad: light-dark(#b3392f, #f2938a); --tint: light-dark(#2b5fa8, #8db8f2);
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; line-height: 1.15; margin: 2px 0 6px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 34px 0 10px; font-weight: 650; }
h2 small, .soft { color: var(--soft); font-weight: 400; font-size: 12.5px; }
p { margin: 6px 0; }
code, .mono, pre { font-family: var(--mono); font-size: 12px; overflow-wrap: anywhere; }
.kind { color: var(--soft); font-size: 12px; letter-spacing: .06em; text-transform: uppercase; }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 99px; padding: 0 9px; font-size: 12px;
  line-height: 20px; margin: 0 6px 4px 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 1px; margin: 18px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tiles div { background: var(--card); padding: 10px 14px; }
.tiles b { display: block; font-size: 20px; font-weight: 600; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 5px 12px; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--line); }
tbody:last-of-type > tr:last-child > *, tbody:last-of-type > tr > th.case { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 12px; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.wrap { overflow-wrap: anywhere; }
.grid { width: auto; min-width: 100%; }
.grid th[scope=row] { font-weight: 400; white-space: nowrap; }
.grid th.case { width: 150px; } .grid th.function { width: 270px; }
.grid tbody th.case { font-weight: 600; vertical-align: top; }
.grid thead th.range { font-family: var(--mono); color: var(--ink); border-left: 1px solid var(--line); text-align: center; }
.grid thead th.dim { text-align: center; border-left: 1px solid var(--line); color: var(--accent); font-weight: 600; }
.grid td { padding: 2px 3px; border-left: 1px solid var(--line); text-align: center; }
.grid td.state { text-align: left; padding: 2px 12px; white-space: nowrap; }
.grid .module { color: var(--soft); }
.grid tr.label { display: none; }
.cell { appearance: none; border: 0; border-radius: 4px; width: 100%; min-width: 44px; min-height: 24px; padding: 2px 8px;
  font: 12px/18px var(--mono); color: var(--ink); cursor: pointer; white-space: nowrap;
  background: color-mix(in srgb, var(--tint) 13%, transparent); }
.cell.t1 { --tint: light-dark(#2c7a4b, #7fcf9b); } .cell.t2 { --tint: light-dark(#a8642b, #e8b27e); }
.cell.t3 { --tint: light-dark(#7a3f9d, #c8a0e6); } .cell.t4 { --tint: light-dark(#9d3f6c, #eb9fc2); }
.cell.t5 { --tint: light-dark(#2b8a92, #84d3da); }
.cell:hover, .cell[aria-expanded=true] { background: color-mix(in srgb, var(--tint) 34%, transparent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.none { color: var(--soft); } .given { color: var(--soft); margin-left: 6px; } .missed { color: var(--bad); margin-left: 6px; }
.bar { display: block; width: 100%; height: 12px; border-radius: 3px; margin: 0 0 8px; }
.s0 { fill: #4878b8; background: #4878b8; } .s1 { fill: #5da37c; background: #5da37c; }
.s2 { fill: #d19a5b; background: #d19a5b; } .s3 { fill: #9a77b8; background: #9a77b8; }
.s4 { fill: #c77a98; background: #c77a98; } .s5 { fill: #6aa9b3; background: #6aa9b3; }
.s6 { fill: #8b9098; background: #8b9098; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 8px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 0 20px; align-items: start; }
pre { margin: 0; padding: 12px 14px; overflow-x: auto; overflow-wrap: normal; line-height: 1.6; }
#unit { position: fixed; right: 16px; bottom: 16px; max-height: calc(100vh - 32px);
  width: min(430px, calc(100vw - 32px)); background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; box-shadow: 0 12px 40px #0003; padding: 14px 16px; overflow-y: auto; }
#unit[hidden] { display: none; }
#unit .close { position: sticky; top: 0; float: right; border: 0; background: var(--card); color: var(--soft); font-size: 20px;
  line-height: 1; padding: 4px 8px; cursor: pointer; }
#unit h3 { font: 600 13px/1.4 var(--mono); margin: 14px 0 6px; overflow-wrap: anywhere; }
#unit h3:first-of-type { margin-top: 2px; }
#unit dl { display: grid; grid-template-columns: 92px 1fr; gap: 3px 10px; margin: 0; font-size: 12.5px; }
#unit dt { color: var(--soft); } #unit dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
#unit details { grid-column: 1 / -1; } #unit summary { color: var(--soft); cursor: pointer; }
#unit li { font: 11.5px/1.45 var(--mono); overflow-wrap: anywhere; } #unit ul { padding-left: 16px; margin: 4px 0; }
footer { color: var(--soft); font-size: 12px; margin-top: 36px; }
@media (max-width: 700px) {
  main { padding: 18px 14px 48px; } th, td { padding: 5px 8px; } .tiles b { font-size: 17px; }
  .grid .module, .grid th.case, .grid th.function, .grid th[scope=row] { display: none; }
  .grid tr.label { display: table-row; } .grid tr.label th { border-bottom: 0; font-weight: 400; white-space: nowrap; }
  .grid tr.label span { position: sticky; left: 8px; }
  #unit { left: 0; right: 0; bottom: 0; top: auto; width: 100%; max-height: 72vh; border-radius: 14px 14px 0 0; }
}
@media print { #unit { display: none; } .card { overflow: visible; } }
"""

SCRIPT = """
"use strict";
const units = JSON.parse(document.getElementById("units").textContent);
const panel = document.getElementById("unit"), body = panel.querySelector("div");
let open = null;
function make(tag, text) { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; return e; }
function describe(label) {
  const unit = units[label], list = make("dl"), out = [make("h3", label + "  " + unit.name), list];
  for (const [name, value] of unit.facts) list.append(make("dt", name), make("dd", value));
  for (const [name, values] of unit.lists) {
    if (!values.length) continue;
    const more = make("details"), items = make("ul");
    more.append(make("summary", name + ": " + values.length), items);
    for (const value of values) items.append(make("li", value));
    list.append(more);
  }
  return out;
}
function close() { if (open) open.setAttribute("aria-expanded", "false"); open = null; panel.hidden = true; }
function show(cell) {
  const labels = cell.dataset.units.split(" "), few = labels.slice(0, 30);
  close();
  body.replaceChildren(...few.flatMap(describe));
  const more = labels.length - few.length;
  if (more) body.append(make("p", "and " + more + " more: aot-cache inspect --points"));
  open = cell; cell.setAttribute("aria-expanded", "true"); panel.hidden = false; panel.scrollTop = 0;
}
document.addEventListener("click", event => {
  const cell = event.target.closest("[data-units]");
  if (cell) return cell === open ? close() : show(cell);
  if (event.target.closest(".close") || !event.target.closest("#unit")) close();
});
document.addEventListener("keydown", event => {
  const cell = open;
  if (event.key === "Escape" && cell) { close(); cell.focus(); }
});
function linked() {
  const label = decodeURIComponent(location.hash.slice(1));
  for (const cell of document.querySelectorAll("[data-units]"))
    if (cell.dataset.units === label) { show(cell); return; }
}
addEventListener("hashchange", linked);
linked();
for (const cell of document.querySelectorAll("[data-units]")) {
  const labels = cell.dataset.units.split(" "), one = units[labels[0]];
  cell.title = labels.length > 1 ? labels.length + " of " + one.name
    : [labels[0] + "  " + one.name, ...one.facts.map(([name, value]) => name + ": " + value)].join("\\n");
}
"""
