// The samples and the charts of a report. The texts of samples come from a corpus and from a
// model: they become text nodes, never HTML. `element` and `heatTable` are in
// inference/heat_map.js, which is part of the same script.

const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const byId = (id) => document.getElementById(id);

const score = (value) => value.toFixed(1);

// --- charts: the values at the pointer, or at the step that the arrow keys chose

function valueText(line, at, unit) {
  const y = line.y[at];
  const text = Math.abs(y) >= 1000 ? Math.round(y).toLocaleString("en") : y.toPrecision(4);
  return `${line.label}: ${text}${unit ? ` ${unit}` : ""}`;
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((other, at) => { if (Math.abs(other - x) < Math.abs(xs[best] - x)) best = at; });
  return best;
}

function showValues(figure, chart, x) {
  const {low, high, begin, end} = chart.x;
  const steps = chart.lines.map((line) => line.x[nearest(line.x, x)]);
  const step = steps[nearest(steps, x)];
  const values = chart.lines.map((line) => valueText(line, nearest(line.x, step), chart.unit));
  figure.querySelector("output").textContent =
    `step ${step.toLocaleString("en")}. ${values.join("; ")}`;
  const cross = figure.querySelector(".cross");
  const place = begin + ((step - low) / (high - low)) * (end - begin);
  cross.setAttribute("x1", place);
  cross.setAttribute("x2", place);
  cross.removeAttribute("hidden");
  figure.dataset.step = step;
}

function setUpChart(figure) {
  const chart = data.charts[Number(figure.dataset.chart)];
  const svg = figure.querySelector("svg");
  const {low, high, begin, end} = chart.x;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    showValues(figure, chart, low + ((pixel - begin) / (end - begin)) * (high - low));
  });
  figure.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const xs = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const now = figure.dataset.step ? nearest(xs, Number(figure.dataset.step)) + move : 0;
    showValues(figure, chart, xs[Math.min(Math.max(now, 0), xs.length - 1)]);
  });
}

document.querySelectorAll("figure[data-chart]").forEach(setUpChart);

// --- sentences with marked differences

// Parts are equal to the other sentence, different, equal, different, ...
function marked(parts, tag) {
  return parts.map((part, at) => (at % 2 ? element(tag, {}, part) : part));
}

function sentence(label, parts, tag, language) {
  const text = element("span", {lang: language || null, dir: "auto"}, ...marked(parts, tag));
  const kind = tag === "ins" ? "hypothesis" : "reference";
  return element("p", {class: kind}, element("span", {class: "who"}, label), text);
}

const reference = (sample) => sample.translations.find(Boolean).reference.join("");

// --- the table

const samples = data.samples;
const quality = (sample) => sample.translations.find(Boolean).chrf;

// Columns with their sort keys. A score that a run does not have comes last.
function columnsOf() {
  const columns = [
    {title: "Clip", value: (sample) => sample.key},
    {title: several ? "Reference and hypotheses" : "Reference and hypothesis",
     value: (sample) => reference(sample)},
  ];
  data.runs.forEach((name, run) => {
    // A zero-width space after each sign: long names of runs are wrapped there.
    const suffix = several ? ` ${name.replace(/[^\p{L}\p{N}]/gu, "$&\u200b")}` : "";
    for (const [key, title] of [["chrf", "chrF"], ["bleu", "BLEU"]]) {
      columns.push({title: title + suffix, number: true,
                    value: (sample) => sample.translations[run]?.[key] ?? null});
    }
  });
  if (several) {
    const last = data.runs.length - 1;
    columns.push({title: "chrF difference", number: true, value: (sample) => {
      const [first, other] = [sample.translations[0], sample.translations[last]];
      return first && other ? other.chrf - first.chrf : null;
    }});
  }
  return columns;
}

const PAGE = 100;
const state = {column: 2, down: false, shown: PAGE, rows: []};
let columns = [];

function searchable(sample) {
  if (!sample.search) {
    const texts = [sample.key, sample.corpus, data.clips[sample.key]?.signer, reference(sample)];
    for (const one of sample.translations) texts.push(one?.hypothesis.join(""));
    sample.search = texts.join("\n").toLowerCase();
  }
  return sample.search;
}

function filtered() {
  const wanted = byId("search").value.trim().toLowerCase();
  let rows = samples.filter((sample) => !wanted || searchable(sample).includes(wanted));
  const filter = byId("filter").value;
  if (filter === "best" || filter === "worst") {
    const sign = filter === "best" ? -1 : 1;
    rows = [...rows].sort((a, b) => sign * (quality(a) - quality(b))).slice(0, 25);
  } else if (filter === "clip") {
    rows = rows.filter((sample) => data.clips[sample.key]?.video);
  } else if (filter === "attention") {
    rows = rows.filter((sample) => data.attention[sample.key]);
  }
  return rows;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return state.down ? -order : order;
}

function update() {
  const {value} = columns[state.column];
  state.rows = filtered().sort((a, b) => compare(value(a), value(b)));
  [...byId("head").children].forEach((cell, at) => {
    const order = state.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", at === state.column ? order : "none");
  });
  byId("rows").replaceChildren(...state.rows.slice(0, state.shown).map(row));
  byId("more").hidden = state.rows.length <= state.shown;
  byId("count").textContent = `${state.rows.length} of ${samples.length} clips`;
}

