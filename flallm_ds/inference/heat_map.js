// Draws a heat map of heat_map.py as a table: words by time. The pages of `flallm report` and
// `flallm demo` load this file before their own script.
"use strict";

// Returns an element with attributes and children. Attributes with the value false or null are
// left out; functions are event listeners. Children that are text become text nodes.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Returns {table, mark}. start, end: of the clip in its video, in seconds; equal if they are not
// known. frames: an element with pictures of the clip, side by side, from its start to its end;
// or null. language: tag of the words, or null. seek(seconds): shows a moment of the video.
// mark(seconds): draws a line at this moment; none outside of the clip.
function heatTable(map, {start, end, frames, language, seek}) {
  const table = element("table", {class: "heat"});
  table.append(element("caption", {}, "From which moments of the clip each word came: a stronger " +
    "colour is more attention. Each row is scaled to its highest value. Press a word to see its moment."));
  if (frames) table.append(heatRow("frames", frames));
  function mark(time) {
    const share = (time - start) / (end - start);
    const within = share >= 0 && share <= 1;
    table.classList.toggle("marked", within);
    if (within) table.style.setProperty("--now", `${100 * share}%`);
  }
  map.words.forEach((word, at) => {
    const levels = map.levels[at];
    const share = (levels.indexOf(Math.max(...levels)) + 0.5) / levels.length;
    const peak = start + share * (end - start);
    const place = end > start ? `${peak.toFixed(1)} s` : `${Math.round(100 * share)} % of the clip`;
    const about = `most attention at ${place}; ${Math.round(100 * map.on_video[at])} % on the video`;
    const press = () => { if (end > start) { seek(peak); mark(peak); } };
    const button = element("button", {type: "button", title: about, lang: language, click: press}, word);
    table.append(heatRow(button, heatCells(levels, about)));
  });
  if (end > start) {
    const times = [start, end].map((time) => element("span", {}, `${time.toFixed(1)} s`));
    table.append(heatRow("time", element("div", {class: "times"}, ...times)));
  }
  return {table, mark};
}

function heatRow(title, content) {
  return element("tr", {}, element("th", {scope: "row"}, title), element("td", {}, content));
}

function heatCells(levels, about) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${levels.length} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("shape-rendering", "crispEdges"); // no seams between the cells
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", about);
  levels.forEach((level, at) => {
    const cell = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = {x: at, y: 0, width: 1, height: 1, fill: "currentColor",
                   "fill-opacity": (level / 255).toFixed(2)};
    for (const [name, value] of Object.entries(place)) cell.setAttribute(name, value);
    svg.append(cell);
  });
  return svg;
}
