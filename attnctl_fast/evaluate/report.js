"use strict";
// Texts of the sweep only ever become the text of an element, and paths are put together from numbers and the names of
// methods: nothing of a prompt is markup or a path.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const state = { method: null, filter: "all", terms: [], page: 0, found: [] };
const PAGE = 24;
const PLAIN = data.methods.indexOf("plain");

const stem = (place, seed, method) => `${String(place).padStart(5, "0")}-${seed}-${data.methods[method]}`;
const source = (folder, place, seed, method) => {
  const file = `${folder}/${stem(place, seed, method)}.png`;
  if (data.embedded) return data.embedded[file] ?? "";
  return file;
};

// A cell of a row is null (not in the sweep), a text (why it failed), or its scores, null where it has none.
const scores = (cell) => (Array.isArray(cell) ? cell : null);
const hit = {
  gained: (plain, cell, at) => better(cell, plain, at),
  lost: (plain, cell, at) => better(plain, cell, at),
  failed: (plain, cell, at) => typeof cell === "string" || (scores(cell) !== null && cell[at] === false),
};
const better = (one, other, at) =>
  scores(one) !== null && scores(other) !== null && one[at] !== null && other[at] !== null && one[at] > other[at];

function shown([place, , cells]) {
  const text = data.lowered[place];
  if (!state.terms.every((term) => text.includes(term))) return false;
  if (state.filter === "all") return true;
  const at = Number(find("criterion").value || 0);
  const test = (method) => cells[method] !== null && hit[state.filter](cells[PLAIN] ?? null, cells[method], at);
  if (state.method !== null) return test(state.method);
  return cells.some((_, method) => (state.filter === "failed" || method !== PLAIN) && test(method));
}

function mark(value, score) {
  if (value === null || value === undefined) return null;
  if (typeof value !== "boolean") return make("span", `${score.title} ${Number(value).toFixed(score.digits)}`);
  return make("span", `${score.title} ${value ? "✓" : "✗"}`, { class: value ? "good" : "bad" });
}

function figure(place, seed, cell, method) {
  const box = make("figure", undefined, { "data-method": method });
  box.hidden = state.method !== null && state.method !== method;
  const caption = make("figcaption");
  caption.append(make("b", data.methods[method]));
  if (cell === null) {
    caption.append(" · not in the sweep");
  } else if (typeof cell === "string") {
    caption.append(" ", make("span", cell, { class: "bad" }));
  } else {
    const path = source("pictures", place, seed, method);
    const frame = make(data.embedded ? "span" : "a", undefined, { class: "frame" });
    if (!data.embedded) {
      for (const [key, value] of [["href", path], ["target", "_blank"], ["rel", "noopener"]]) frame.setAttribute(key, value);
    }
    frame.style.aspectRatio = data.size.join(" / ");
    const image = make("img", undefined, { loading: "lazy", decoding: "async" });
    image.alt = `${data.methods[method]}, seed ${seed}: ${data.prompts[place]}`;
    image.src = path;
    frame.append(image);
    box.append(frame);
    cell.forEach((value, at) => {
      const found = mark(value, data.scores[at]);
      if (found) caption.append(" · ", found);
    });
  }
  box.append(caption);
  return box;
}

function heat(article, place, seed, word, count) {
  for (const old of article.querySelectorAll(".heat")) old.remove();
  if (word === null) return;
  for (const box of article.querySelectorAll("figure")) {
    const method = Number(box.dataset.method);
    const frame = box.querySelector(".frame");
    if (!frame || !data.mapped[`${place} ${seed} ${method}`]) continue;
    const layer = make("span", undefined, { class: "heat" });
    // The maps of all words lie below each other in one file.
    layer.style.backgroundImage = `url("${source("maps", place, seed, method)}")`;
    layer.style.backgroundSize = `100% ${count * 100}%`;
    layer.style.backgroundPosition = `0 ${count > 1 ? (100 * word) / (count - 1) : 0}%`;
    frame.append(layer);
  }
}