function row(sample) {
  const clip = data.clips[sample.key];
  const open = () => openSample(sample);
  const picture = clip?.strip ? [element("img", {src: clip.strip, alt: ""})] : [];
  const button = element("button", {type: "button", title: `Open ${sample.key}`}, sample.key);
  const texts = [element("p", {}, element("span", {class: "who"}, "reference"),
    element("span", {lang: sample.language || null, dir: "auto"}, reference(sample)))];
  data.runs.forEach((name, run) => {
    const one = sample.translations[run];
    const label = several ? name : "hypothesis";
    if (one) texts.push(sentence(label, one.hypothesis, "ins", sample.language));
  });
  const numbers = columns.slice(2).map(({value}) => {
    const found = value(sample);
    return element("td", {class: "number"}, found === null ? "" : score(found));
  });
  return element("tr", {click: open},
    element("td", {class: "clip"}, ...picture, button),
    element("td", {class: "sentences"}, ...texts), ...numbers);
}

function sortBy(column) {
  // The best score first, a text from A.
  state.down = state.column === column ? !state.down : Boolean(columns[column].number);
  state.column = column;
  state.shown = PAGE;
  update();
}

function setUpTable() {
  columns = columnsOf();
  byId("head").append(...columns.map(({title, number}, at) => {
    const button = element("button", {type: "button", click: () => sortBy(at)}, title);
    return element("th", {scope: "col", class: number ? "number" : null}, button);
  }));
  const restart = () => { state.shown = PAGE; update(); };
  byId("search").addEventListener("input", restart);
  byId("filter").addEventListener("change", restart);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => {
    const first = state.shown;
    state.shown += PAGE;
    update();
    byId("rows").children[first]?.querySelector("button").focus();
  });
  for (const option of byId("filter").options) {
    const has = {clip: Object.values(data.clips).some((clip) => clip.video),
                 attention: Object.keys(data.attention).length > 0};
    option.hidden = has[option.value] === false;
  }
  update();
}

// --- one sample

let opened = null;

function openSample(sample) {
  opened = sample;
  const clip = data.clips[sample.key];
  const facts = [sample.key, sample.corpus, clip?.signer && `signer ${clip.signer}`,
                 clip?.seconds && `${clip.seconds.toFixed(1)} s`].filter(Boolean);
  byId("sample-title").textContent = facts.join(" · ");
  const video = clip?.video ? element("video", {
    src: clip.video, width: clip.width, height: clip.height, controls: "", loop: "",
    autoplay: "", playsinline: "", "aria-label": `clip ${sample.key}`,
  }) : null;
  if (video) video.muted = true; // browsers start a video without a click only if it is muted
  const top = element("div", {class: "top"}, ...(video ? [video] : []), texts(sample));
  const parts = [top];
  if (clip?.problem) parts.push(element("p", {class: "note"}, clip.problem));
  const maps = data.attention[sample.key] || [];
  if (clip?.strip && !maps.length) parts.push(element("img", {src: clip.strip, alt: "frames of the clip"}));
  maps.forEach((map, run) => { if (map) parts.push(...heatMap(map, run, clip, video, sample.language || null)); });
  byId("sample-body").replaceChildren(...parts);
  const at = state.rows.indexOf(sample);
  // Not `disabled`: a button that is disabled would lose the focus.
  byId("previous").setAttribute("aria-disabled", at <= 0);
  byId("next").setAttribute("aria-disabled", at < 0 || at >= state.rows.length - 1);
  if (!byId("sample").open) byId("sample").showModal();
  setAddress(`#clip=${encodeURIComponent(sample.key)}`);
}

// The address of the page names the open sample, so that it can be sent to somebody.
function setAddress(hash) {
  history.replaceState(null, "", hash || location.pathname);
}

function openFromAddress() {
  const key = decodeURIComponent(location.hash.replace("#clip=", ""));
  const sample = samples.find((other) => other.key === key);
  if (sample) openSample(sample);
}

function texts(sample) {
  const box = element("div", {class: "sentences"});
  data.runs.forEach((name, run) => {
    const one = sample.translations[run];
    if (several) box.append(element("h3", {}, name));
    if (!one) {
      box.append(element("p", {class: "note"}, "This run has no hypothesis for the clip."));
      return;
    }
    box.append(sentence("reference", one.reference, "del", sample.language),
               sentence("hypothesis", one.hypothesis, "ins", sample.language),
               element("p", {}, `chrF ${score(one.chrf)}, BLEU ${score(one.bleu)}`));
    if (one.nbest.length > 1) {
      const items = one.nbest.map(([text, value]) =>
        element("li", {}, `${text} `, element("small", {}, value.toFixed(3))));
      box.append(element("details", {open: !several && ""},
        element("summary", {class: "who"}, `${items.length} best, with scores of the search`),
        element("ol", {class: "nbest"}, ...items)));
    }
  });
  return box;
}

function step(by) {
  const next = state.rows[state.rows.indexOf(opened) + by];
  if (next) openSample(next);
}

function setUpDialog() {
  const dialog = byId("sample");
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.target.tagName === "VIDEO") return; // arrow keys seek
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("close", () => {
    byId("sample-body").replaceChildren();
    setAddress("");
  });
}

// --- attention: words by time

function heatMap(map, run, clip, video, language) {
  const title = element("h3", {}, several ? `Attention of ${data.runs[run]}` : "Attention over time");
  if (map.problem) return [title, element("p", {class: "note"}, map.problem)];
  const frames = clip?.strip
    ? element("img", {src: clip.strip, alt: "frames of the clip, from its start to its end"}) : null;
  const seek = (time) => { if (video) { video.pause(); video.currentTime = time; } };
  const {table, mark} = heatTable(map, {start: 0, end: clip?.seconds || 0, frames, language, seek});
  video?.addEventListener("timeupdate", () => mark(video.currentTime));
  return [title, table];
}

if (samples.length) {
  setUpTable();
  setUpDialog();
  openFromAddress();
}
