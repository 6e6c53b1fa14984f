// One page, five states. What is known comes from the server's /jobs/ID/state; this file shows it and sends buttons on.
import { drawFaces, drawLook, facesKnown, pressed, strengthChanged } from "/static/choices.js";
import { make, pair } from "/static/compare.js";

const at = (id) => document.getElementById(id);
const SECTIONS = ["choosing", "settings", "working", "done", "failed"];
const OFTEN = 1000;
const SELDOM = 10000;
const HEARD = 5000;  // what was said to screen readers is stale then
let words = {};
let job = "";       // its name, also in the address, so that a reload and a second tab find it
let section = "";   // what is seen now
let last = {};      // the state as it came
let waiting = 0;    // the timer
let stopping = false;
const say = (name, values = {}) =>
  Object.entries(values).reduce((text, [key, value]) => text.replaceAll(`{${key}}`, String(value)), words[name] ?? name);
let forgetting = 0;  // the timer
function tell(text) {
  at("news").textContent = text;
  clearTimeout(forgetting);
  forgetting = setTimeout(() => { at("news").textContent = ""; }, HEARD);
}

async function ask(method, place, body, headers = {}) {
  let answer;
  try {
    answer = await fetch(place, { method, body, headers });
  } catch (error) {
    if (method === "GET" || error instanceof TypeError) at("lost").hidden = false;
    throw error;
  }
  at("lost").hidden = true;
  const data = (answer.headers.get("content-type") ?? "").includes("json") ? await answer.json() : {};
  if (!answer.ok) throw Object.assign(new Error(data.error ?? say("not_understood")), { status: answer.status });
  return data;
}
const send = (what, values = {}) => ask("POST", `/jobs/${job}/${what}`, JSON.stringify(values));

// A button that has the server do something: says in a sentence why it could not.
async function attempt(action) {
  at("trouble").hidden = true;
  try {
    return await action();
  } catch (error) {
    if (error.status) {
      at("trouble").textContent = error.message;
      at("trouble").hidden = false;
    }
    return undefined;
  }
}

function see(name) {
  if (section === name) return;
  const first = !section;
  section = name;
  for (const one of SECTIONS) at(one).hidden = one !== name;
  at("trouble").hidden = true;
  at("news").textContent = "";
  if (!first) at(`${name}-heading`).focus();
  if (name === "choosing") listWorks();
}

function show(state) {
  last = state;
  if (state.state === "choosing") {
    drawPhotos(state.photos);
    if (section !== "settings") see("choosing");
    else for (const draw of [drawTime, drawLook, drawFaces]) draw(state, say);
  } else {
    ({ working: drawWork, done: drawResult, failed: drawFailure })[state.state](state);
    see(state.state);
  }
}

async function poll() {
  clearTimeout(waiting);
  if (job) {
    try {
      show(await ask("GET", `/jobs/${job}/state`));
    } catch (error) {
      if (error.status === 404) await open("");
    }
  }
  const busy = last.state === "working" || ["test", "estimate", "look", "faces"].some((one) => last[one]?.running)
    || !at("lost").hidden;
  waiting = setTimeout(poll, busy && !document.hidden ? OFTEN : SELDOM);
}

async function open(name) {
  job = name;
  history.replaceState(null, "", name ? `#${name}` : "/");
  last = {};
  stopping = false;
  for (const id of ["photos", "problems", "pairs", "test-result"]) at(id).replaceChildren();
  drawn.clear();
  if (name) await poll();
  else {
    drawPhotos([]);
    see("choosing");
    listWorks();
  }
}

// --- photos ---------------------------------------------------------------------------------------------------------

const drawn = new Map();

function drawPhotos(photos) {
  const known = new Set(photos.map((photo) => photo.id));
  for (const [id, item] of drawn) if (!known.has(id)) { item.remove(); drawn.delete(id); }
  for (const photo of photos) {
    if (drawn.has(photo.id)) continue;
    const item = make("li");
    const remove = make("button", { type: "button", textContent: say("remove") });
    remove.setAttribute("aria-label", say("remove_named", { name: photo.name }));
    remove.addEventListener("click", () => attempt(async () => {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      await ask("DELETE", `/jobs/${job}/photos/${photo.id}`);
      (next?.querySelector("button") ?? at("files")).focus();
      tell(say("removed", { name: photo.name }));
      await poll();
    }));
    const picture = make("img", { src: `/jobs/${job}/preview/${photo.id}`, alt: "", loading: "lazy" });
    item.append(picture, make("span", { className: "small", textContent: photo.name }), remove);
    at("photos").append(item);
    drawn.set(photo.id, item);
  }
  const count = photos.length;
  at("next").disabled = !count;
  at("next").textContent = say(count ? (count === 1 ? "choose_next_one" : "choose_next") : "choose_next_none", { count });
  at("start").textContent = say(count === 1 ? "start_one" : "start", { count });
}

