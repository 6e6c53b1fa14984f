// What helps to choose before the start: the three strengths on one's own photo, and faces to be chosen.
import { divider, make } from "/static/compare.js";

const at = (id) => document.getElementById(id);
let made = "";  // which look is shown
let shown = null;

export function drawLook(state, say) {
  const { running, photo, error, seconds } = state.look;
  const there = state.photos.find((one) => one.id === photo);
  const news = running ? say("look_running") : error ?? (there ? say("look_shown") : "");
  if (at("look-news").textContent !== news) at("look-news").textContent = news;
  at("look-start").disabled = running;
  at("look-bar").hidden = !running;
  at("look").hidden = running || !there;
  const name = `${state.id}${photo}${seconds}`;
  if (running || !there || made === name) return;
  made = name;
  const parts = divider(there.name, say);
  const only = make("input", { type: "checkbox" });
  const label = make("label");
  label.append(only, ` ${say("look_difference")}`);
  at("look").replaceChildren(parts.box, label);
  const place = (kind) => `/jobs/${state.id}/look/${kind}?${seconds}`;
  shown = () => {
    const strength = new FormData(at("form")).get("strength");
    if (only.checked) parts.show(place(`${strength}-difference`), undefined, true);
    else parts.show(place("before"), place(strength), true);
  };
  only.addEventListener("change", shown);
  shown();
}

export const strengthChanged = () => shown?.();

// Whether all photos that are chosen now were looked at.
export const facesKnown = ({ photos, faces }) => Boolean(faces.found) && photos.every((photo) => photo.id in faces.found);

export function drawFaces(state, say) {
  const { running } = state.faces;
  const found = facesKnown(state) ? state.faces.found : null;
  const whom = new FormData(at("form")).get("whom");
  const choosing = whom === "pressed";
  at("faces").hidden = !choosing || running || !found;
  const without = state.photos.filter((photo) => found && !found[photo.id].length).map((photo) => photo.name);
  const known = choosing ? say("faces_press") : without.length ? say("faces_missing", { names: without.join(", ") }) : "";
  const news = whom === "everything" ? "" : running ? say("faces_looking") : found ? known : "";
  if (at("faces-news").textContent !== news) at("faces-news").textContent = news;
  if (!found) {
    at("faces").replaceChildren();
    at("faces").dataset.made = "";
  }
  const name = `${state.id}${Object.keys(found ?? {})}`;
  if (!found || at("faces").dataset.made === name) return;
  at("faces").dataset.made = name;
  at("faces").replaceChildren(...state.photos.map((photo) => facesOf(photo, found[photo.id], state.id, say)));
}

function facesOf(photo, boxes, job, say) {
  if (!boxes.length) return make("p", { className: "small", textContent: say("faces_none", { name: photo.name }) });
  const frame = make("div", { className: "frame" });
  frame.append(make("img", { src: `/jobs/${job}/preview/${photo.id}`, alt: "" }));
  boxes.forEach(([left, top, right, bottom], number) => {
    const face = make("button", { type: "button", className: "face" });
    face.setAttribute("aria-label", say("face", { number: number + 1, name: photo.name }));
    face.setAttribute("aria-pressed", "false");
    Object.assign(face.dataset, { photo: photo.id, number });
    const edges = { left, top, width: right - left, height: bottom - top };
    for (const [edge, value] of Object.entries(edges)) face.style.setProperty(edge, `${value}%`);
    face.addEventListener("click", () => {
      face.setAttribute("aria-pressed", String(face.getAttribute("aria-pressed") !== "true"));
    });
    frame.append(face);
  });
  return frame;
}

export function pressed() {
  const faces = {};
  for (const face of at("faces").querySelectorAll("[aria-pressed=true]")) {
    (faces[face.dataset.photo] ??= []).push(Number(face.dataset.number));
  }
  return faces;
}
