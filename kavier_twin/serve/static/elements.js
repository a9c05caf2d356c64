/* Elements made from text, and redrawing that leaves the reader's place alone. */

import { figure, known, percent } from "./words.js";

export const LIKELY = 0.5; // probabilities from here on are highlighted

export function element(tag, text, cls) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== "") node.textContent = text;
  if (cls) node.className = cls;
  return node;
}

/* A name from the settings, which may be broken at its underscores. */
export function named(tag, name) {
  const node = element(tag);
  node.append(...name.split(/(?<=_)/).flatMap((part) => [part, document.createElement("wbr")]));
  return node;
}

/* A table in place of what `place` holds. Cells are text or elements; a row may have a className. */
export function table(place, head, rows, caption, cls = "") {
  if (!rows.length) { place.replaceChildren(element("p", "No data yet.", "soft")); return; }
  const node = element("table", "", cls), top = element("tr"), body = element("tbody"), thead = element("thead");
  node.setAttribute("aria-label", caption);
  top.append(...head.map((cell) => (cell instanceof Node ? cell : element("th", cell))));
  for (const cell of top.cells) cell.scope = "col";
  for (const cells of rows) {
    const row = element("tr", "", cells.className);
    row.append(...cells.map((cell, i) => (cell instanceof Node ? cell : element(i ? "td" : "th", String(cell)))));
    if (row.cells[0].tagName === "TH") row.cells[0].scope = "row";
    body.append(row);
  }
  thead.append(top);
  node.append(thead, body);
  const scrolled = place.scrollLeft;
  if (!node.querySelector("button")) Object.assign(place, { tabIndex: 0, role: "region", ariaLabel: caption }); // to be scrolled by keyboard
  place.replaceChildren(node);
  place.scrollLeft = scrolled;
}

/* Redraw, and put the focus back on what has the same `data-key`. Waits while text is being selected. */
export function keepFocus(redraw) {
  const key = document.activeElement?.dataset?.key;
  const selection = getSelection();
  if (!selection.isCollapsed && selection.anchorNode?.parentElement?.closest("table, .flags")) return;
  redraw();
  if (key) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

/* A table cell with the median over the scenarios and its range. */
export function interval(quantiles, kpi) {
  const node = element("td");
  if (!known(quantiles?.["0.5"])) { node.textContent = "–"; return node; }
  const keys = Object.keys(quantiles).sort((a, b) => a - b);
  const text = (key) => figure(quantiles[key], kpi);
  const [low, high] = [text(keys[0]), text(keys.at(-1))];
  node.append(text("0.5"), element("span", low === high ? "in all scenarios" : `${low} – ${high}`, "range"));
  return node;
}

/* A table cell with a probability and its interval. */
export function probability(share, range) {
  const node = element("td", `${share >= LIKELY ? "▲ " : ""}${percent(share)}`, share >= LIKELY ? "bad-text" : "");
  if (range) node.append(element("span", range.map(percent).join(" – "), "range"));
  return node;
}
