// A photo before and after with a divider: a range input moves it, so that keys, fingers and screen readers can.

export function pair(photo, job, say) {
  const place = (kind) => `/jobs/${job}/shown/${photo.id}/${kind}`;
  const box = make("article", { className: "pair" });
  const heading = make("h3", { textContent: photo.name });
  const before = make("img", { className: "before", loading: "lazy" });
  const after = make("img", { className: "after", loading: "lazy" });
  const line = make("div", { className: "line" });
  const stack = make("div", { className: "stack" });
  stack.append(before, after, line);
  const trouble = make("p", { className: "problem", textContent: say("view_failed"), hidden: true });
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", say("compare_divider", { name: photo.name }));
  const views = make("div", { className: "buttons" });
  views.setAttribute("role", "group");
  views.setAttribute("aria-label", say("compare_views", { name: photo.name }));

  const move = () => {
    stack.style.setProperty("--at", `${slider.value}%`);
    const shares = { before: slider.value, after: 100 - slider.value };
    slider.setAttribute("aria-valuetext", say("compare_value", shares));
  };
  const show = (view) => {
    const difference = view === "difference";
    before.src = place(difference ? "difference" : view === "close" ? "close-before" : "before");
    before.alt = say(difference ? "compare_difference" : "compare_before", { name: photo.name });
    after.hidden = line.hidden = slider.hidden = difference;
    if (!difference) {
      after.src = place(view === "close" ? "close-after" : "after");
      after.alt = say("compare_after", { name: photo.name });
    }
    stack.classList.toggle("close", view === "close");
    for (const button of views.children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
  };
  for (const view of ["whole", "close", "difference"]) {
    const button = make("button", { type: "button", textContent: say(`view_${view}`) });
    button.dataset.view = view;
    button.addEventListener("click", () => show(view));
    views.append(button);
  }
  before.addEventListener("error", () => { trouble.hidden = false; stack.hidden = slider.hidden = true; });
  slider.addEventListener("input", move);
  move();
  show("whole");

  const save = make("a", { className: "button", textContent: say("download"), href: `/jobs/${job}/download/${photo.id}` });
  save.setAttribute("aria-label", say("download_named", { name: photo.name }));
  save.download = photo.name;
  views.append(save);
  box.append(heading, stack, slider, trouble, views);
  if (photo.removed.length) {
    box.append(make("p", { className: "small", textContent: say("lost_data", { what: photo.removed.join(", ") }) }));
  }
  return box;
}

export function make(tag, values = {}) {
  return Object.assign(document.createElement(tag), values);
}
