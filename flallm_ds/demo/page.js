// The page of `flallm demo`. `heatTable` and `element` are in heat_map.js, which comes before.
"use strict";

const SHOWN_FRAMES = 8, SHOWN_HYPOTHESES = 5, ASK_AGAIN_MS = 1000;
const RECORDINGS = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm", "video/mp4"];

const of = (id) => document.getElementById(id);
let info = null;      // the answer of /api/info
let chosen = null;    // the video: a File, or the Blob of a recording
let request = null;   // the upload that is in progress
let camera = null;    // the stream of the camera
let recorder = null;
let addresses = [];   // of blobs, which are released when another video is chosen
let marks = [];       // functions that mark a time in the tables of the attention
let problem = "";     // why the last sentence has no attention

// --- texts: always as text, never as HTML

function add(parent, tag, text = "", properties = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  Object.assign(element, properties);
  parent.append(element);
  return element;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

function say(text) { of("state").textContent = text; }
function complain(text) { of("error").textContent = text; }

function megabytes(bytes) { return `${(bytes / 1e6).toFixed(1)} MB`; }

// --- the model

async function askAboutTheModel() {
  try {
    info = await (await fetch("api/info")).json();
  } catch {
    of("model").textContent = "The server does not answer. Is flallm demo running?";
    setTimeout(askAboutTheModel, 3 * ASK_AGAIN_MS);
    return;
  }
  of("limits").textContent =
    `At most ${info.max_mb} MB and ${info.max_s} s. The server keeps no video.`;
  if (!info.ready) {
    of("model").textContent = `Model ${info.title} is being loaded.`;
    setTimeout(askAboutTheModel, ASK_AGAIN_MS);
    return;
  }
  const names = info.languages.map((language) => nameOf(language));
  const into = names.length ? ` into ${names.join(", ")}` : "";
  of("model").textContent = `Model ${info.title}${into}, on ${info.device === "cuda" ? "a GPU" : "the CPU"}.`;
  for (const language of info.languages) {
    add(of("language"), "option", nameOf(language), { value: language.name });
  }
  of("of-language").hidden = info.languages.length < 2;
}

function nameOf(language) {
  try {
    return new Intl.DisplayNames(["en"], { type: "language" }).of(language.tag) || language.name;
  } catch {
    return language.name;
  }
}

function languageTag() {
  const languages = info && info.ready ? info.languages : [];
  const named = languages.find((language) => language.name === of("language").value);
  const found = named || languages[0];
  return found ? found.tag : "";
}

// --- choosing a video

function choose(video, name) {
  stop();
  closeCamera();
  clearResult();
  addresses.forEach(URL.revokeObjectURL);
  addresses = [];
  chosen = video;
  complain("");
  say("");
  of("preview").hidden = false;
  of("video").hidden = false;
  of("video").src = address(video);
  of("name").textContent = `${name}, ${megabytes(video.size)}`;
  of("translate").disabled = false;
}

function address(blob) {
  addresses.push(URL.createObjectURL(blob));
  return addresses[addresses.length - 1];
}

of("file").addEventListener("change", () => {
  const [file] = of("file").files;
  if (file) choose(file, file.name);
});
of("video").addEventListener("error", () => {
  if (!chosen || camera) return;
  of("video").hidden = true;
  of("name").textContent += " (this browser cannot play it; the model may still read it)";
});

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    of("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    const [file] = event.dataTransfer ? event.dataTransfer.files : [];
    if (name === "drop" && file) choose(file, file.name);
  });
}

// --- recording

of("camera").addEventListener("click", async () => {
  stop();
  complain("");
  if (!navigator.mediaDevices || !window.MediaRecorder) {
    complain("The browser gives the camera only to pages of this machine (localhost) or of HTTPS.");
    return;
  }
  closeCamera();
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: true, audio: false });
  } catch (error) {
    complain(`Cannot use the camera: ${error.message || error.name}.`);
    return;
  }
  clearResult();
  chosen = null;
  of("translate").disabled = true;
  of("name").textContent = "";
  of("preview").hidden = of("recording").hidden = of("video").hidden = false;
  of("video").removeAttribute("src");
  of("video").srcObject = camera;
  of("video").play().catch(() => {});
  of("record").focus();
});