// A message stays until it is closed.
function complain(name, why) {
  const close = make("button", { type: "button", textContent: say("dismiss") });
  close.setAttribute("aria-label", say("dismiss_named", { name }));
  const item = make("p", { className: "problem", textContent: `${say("refused", { name, why })} ` });
  close.addEventListener("click", () => { item.remove(); at("files").focus(); });
  item.append(close);
  at("problems").append(item);
}

async function add(files) {
  let mine = job;
  for (const file of files) {
    if (job !== mine) break;  // another one was opened meanwhile
    at("reading").textContent = say("reading", { name: file.name });
    try {
      if (!job) {
        job = mine = (await ask("POST", "/jobs")).id;
        history.replaceState(null, "", `#${job}`);
      }
      if (file.size > 40 * 2 ** 20) throw Object.assign(new Error(say("too_large", { most: 40 })), { status: 413 });
      await ask("POST", `/jobs/${mine}/photos`, file, { "x-name": encodeURIComponent(file.name) });
      tell(say("added", { name: file.name }));
    } catch (error) {
      if (!error.status) break;
      complain(file.name, error.message);
    }
    if (job) await poll();
  }
  at("reading").textContent = "";
  at("files").value = "";
}

async function listWorks() {
  const works = (await attempt(() => ask("GET", "/jobs"))) ?? [];
  const others = works.filter((work) => work.id !== job && (work.photos.length || work.state !== "choosing"));
  at("earlier").hidden = !others.length;
  at("works").replaceChildren(...others.map((work) => {
    const item = make("li");
    const state = [say(`state_${work.state}`), ...(work.old ? [say("earlier_old")] : [])].join(", ");
    const text = make("span", { textContent: `${say("earlier_photos", { when: work.when, names: names(work) })} (${state})` });
    const take = make("button", { type: "button", textContent: say("earlier_open") });
    take.setAttribute("aria-label", say("earlier_open_named", { when: work.when }));
    take.addEventListener("click", () => { section = section === "choosing" ? "list" : section; open(work.id); });
    const remove = make("button", { type: "button", textContent: say("earlier_delete") });
    remove.setAttribute("aria-label", say("earlier_delete_named", { when: work.when }));
    remove.addEventListener("click", () => confirm(say("delete_sure")) && attempt(async () => {
      await ask("DELETE", `/jobs/${work.id}`);
      await listWorks();
      at("choosing-heading").focus();
    }));
    item.append(text, take, remove);
    return item;
  }));
}

// --- settings -------------------------------------------------------------------------------------------------------