function row([place, seed, cells]) {
  const article = make("article", undefined, { tabindex: "-1" });
  article.append(make("h2", data.prompts[place], { dir: "auto" }), make("p", `seed ${seed}`, { class: "seed" }));
  const words = data.words[place];
  if (words) {
    const list = make("div", undefined, { class: "words", role: "group", "aria-label": "Attention to" });
    words.forEach((word, index) => {
      const button = make("button", word, { type: "button", dir: "auto" });
      const show = () => heat(article, place, seed, index, words.length);
      const hide = () => heat(article, place, seed, null);
      for (const event of ["pointerenter", "focus"]) button.addEventListener(event, show);
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, hide);
      list.append(button);
    });
    article.append(list);
  }
  const pictures = make("div", undefined, { class: "pictures" });
  cells.forEach((cell, method) => pictures.append(figure(place, seed, cell, method)));
  article.append(pictures);
  return article;
}

function draw() {
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
  state.page = Math.min(Math.max(0, state.page), pages - 1);
  const part = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE);
  find("rows").replaceChildren(...part.map(row));
  find("page").textContent = `Page ${state.page + 1} of ${pages}`;
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page === pages - 1;
  find("count").textContent = `${state.found.length} of ${data.rows.length} prompts and seeds`;
}

function filter() {
  state.found = data.rows.filter(shown);
  state.page = 0;
  draw();
}

function turn(by) {
  state.page += by;
  draw();
  find("rows").scrollIntoView({ block: "start" });
}

function choose(method, focus) {
  state.method = method;
  for (const tab of find("tabs").children) {
    const chosen = tab.dataset.method === String(method ?? "");
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen && focus) tab.focus();
    if (chosen) find("rows").setAttribute("aria-labelledby", tab.id);
  }
  find("rows").dataset.show = method ?? "";
  if (state.filter !== "all") {
    filter();
    return;
  }
  for (const box of document.querySelectorAll("figure")) {
    box.hidden = method !== null && box.dataset.method !== String(method);
  }
}

function move(by) {
  const all = [...find("rows").children];
  const at = all.indexOf(document.activeElement?.closest("article"));
  const next = all[at === -1 ? 0 : Math.min(Math.max(0, at + by), all.length - 1)];
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
}

function key(event) {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typing) event.target.blur();
  // Arrows are those of a field or of the table where one of these has them.
  if (typing || (event.target.matches(".wide") && event.key.startsWith("Arrow"))) return;
  const count = data.methods.length;
  const step = (by) => {
    const next = ((state.method === null ? 0 : state.method + 1) + by + count + 1) % (count + 1);
    choose(next === 0 ? null : next - 1, event.target.matches("[role=tab]"));
  };
  const actions = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    j: () => move(1),
    k: () => move(-1),
    n: () => turn(1),
    p: () => turn(-1),
    "/": () => find("search").focus(),
  };
  const digit = /^[0-9]$/.test(event.key) ? Number(event.key) : null;
  if (digit !== null && digit <= count) choose(digit === 0 ? null : digit - 1, false);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function begin() {
  document.title = data.title;
  document.querySelector("h1").textContent = data.title;
  find("about").textContent = data.about;
  data.lowered = data.prompts.map((prompt) => prompt.toLowerCase());
  document.body.classList.toggle("coarse", data.size[0] < 128);
  const [head, ...lines] = data.table;
  const top = make("tr");
  top.append(...head.map((text) => make("th", text, { scope: "col" })));
  document.querySelector("thead").append(top);
  for (const line of lines) {
    const tr = make("tr");
    tr.append(...line.map((text, at) => make(at ? "td" : "th", text, at ? {} : { scope: "row" })));
    document.querySelector("tbody").append(tr);
  }
  ["side by side", ...data.methods].forEach((name, index) => {
    const tab = make("button", name, { type: "button", role: "tab", id: `tab-${index}`, "aria-controls": "rows" });
    tab.dataset.method = index ? index - 1 : "";
    tab.addEventListener("click", () => choose(index ? index - 1 : null, false));
    find("tabs").append(tab);
  });
  data.scores.forEach((score, at) => find("criterion").append(make("option", score.title, { value: at })));
  find("criterion").disabled = data.scores.length === 0;
  find("criterion").addEventListener("change", filter);
  find("filters").addEventListener("change", (event) => {
    state.filter = event.target.value;
    filter();
  });
  find("search").addEventListener("input", (event) => {
    state.terms = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    filter();
  });
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", key);
  choose(null, false);
  filter();
}

begin();