of("record").addEventListener("click", () => {
  if (recorder) {
    recorder.stop();
    return;
  }
  const type = RECORDINGS.find((name) => MediaRecorder.isTypeSupported(name));
  const begin = Date.now();
  const chunks = [];
  const current = new MediaRecorder(camera, type ? { mimeType: type } : {});
  recorder = current;
  const timer = setInterval(() => {
    const seconds = (Date.now() - begin) / 1000;
    of("recorded").textContent = clock(seconds);
    if (info && seconds >= info.max_s - 1 && current.state === "recording") current.stop();
  }, 250);
  current.addEventListener("dataavailable", (event) => chunks.push(event.data));
  current.addEventListener("stop", () => {
    clearInterval(timer);
    if (recorder !== current) return;  // the camera was closed
    choose(new Blob(chunks, { type: current.mimeType }), `Recording of ${clock((Date.now() - begin) / 1000)}`);
    of("translate").focus();
  });
  current.start(1000);
  of("record").textContent = "Stop recording";
});

of("leave").addEventListener("click", () => {
  closeCamera();
  of("preview").hidden = true;
  of("camera").focus();
});

function closeCamera() {
  const running = recorder;
  recorder = null;
  if (running && running.state !== "inactive") running.stop();
  if (camera) camera.getTracks().forEach((track) => track.stop());
  camera = null;
  of("video").srcObject = null;
  of("recording").hidden = true;
  of("record").textContent = "Start recording";
  of("recorded").textContent = "";
}

// --- translating

of("translate").addEventListener("click", () => {
  complain("");
  clearResult();
  if (info && chosen.size > info.max_mb * 1e6) {
    complain(`The video must be at most ${info.max_mb} MB, got ${megabytes(chosen.size)}.`);
    return;
  }
  send(chosen);
});
of("cancel").addEventListener("click", () => {
  stop();
  say("Cancelled.");
  of("translate").focus();
});

function query() {
  const asked = new URLSearchParams({ frames: SHOWN_FRAMES, attention: true });
  asked.set("nbest", info && info.ready ? Math.min(SHOWN_HYPOTHESES, info.beams) : 1);
  if (of("long").value) asked.set("long", of("long").value);
  if (info && info.ready && info.languages.length > 1) asked.set("language", of("language").value);
  return asked;
}

function send(video) {
  const begin = performance.now();
  const current = new XMLHttpRequest();
  let read = 0, ended = false, sentSeconds = 0;
  request = current;
  showProgress(0);
  say("Sending the video: 0 %");
  current.open("POST", `api/translate?${query()}`);
  current.setRequestHeader("Accept", "application/x-ndjson");
  current.upload.addEventListener("progress", (event) => {
    if (!event.lengthComputable) return;
    showProgress(event.loaded / event.total);
    say(`Sending the video: ${Math.floor(100 * event.loaded / event.total)} %`);
  });
  current.upload.addEventListener("load", () => { sentSeconds = (performance.now() - begin) / 1000; });
  const take = () => {
    if (current.status !== 200) return;
    const lines = current.responseText.slice(read).split("\n");
    const rest = lines.pop();
    read = current.responseText.length - rest.length;
    for (const line of lines) ended = show(JSON.parse(line), sentSeconds) || ended;
  };
  current.addEventListener("progress", take);
  current.addEventListener("loadend", () => {
    if (request !== current) return;  // cancelled, or another video was chosen
    take();
    stop();
    if (ended) return;
    say("");
    complain(errorOf(current));
  });
  // Not current.send(video): the type of a Blob is not needed, and a name is never sent.
  current.send(new Blob([video], { type: "application/octet-stream" }));
}

function errorOf(current) {
  try {
    if (current.status !== 200) return JSON.parse(current.responseText).error;
  } catch {
    // not an answer of this server
  }
  return "The connection to the server was lost. Is flallm demo running?";
}

function stop() {
  const running = request;
  request = null;
  if (running) running.abort();
  of("cancel").hidden = of("progress").hidden = true;
  of("translate").disabled = !chosen;
}

function showProgress(share) {
  of("cancel").hidden = of("progress").hidden = false;
  of("translate").disabled = true;
  if (share === null) of("progress").removeAttribute("value");
  else of("progress").value = share;
}

/* Show an event of the server; return whether it is the last one. */
function show(event, sentSeconds) {
  if (event.state === "waiting") {
    const others = event.before === 1 ? "1 other video is" : `${event.before} other videos are`;
    say(`Waiting: ${others} translated first.`);
    showProgress(null);
  } else if (event.state === "loading") {
    say("Waiting: the model is being loaded.");
    showProgress(null);
  } else if (event.state === "translating") {
    say("Translating.");
    showProgress(null);
  } else if (event.part) {
    showPart(event.part);
  } else if (event.error) {
    say("");
    complain(event.error);
    return true;
  } else if (event.done) {
    showEnd(event.done, sentSeconds);
    return true;
  }
  return false;
}