const size = (bytes) => (bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`);
const chosen = () => ({ ...Object.fromEntries(new FormData(at("form"))), pressed: pressed() });

async function drawModels() {
  const models = (await attempt(() => ask("GET", "/models"))) ?? [];
  const old = chosen().model;
  const usual = Math.max(0, models.findIndex((model) => model.able && model.id !== "embedded")); // a real one, if any
  at("models").replaceChildren(...models.map((model, number) => {
    const label = make("label");
    const radio = make("input", { type: "radio", name: "model", value: model.id, disabled: !model.able });
    radio.checked = old ? model.id === old : number === usual;
    const text = make("span", { textContent: say("model_size", { name: model.name, size: size(model.bytes) }) });
    const more = [...(model.id === "embedded" ? [say("model_embedded_what")] : []), ...(model.why ? [model.why] : []),
      say("terms_heading", { terms: model.terms })];
    for (const line of more) text.append(make("small", { textContent: line }));
    label.append(radio, " ", text);
    return label;
  }));
  const others = models.some((model) => model.able && model.id !== "embedded");
  at("more-models").hidden = others;
  at("only-trial").hidden = others || !models.length;
  drawTrial();
}

function drawTrial() {
  at("start-trial").hidden = chosen().model !== "embedded";
}

function drawTime(state) {
  const { running, time, faces, error } = state.estimate;
  const lines = [running ? say("time_trying") : time ? say("time_found", { time: inWords(time) }) : error ?? say("time_unknown")];
  if (!running && faces !== null && faces !== undefined) {
    const all = state.photos.length;
    const missed = faces < all && ["faces", "largest"].includes(chosen().whom);
    lines.push(missed ? say("faces_not_found", { count: all - faces, all }) : say("faces_found", { count: faces, all }));
  }
  const text = lines.join(" ");
  if (at("time").textContent !== text) at("time").textContent = text;
}

function inWords(time) {  // "45 s", "12 min", "2.5 h": what the command line prints, or a number of seconds
  const seconds = typeof time === "number" ? time
    : Number.parseFloat(time) * (time.includes("min") ? 60 : time.includes("h") ? 3600 : 1);
  if (seconds < 50) return say("time_seconds", { count: Math.max(1, Math.ceil(seconds / 5) * 5) });
  const minutes = Math.round(seconds / 60);
  if (minutes <= 1) return say("time_minute");
  if (minutes < 120) return say("time_minutes", { count: minutes });
  return say("time_hours", { count: (seconds / 3600).toFixed(1).replace(".0", "") });
}

async function findFaces() {
  if (chosen().whom !== "everything" && !facesKnown(last) && !last.faces.running) await moment("faces");
}

const moment = (what) => attempt(async () => { await send(what, chosen()); await poll(); });

// --- at work --------------------------------------------------------------------------------------------------------

const names = ({ photos }) => {
  const [shown, more] = [photos.slice(0, 3).join(", "), photos.length - 3];
  return more > 0 ? say("earlier_more", { names: shown, count: more }) : shown;
};
const queued = (first) => (first ? say("phase_queued_after", { when: first.when, names: names(first) }) : say("phase_queued"));

function drawWork({ progress }) {
  const { phase, step, steps, left, first } = progress;
  const stops = stopping || progress.ends;
  const name = stops ? "phase_stopping" : phase === "working" && left !== null && left !== undefined ? "phase_left" : `phase_${phase}`;
  const text = name === "phase_queued" ? queued(first) : say(name, { step, steps, time: left ? inWords(left) : "" });
  at("open-first").hidden = !first;
  if (at("step").textContent !== text) at("step").textContent = text;
  if (steps && step) at("bar").value = step / steps;
  else at("bar").removeAttribute("value");
  at("stop").disabled = stops || phase === "writing";
  const every = Math.max(1, Math.round((steps ?? 1) / 4));  // a screen reader hears of a quarter, not of each step
  if (phase === "working" && step && step % every === 0) tell(text);
  at("so-far").hidden = !step;
  if (step && at("so-far").dataset.step !== `${job}${step}`) {
    at("so-far").dataset.step = `${job}${step}`;
    at("so-far-picture").src = `/jobs/${job}/so-far?${step}`;
  }
}

function drawFailure({ message, progress, resumes }) {
  at("why").textContent = message;
  at("again").textContent = say(resumes ? "go_on" : "failed_again");
  if (progress.step && resumes) at("why").textContent += ` ${say("phase_working", progress)}.`;
}

// --- the result -----------------------------------------------------------------------------------------------------

function drawResult(state) {
  const { result, settings, test } = state;
  const trial = settings.model.id === "embedded";
  const ended = result.complete ? "done_complete" : trial ? "done_partly_trial" : "done_partly";
  at("summary").textContent = say(ended, { rounds: result.rounds, steps: settings.rounds });
  at("done-trial").hidden = at("test-trial").hidden = !trial;
  at("post").hidden = trial;
  at("download-all").classList.toggle("main", !trial);
  at("go-on").hidden = result.complete || test.running;
  at("download-all").href = `/jobs/${job}/download`;
  const made = `${job}${result.rounds}`;
  if (at("pairs").dataset.made !== made || !at("pairs").children.length) {
    at("pairs").dataset.made = made;
    at("pairs").replaceChildren(...result.photos.map((photo) => pair(photo, job, say)));
  }
  at("test").hidden = !settings.model.testable;
  drawTest(test);
}

function drawTest({ running, done, left, first, stopped, error, figures }) {
  at("test-start").hidden = running || Boolean(figures.originals && figures.changed);
  at("test-stop").hidden = !running;
  at("test-bar").hidden = !running;
  if (running && !first) at("test-bar").value = done;
  else at("test-bar").removeAttribute("value");
  const more = left ? say("test_left", { time: inWords(left) }) : done ? "" : say("test_waiting");
  const now = running ? (first ? queued(first) : `${say("test_running", { done })} ${more}`.trim())
    : stopped ? say("test_stopped") : error ?? "";
  if (at("test-news").textContent !== now) at("test-news").textContent = now;
  if (running || !figures.originals || !figures.changed || at("test-result").dataset.made === job) return;
  at("test-result").dataset.made = job;
  const { originals, changed } = figures;
  const share = (one) => one.recognised / Math.max(1, one.pictures);
  const verdict = share(originals) < 0.5 ? "test_weak" : share(changed) < share(originals) ? "test_helped" : "test_helped_not";
  const sides = make("div", { className: "sides" });
  for (const kind of ["originals", "changed", "nobody"].filter((one) => figures[one])) {
    const side = make("section");
    side.append(make("p", { textContent: say(`test_${kind}`, figures[kind]) }));
    const list = make("ul", { className: "drawn" });
    figures[kind].files.forEach((_, number) => {
      const item = make("li");
      const alt = say("test_picture", { number: number + 1, kind: say(`kind_${kind}`) });
      item.append(make("img", { src: `/jobs/${job}/drawn/${kind}/${number}`, alt, loading: "lazy" }));
      list.append(item);
    });
    side.append(list);
    sides.append(side);
  }
  const outcome = make("p", { className: "large", textContent: say(verdict) });
  at("test-result").replaceChildren(outcome, make("p", { textContent: say("test_limits") }), sides);
}

// --- what is pressed ------------------------------------------------------------------------------------------------

function listen() {
  at("files").addEventListener("change", () => add([...at("files").files]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind.startsWith("drage") || kind === "dragover");
      if (kind === "drop" && section === "choosing") add([...event.dataTransfer.files]);
    });
  }
  at("next").addEventListener("click", async () => {
    see("settings");
    await drawModels();
    await moment("estimate");
    await findFaces();
  });
  at("back").addEventListener("click", () => see("choosing"));
  at("form").addEventListener("change", ({ target }) => {
    if (target.name === "model") {
      drawTrial();
      moment("estimate");
    }
    if (target.name === "strength") strengthChanged();
    if (target.name === "whom") {
      drawTime(last);
      drawFaces(last, say);
      findFaces();
    }
  });
  at("look-start").addEventListener("click", () => moment("look"));
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    act("start", chosen());
  });
  at("stop").addEventListener("click", () => { stopping = true; act("stop"); });
  at("throw-away").addEventListener("click", () => { if (confirm(say("throw_away_sure"))) act("throw-away"); });
  at("go-on").addEventListener("click", () => act("continue"));
  at("again").addEventListener("click", () => act("continue"));
  at("change").addEventListener("click", () => act("throw-away"));
  at("test-start").addEventListener("click", () => act("test"));
  at("test-stop").addEventListener("click", () => act("stop"));
  for (const id of ["another", "meanwhile"]) at(id).addEventListener("click", () => open(""));
  at("open-first").addEventListener("click", () => open(last.progress.first.id));
  at("delete").addEventListener("click", () => {
    if (confirm(say("delete_sure"))) attempt(async () => { await ask("DELETE", `/jobs/${job}`); await open(""); });
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  addEventListener("hashchange", () => open(location.hash.slice(1)));
}

// What a button has the server do; the button waits for the answer.
async function act(what, values = {}) {
  const button = document.activeElement;
  if (what === "start" || what === "continue") stopping = false;
  if (button instanceof HTMLButtonElement) button.disabled = true;
  const state = await attempt(() => send(what, values));
  if (button instanceof HTMLButtonElement) button.disabled = false;
  if (state) {
    if (section === "settings") section = "settings-left";
    show(state);
  }
  await poll();
}

async function begin() {
  words = await ask("GET", "/texts");
  const works = await ask("GET", "/jobs");
  const wanted = location.hash.slice(1) || (works.find((work) => work.state === "working")?.id ?? "");
  await open(works.some((work) => work.id === wanted) ? wanted : "");
  listen();
  drawModels();
  await poll();
}

begin();
