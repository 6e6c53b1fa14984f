// A photo before and after with a divider: a range input moves it, so that keys, fingers and screen readers can; so
// does dragging on the picture.

export function make(tag, values = {}) {
  return Object.assign(document.createElement(tag), values);
}

// The two pictures and their divider; show(before, after, close) says which they are, and without an after only the first.
export function divider(name, say) {
  const before = make("img", { className: "before", loading: "lazy", draggable: false });
  const after = make("img", { className: "after", loading: "lazy", draggable: false });
  const line = make("div", { className: "line" });
  const stack = make("div", { className: "stack" });
  stack.append(before, after, line);
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", say("compare_divider", { name }));
  const move = () => {
    stack.style.setProperty("--at", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", say("compare_value", { before: slider.value, after: 100 - slider.value }));
  };
  slider.addEventListener("input", move);
  move();
  const drag = (event) => {
    if (slider.hidden || !(event.buttons & 1)) return;
    const { left, width } = before.getBoundingClientRect();
    slider.value = Math.round(100 * (event.clientX - left) / width);
    move();
  };
  stack.addEventListener("pointerdown", (event) => { stack.setPointerCapture(event.pointerId); drag(event); });
  stack.addEventListener("pointermove", drag);
  const box = make("div", { className: "compare" });
  box.append(stack, slider);
  const show = (first, second, close) => {
    before.src = first;
    before.alt = say(second ? "compare_before" : "compare_difference", { name });
    after.hidden = line.hidden = slider.hidden = !second;
    if (second) {
      after.src = second;
      after.alt = say("compare_after", { name });
    }
    stack.classList.toggle("close", close);
    stack.classList.toggle("dragged", Boolean(second));
  };
  return { before, box, show };
}

export function pair(photo, job, say) {
  const place = (kind) => `/jobs/${job}/shown/${photo.id}/${kind}`;
  const box = make("article", { className: "pair" });
  const { before, box: compared, show } = divider(photo.name, say);
  const trouble = make("p", { className: "problem", textContent: say("view_failed"), hidden: true });
  before.addEventListener("error", () => { trouble.hidden = false; compared.hidden = true; });
  const views = make("div", { className: "buttons" });
  views.setAttribute("role", "group");
  views.setAttribute("aria-label", say("compare_views", { name: photo.name }));
  const see = (view) => {
    const [first, second] = { whole: ["before", "after"], close: ["close-before", "close-after"] }[view] ?? [view];
    show(place(first), second && place(second), view === "close");
    for (const button of views.children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
  };
  for (const view of ["whole", "close", "difference"]) {
    const button = make("button", { type: "button", textContent: say(`view_${view}`) });
    button.dataset.view = view;
    button.addEventListener("click", () => see(view));
    views.append(button);
  }
  see("whole");
  const save = make("a", { className: "button", textContent: say("download"), href: `/jobs/${job}/download/${photo.id}` });
  save.setAttribute("aria-label", say("download_named", { name: photo.name }));
  save.download = photo.name;
  const buttons = make("div", { className: "buttons" });
  buttons.append(views, save);
  box.append(make("h3", { textContent: photo.name }), compared, trouble, buttons);
  if (photo.removed.length) {
    box.append(make("p", { className: "small", textContent: say("lost_data", { what: photo.removed.join(", ") }) }));
  }
  return box;
}
