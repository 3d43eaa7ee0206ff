// Code shared by all views: decoding, colours, the stage with its controls, the cursor.
// No imports and no requests, so that the same file works in Jupyter, in a page and from disk.
//
// A view is a function (frame) => behaviour, registered by name in `views`. A frame is what Python's
// `View` packs: {kind, title, summary, times, items, unit, words …, arrays: {name: {data, shape}}}.
// A behaviour has: height(width), paint(g, cursor), locate(x, y) => {time, item} | null,
// describe(time, item) => text, place(time, item) => rectangle, table(cursor) => rows, and optionally
// actions: [{label, key, run(cursor) => change}] and where(time) => text.

const views = {};

// ------------------------------------------------------------------------------------------ the frame

const READERS = { f4: Float32Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array };

function decode(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const frame = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const { name, dtype, shape, offset, low, step } of frame.arrays) {
    const count = shape.reduce((a, b) => a * b, 1);
    const raw = new READERS[dtype](buffer, offset, count);
    const data = step ? Float32Array.from(raw, (q) => low + step * q) : raw;
    arrays[name] = { data, shape, step: step || 0 };
  }
  return { ...frame, arrays };
}

// Format a number; values that were rounded to fit a page begin with ≈.
function exact(value, step = 0) {
  if (!Number.isFinite(value)) return "none";
  if (Number.isInteger(value) && !step) return String(value);
  const digits = step ? Math.max(0, Math.min(4, Math.ceil(-Math.log10(step)))) : 4;
  return (step ? "≈ " : "") + value.toFixed(digits);
}

// Format for axes and legends: three digits, no trailing zeros.
const brief = (value) => String(Number(value.toPrecision(3)));

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// ---------------------------------------------------------------------------------------------- colour

// cividis: perceptually uniform, and safe for colour-blind readers.
const CIVIDIS = ["00224e", "003170", "2a3f6d", "434e6c", "575d6d", "6a6c71", "7d7c78", "918b78", "a59c74",
  "bcae6c", "d2c060", "e9d34e", "fee838"].map((h) => [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16)));