// --- the result

function clearResult() {
  of("parts").replaceChildren();
  of("result").hidden = of("save").hidden = true;
  of("announced").textContent = of("timing").textContent = "";
  marks = [];
  problem = "";
  of("video").querySelectorAll("track").forEach((track) => track.remove());
}

function showPart(part) {
  of("result").hidden = false;
  const item = add(of("parts"), "li");
  const line = add(item, "p", "", { className: "sentence", dir: "auto" });
  if (part.is_part) {
    const button = add(line, "button", `${clock(part.start_s)} – ${clock(part.end_s)}`, { type: "button" });
    button.title = "Show this in the video";
    button.addEventListener("click", () => { of("video").currentTime = part.start_s; });
  }
  add(line, "span", part.sentence || "(no words)", { lang: languageTag() });
  // Not the whole item: a screen reader would read the tables, too.
  Object.assign(of("announced"), { textContent: part.sentence, lang: languageTag() });
  const strip = add(item, "div", "", { className: "strip" });
  for (const frame of part.frames) add(strip, "img", "", { src: frame, alt: "" });
  if (part.num_frames < part.num_sampled) {
    add(item, "p", `The model reads ${part.num_frames} of ${part.num_sampled} frames, its limit, so movements are ` +
      "skipped. Cut the video at pauses.", { className: "note" });
  }
  showAttention(item, part);
  if (part.nbest.length > 1) showHypotheses(item, part.nbest);
}

function showAttention(item, part) {
  const map = part.attention;
  // A model that gives no attention gives none for any sentence: say so once.
  if (map.problem && map.problem !== problem) add(item, "p", map.problem, { className: "note" });
  problem = map.problem || "";
  if (map.problem || !map.words.length) return;
  const language = languageTag() || null;
  const details = add(item, "details", "", { className: "attention" });
  add(details, "summary", "Attention over time");
  const fill = () => {
    if (!details.open || details.children.length > 1) return;
    const pictures = part.frames.map((frame) => element("img", { src: frame, alt: "" }));
    const frames = element("div", { class: "frames", role: "img",
      "aria-label": "frames of the clip, from its start to its end" }, ...pictures);
    const seek = (time) => { of("video").pause(); of("video").currentTime = time; };
    const { table, mark } = heatTable(map, {
      start: part.start_s, end: part.end_s, frames, language, seek,
    });
    details.append(table);
    marks.push(mark);
  };
  // A long video has many sentences: the tables of the others are made when they are opened.
  details.addEventListener("toggle", fill);
  details.open = item === of("parts").firstElementChild;
  fill();
}

of("video").addEventListener("timeupdate", () => marks.forEach((mark) => mark(of("video").currentTime)));

function showHypotheses(item, nbest) {
  const details = add(item, "details");
  add(details, "summary", `${nbest.length} best hypotheses`);
  const table = add(details, "table");
  add(table, "caption", "Score: log probability by length; higher is better.");
  const head = add(add(table, "thead"), "tr");
  add(head, "th", "Score", { scope: "col" });
  add(head, "th", "Sentence", { scope: "col" });
  const body = add(table, "tbody");
  for (const [sentence, score] of nbest) {
    const row = add(body, "tr");
    add(row, "td", score === null ? "" : score.toFixed(3));
    add(row, "td", sentence, { lang: languageTag(), dir: "auto" });
  }
}

function showEnd(done, sentSeconds) {
  of("result").hidden = false;
  if (!done.parts.length) {
    add(of("parts"), "li", "Nothing moves in this video, so it has no sentence.");
  }
  const number = done.parts.length === 1 ? "1 sentence" : `${done.parts.length} sentences`;
  say(`Done: ${number}.`);
  const times = [`sending ${sentSeconds.toFixed(1)} s`];
  if (done.waited_s >= 0.05) times.push(`waiting ${done.waited_s.toFixed(1)} s`);
  times.push(`reading the video ${done.read_s.toFixed(1)} s`, `model ${done.model_s.toFixed(1)} s`,
    `attention ${done.attention_s.toFixed(1)} s`);
  of("timing").textContent = `Time: ${times.join(", ")}.`;
  if (done.parts.some((part) => part.is_part)) {
    const url = address(new Blob([done.subtitles], { type: "text/vtt" }));
    of("save").hidden = false;
    Object.assign(of("subtitles"), { href: url, download: "subtitles.vtt" });
    const track = add(of("video"), "track", "", { kind: "subtitles", src: url, srclang: languageTag(), label: "Translation" });
    track.track.mode = "showing";
  }
}

askAboutTheModel();