function cividis(x) {
  const at = clamp(x, 0, 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return CIVIDIS[low].map((c, i) => Math.round(c + (at - low) * (CIVIDIS[low + 1][i] - c)));
}

const PALETTE = Array.from({ length: 256 }, (_, i) => cividis(i / 255));
const rgb = (x) => `rgb(${PALETTE[Math.round(clamp(x, 0, 1) * 255)].join()})`;
const onColour = (x) => (x > 0.55 ? "#000" : "#fff"); // readable text colour on rgb(x)

// One colour per role, the same in every picture of the lab.
const ROLE = { input: "#0072b2", forget: "#d55e00", output: "#009e73", memory: "#0072b2", attention: "#7a7a7a",
  written: "#0072b2", read: "#d55e00", loss: "#7a7a7a" };
const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a7a7a", "#b58900"];
const colourOf = (name, i) => ROLE[name] || SERIES[i % SERIES.length];

// ------------------------------------------------------------------------------------- drawing helpers

class Painter {
  constructor(canvas, width, height, theme) {
    const ratio = globalThis.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    this.ctx = canvas.getContext("2d");
    this.ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.ctx.clearRect(0, 0, width, height);
    Object.assign(this, { width, height }, theme);
    this.tile ||= document.createElement("canvas");
  }

  // Draw a matrix as colours: values(i) in 0 … 1 or NaN, row by row.
  cells(x, y, width, height, columns, rows, values) {
    this.pixels(x, y, width, height, columns, rows, (i) => {
      const value = values(i);
      return Number.isNaN(value) ? null : PALETTE[Math.round(clamp(value, 0, 1) * 255)];
    });
  }

  // Draw a matrix whose cell i has the colour colour(i), as [red, green, blue] or null, row by row.
  pixels(x, y, width, height, columns, rows, colour) {
    this.tile.width = columns;
    this.tile.height = rows;
    const small = this.tile.getContext("2d"), image = small.createImageData(columns, rows);
    for (let i = 0; i < columns * rows; i++) {
      const rgb = colour(i);
      if (rgb) image.data.set([rgb[0], rgb[1], rgb[2], 255], 4 * i);
    }
    small.putImageData(image, 0, 0);
    this.ctx.imageSmoothingEnabled = false;
    this.ctx.drawImage(this.tile, x, y, width, height);
  }

  text(words, x, y, { align = "left", colour = this.ink, size = 12, bold = false, room = 0 } = {}) {
    this.ctx.font = `${bold ? "600 " : ""}${size}px ${this.font}`;
    this.ctx.textAlign = align;
    this.ctx.textBaseline = "middle";
    this.ctx.fillStyle = colour;
    if (room) this.ctx.fillText(words, x, y, room);
    else this.ctx.fillText(words, x, y);
  }

  line(points, colour, width = 1.5, dash = []) {
    this.ctx.beginPath();
    points.forEach(([x, y], i) => (i ? this.ctx.lineTo(x, y) : this.ctx.moveTo(x, y)));
    this.ctx.setLineDash(dash);
    this.ctx.strokeStyle = colour;
    this.ctx.lineWidth = width;
    this.ctx.stroke();
    this.ctx.setLineDash([]);
  }

  rect(x, y, width, height, colour) {
    this.ctx.fillStyle = colour;
    this.ctx.fillRect(x, y, width, height);
  }

  // A black outline inside a white one is visible on every colour.
  mark(x, y, width, height) {
    const ctx = this.ctx;
    ctx.lineWidth = 3;
    ctx.strokeStyle = "#fff";
    ctx.strokeRect(x - 1, y - 1, width + 2, height + 2);
    ctx.lineWidth = 1.5;
    ctx.strokeStyle = "#000";
    ctx.strokeRect(x - 1, y - 1, width + 2, height + 2);
  }

  // Draw the legend of the colour map, right-aligned at x.
  legend(x, y, low, high, label) {
    const width = 90;
    this.cells(x - width - 34, y - 5, width, 10, 64, 1, (i) => i / 63);
    this.text(low, x - width - 38, y, { align: "right", size: 11, colour: this.faint });
    this.text(high, x, y, { align: "right", size: 11, colour: this.faint, room: 32 });
    this.text(label, x - width - 62, y, { align: "right", size: 11, colour: this.faint });
  }
}

// ------------------------------------------------------------------------------------------- the stage

// Jupyter loads this file once per widget, so state shared by views must be global to the page.
const shared = (globalThis.memlib ||= { bus: new EventTarget(), stages: 0 });

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// SVG icons, because not every font has the symbols of media players.
const ICONS = { first: "M3 3h2v10H3zM13 3v10L6 8z", back: "M11 3v10L4 8z", play: "M4 2l10 6-10 6z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z", forward: "M5 3v10l7-5z", last: "M11 3h2v10h-2zM3 3v10l7-5z" };
const icon = (name) => `<svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">` +
  `<path d="${ICONS[name]}" fill="currentColor"/></svg>`;

const calm = () => globalThis.matchMedia("(prefers-reduced-motion: reduce)").matches;

// Build a view inside `root`. Returns {show(frame), go(change), free()}. `tell(message)` receives the user's
// actions: {type: "cursor", time, item, choice} and {type: "action", name}.
function mount(root, firstFrame, tell = () => {}) {
  const id = `memlib-${++shared.stages}`;
  const cursor = { time: 0, item: 0, pin: null, choice: {} };
  let frame, view, playing = null, queued = false, paints = 0, width = 0, painter = null, keyTime = 0;

  const button = (label, sign, run) => {
    const made = element("button", { type: "button", "aria-label": label, title: label, onclick: run });
    made.innerHTML = icon(sign);
    return made;
  };
  const play = button("Play", "play", () => (playing ? pause() : start()));
  const scrubber = element("input", { type: "range", min: 0, value: 0, step: 1, oninput: () =>
    set({ time: Number(scrubber.value) }) });
  const place = element("output", { class: "memlib-place" });
  const transport = element("div", { class: "memlib-transport", role: "group", "aria-label": "Move through time" },
    button("First", "first", () => set({ time: 0 })), button("One back", "back", () => set({ time: cursor.time - 1 })),
    play, button("One forward", "forward", () => set({ time: cursor.time + 1 })),
    button("Last", "last", () => set({ time: frame.times - 1 })), scrubber, place);
  const extras = element("div", { class: "memlib-extras" });
  const canvas = element("canvas", { tabindex: 0, role: "img" });
  const tip = element("div", { class: "memlib-tip", role: "presentation", hidden: "" });
  const readout = element("p", { class: "memlib-readout", "aria-live": "polite" });
  const numbers = element("details", { class: "memlib-numbers", ontoggle: () => fillTable() },
    element("summary", {}, "Values at this position"), element("div", { tabindex: 0, role: "group" }));
  const title = element("figcaption", { id });
  const about = element("p", { class: "memlib-about" });
  const figure = element("figure", { class: "memlib", "aria-labelledby": id }, title, transport, extras,
    element("div", { class: "memlib-stage" }, canvas, tip), readout, numbers, about);

  function theme() {
    const style = getComputedStyle(figure), value = (name) => style.getPropertyValue(name).trim();
    return { ink: value("--memlib-ink"), faint: value("--memlib-faint"), paper: value("--memlib-paper"),
      rule: value("--memlib-rule"), font: style.fontFamily };
  }

  function show(next) {
    const watching = !frame || cursor.time === frame.times - 1;
    frame = next;
    if (!views[frame.kind]) throw new Error(`memlib: no view called ${frame.kind}`);
    view = views[frame.kind](frame);
    figure.dataset.kind = frame.kind;
    title.textContent = frame.title;
    numbers.lastElementChild.setAttribute("aria-label", `Values of ${frame.title}`);
    about.textContent = frame.summary;
    for (const [name, values] of Object.entries(frame.choices)) {
      if (!values.includes(cursor.choice[name])) cursor.choice[name] = values[0];
    }
    cursor.time = clamp(paints ? cursor.time : frame.time, 0, frame.times - 1);
    cursor.item = clamp(paints ? cursor.item : frame.item, 0, frame.items - 1);
    if (frame.follow && watching) cursor.time = frame.times - 1;
    transport.hidden = frame.times < 2;
    scrubber.max = frame.times - 1;
    scrubber.setAttribute("aria-label", `${frame.unit} of ${frame.title}`);
    canvas.setAttribute("aria-label", `${frame.summary} Arrow keys move, space plays.`);
    buildExtras();
    refresh();
  }

  // Rebuild controls only when they change, so that a live view does not take away the focus.
  function buildExtras() {
    const actions = view.actions || [];
    const wanted = JSON.stringify([frame.choices, actions.map((a) => a.label)]);
    if (extras.dataset.wanted === wanted) return;
    extras.dataset.wanted = wanted;
    extras.replaceChildren();
    for (const [name, values] of Object.entries(frame.choices)) {
      const select = element("select", { "data-choice": name, onchange: () =>
        set({ choice: { ...cursor.choice, [name]: select.value } }) },
      ...values.map((value) => element("option", { value }, value)));
      select.value = cursor.choice[name];
      extras.append(element("label", {}, `${name} `, select));
    }
    actions.forEach((action, i) => {
      const label = action.key ? `${action.label} (${action.key})` : action.label;
      extras.append(element("button", { type: "button", "data-action": action.label, onclick: () => act(i) },
        label));
    });
    extras.append(element("button", { type: "button", "data-action": "Save PNG", onclick: savePicture },
      "Save PNG"));
  }

  function act(i) {
    const action = view.actions[i];
    const change = action.run(cursor);
    if (change && change.send) tell({ type: "action", name: change.send });
    else if (change) set(change);
  }

  function savePicture() {
    const link = element("a", { href: canvas.toDataURL("image/png"), download: `${frame.kind}.png` });
    link.click();
  }

  // Every move goes through here: a change of time, item, pin or choice, by the user or by another view.
  function set(change, { heard = false } = {}) {
    const before = JSON.stringify(cursor);
    Object.assign(cursor, change);
    cursor.time = clamp(Math.round(cursor.time), 0, frame.times - 1);
    cursor.item = clamp(Math.round(cursor.item), 0, frame.items - 1);
    if (JSON.stringify(cursor) === before) return;
    refresh();
    if (heard) return;
    if ("time" in change && frame.group) {
      shared.bus.dispatchEvent(new CustomEvent("cursor", { detail: { from: id, group: frame.group,
        token: cursor.time * frame.tokens_per_time } }));
    }
    later();
  }

  // Send at most ten messages per second to the kernel; the last one is always sent.
  let waiting = null;
  function later() {
    waiting ||= setTimeout(() => {
      waiting = null;
      tell({ type: "cursor", time: cursor.time, item: cursor.item, choice: cursor.choice });
    }, 100);
  }

  const follow = ({ detail }) => {
    if (detail.from === id || detail.group !== frame.group) return;
    set({ time: Math.floor(detail.token / frame.tokens_per_time) }, { heard: true });
  };

  function refresh() {
    scrubber.value = cursor.time;
    const where = view.where ? view.where(cursor.time) : `${frame.unit} ${cursor.time} of ${frame.times - 1}`;
    place.textContent = where;
    scrubber.setAttribute("aria-valuetext", where);
    if (!playing || !readout.textContent) readout.textContent = view.describe(cursor.time, cursor.item, cursor);
    figure.dataset.time = cursor.time;
    figure.dataset.item = cursor.item;
    if (numbers.open) fillTable();
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      paint();
    });
  }

  function paint() {
    if (!width || !figure.isConnected) return;
    painter = new Painter(canvas, width, view.height(width), theme());
    view.paint(painter, cursor);
    paints += 1;
    figure.dataset.paints = paints;
    if (keyTime) figure.dataset.keyToPaint = (performance.now() - keyTime).toFixed(1);
    keyTime = 0;
    figure.dataset.ready = "true";
  }

  function fillTable() {
    const rows = view.table(cursor);
    numbers.lastElementChild.replaceChildren(element("table", {},
      element("thead", {}, element("tr", {}, ...rows[0].map((c) => element("th", { scope: "col" }, String(c))))),
      element("tbody", {}, ...rows.slice(1, 65).map((row) =>
        element("tr", {}, ...row.map((c) => element("td", {}, String(c))))))));
  }

  function start() {
    if (cursor.time >= frame.times - 1) set({ time: 0 });
    const pace = calm() ? 1000 : Math.max(40, Math.min(400, 12000 / frame.times));
    playing = setInterval(() => {
      set({ time: cursor.time + 1 });
      if (cursor.time >= frame.times - 1) pause();
    }, pace);
    play.innerHTML = icon("pause");
    play.setAttribute("aria-label", "Pause");
    figure.dataset.playing = "true";
  }

  function pause() {
    clearInterval(playing);
    playing = null;
    play.innerHTML = icon("play");
    play.setAttribute("aria-label", "Play");
    figure.dataset.playing = "false";
    refresh();
  }

  const KEYS = {
    ArrowRight: () => ({ time: cursor.time + 1 }), ArrowLeft: () => ({ time: cursor.time - 1 }),
    ArrowDown: () => ({ item: cursor.item + (view.stride || 1) }),
    ArrowUp: () => ({ item: cursor.item - (view.stride || 1) }),
    ".": () => ({ item: cursor.item + 1 }), ",": () => ({ item: cursor.item - 1 }),
    PageDown: () => ({ time: cursor.time + frame.page }), PageUp: () => ({ time: cursor.time - frame.page }),
    Home: () => ({ time: 0 }), End: () => ({ time: frame.times - 1 }),
    p: () => ({ pin: cursor.pin === cursor.time ? null : cursor.time }),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = (view.actions || []).findIndex((a) => a.key === event.key);
    keyTime = performance.now();
    if (event.key === " ") playing ? pause() : start();
    else if (action >= 0) act(action);
    else if (KEYS[event.key]) set(KEYS[event.key]());
    else return;
    event.preventDefault();
  });
  // Keys pressed in a view must not reach the notebook around it.
  figure.addEventListener("keydown", (event) => {
    if (event.key !== "Tab") event.stopPropagation();
  });

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event), hit = view.locate(x, y, cursor);
    tip.hidden = !hit;
    if (!hit) return;
    tip.textContent = view.describe(hit.time ?? cursor.time, hit.item ?? cursor.item, cursor);
    tip.style.left = `${clamp(x + 14, 0, Math.max(0, width - tip.offsetWidth))}px`;
    tip.style.top = `${y + 18}px`;
  });
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  canvas.addEventListener("click", (event) => {
    const hit = view.locate(...at(event), cursor);
    if (hit) set(hit);
  });

  const resized = new ResizeObserver(() => {
    width = figure.querySelector(".memlib-stage").clientWidth;
    refresh();
  });
  const retheme = new MutationObserver(() => refresh());
  const dark = globalThis.matchMedia("(prefers-color-scheme: dark)");
  const redraw = () => refresh();

  figure.memlib = { place: (time, item) => view.place(time, item), cursor };
  root.replaceChildren(figure);
  show(firstFrame);
  resized.observe(figure);
  retheme.observe(document.body, { attributes: true });
  dark.addEventListener("change", redraw);
  shared.bus.addEventListener("cursor", follow);
  return {
    show,
    go: (change) => set(change, { heard: true }),
    free: () => {
      clearInterval(playing);
      clearTimeout(waiting);
      resized.disconnect();
      retheme.disconnect();
      dark.removeEventListener("change", redraw);
      shared.bus.removeEventListener("cursor", follow);
    },
  };
}
