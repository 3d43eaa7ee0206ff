// Memory slots over time: one cell per slot, bank by bank, and a chart of the selected slot.
views.slots = (frame) => {
  const { banks, segment_length: length } = frame.words, slots = frame.items, each = slots / banks;
  const across = Math.min(banks, 4), down = Math.ceil(banks / across), gap = 12, top = 24, life = 64;
  const wanted = Math.ceil(Math.sqrt(each * (banks > 1 ? 1.6 : 5)));
  // Choose a number of columns that fills the last line, if there is one nearby.
  const even = Array.from({ length: wanted }, (_, i) => wanted + (i >> 1) * (i % 2 ? 1 : -1)).find((c) =>
    c > 0 && each % c === 0 && c < 1.5 * wanted && c > wanted / 1.5);
  const columns = even || wanted, lines = Math.ceil(each / columns);
  const measures = frame.choices.show;
  const peak = Object.fromEntries(measures.map((m) =>
    [m, frame.arrays[m].data.reduce((a, b) => Math.max(a, b), 0) || 1]));
  const value = (measure, t, s) => frame.arrays[measure].data[t * slots + s];
  const used = ["written", "read"].filter((m) => measures.includes(m));
  const dead = Uint8Array.from({ length: slots }, (_, s) => {
    for (const m of used) for (let t = 0; t < frame.times; t++) if (value(m, t, s) > 0.05) return 0;
    return used.length ? 1 : 0;
  });
  const unused = dead.reduce((a, b) => a + b, 0);
  const orders = {};
  let side = 10, tall = 10, bankWidth = 0;

  // The slot at each position of its bank, and the position of each slot.
  function order(cursor) {
    const key = cursor.choice.order === "index" ? "index" : `${cursor.choice.order} ${cursor.choice.show}`;
    if (orders[key]) return orders[key];
    const slot = Int32Array.from({ length: slots }, (_, s) => s), place = new Int32Array(slots);
    if (key !== "index") {
      const total = new Float64Array(slots);
      for (let t = 0; t < frame.times; t++) for (let s = 0; s < slots; s++) total[s] += value(cursor.choice.show, t, s);
      for (let b = 0; b < banks; b++) slot.subarray(b * each, (b + 1) * each).sort((i, j) => total[j] - total[i] || i - j);
    }
    slot.forEach((s, p) => (place[s] = p));
    return (orders[key] = { slot, place });
  }
  const corner = (p) => {
    const b = Math.floor(p / each), i = p % each;
    return [(b % across) * (bankWidth + gap) + (i % columns) * side,
      top + Math.floor(b / across) * (lines * tall + 22) + 14 + Math.floor(i / columns) * tall];
  };
  let lastCursor = { choice: { show: measures[0], order: "index" } };
  const grid = () => top + down * (lines * tall + 22);

  function measure(width) {
    bankWidth = (width - gap * (across - 1)) / across;
    side = bankWidth / columns;
    tall = Math.min(22, Math.max(side, 7));
  }
  function describe(t, s, cursor) {
    const show = cursor.choice.show, bank = banks > 1 ? `bank ${Math.floor(s / each)}, ` : "";
    const all = measures.map((m) => `${m} ${exact(value(m, t, s), frame.arrays[m].step)}`);
    return `${bank}slot ${s}, segment ${t}: ` + [all[measures.indexOf(show)], ...all.filter((_, i) =>
      measures[i] !== show)].join(", ") + (dead[s] ? "; never written or read" : "");
  }
  function paint(g, cursor) {
    measure(g.width);
    lastCursor = cursor;
    const show = cursor.choice.show, { slot, place } = order(cursor), t = cursor.time;
    g.legend(g.width - 4, 10, "0", brief(peak[show]), show);
    g.text(used.length && g.width > 520 ? `${unused} of ${slots} slots were never written or read (×)` : "", 0, 10,
      { size: 11, colour: g.faint });
    for (let b = 0; b < banks; b++) {
      const [x, y] = corner(b * each);
      if (banks > 1) g.text(`bank ${b}`, x, y - 8, { size: 11, colour: g.faint });
      g.cells(x, y, side * columns, tall * lines, columns, lines, (i) =>
        (i < each ? value(show, t, slot[b * each + i]) / peak[show] : NaN));
    }
    if (side >= 7) for (let p = 0; p < slots; p++) {
      if (!dead[slot[p]]) continue;
      const [x, y] = corner(p);
      g.text("×", x + side / 2, y + tall / 2, { align: "center", size: 9, colour: "#ffffffaa" });
    }
    const [x, y] = corner(place[cursor.item]);
    g.mark(x, y, Math.max(side, 3), Math.max(tall, 3));
    const base = grid() + life - 8, left = 120, span = g.width - left - 8, wide = span / frame.times;
    g.text(`slot ${cursor.item}: ${show}`, 0, base - 30, { bold: true, room: left - 8 });
    g.text("over segments", 0, base - 14, { size: 11, colour: g.faint });
    g.line([[left, base], [left + span, base]], g.rule, 1);
    for (let i = 0; i < frame.times; i++) {
      const height = (value(show, i, cursor.item) / peak[show]) * (life - 20);
      g.rect(left + i * wide + 1, base - height, Math.max(1, wide - 2), height, colourOf(show, 0));
    }
    g.mark(left + t * wide + 1, base - life + 18, Math.max(2, wide - 2), life - 18);
  }
  const next = (cursor) => {
    for (let i = 1; i <= slots; i++) {
      const s = (cursor.item + i) % slots;
      if (dead[s]) return { item: s };
    }
    return null;
  };
  return {
    height: (width) => {
      measure(width);
      return grid() + life;
    },
    stride: columns,
    paint,
    describe,
    place: (_, s) => {
      const [x, y] = corner(order(lastCursor).place[s]);
      return { x, y, width: side, height: tall };
    },
    locate: (px, py, cursor) => {
      if (py > grid()) {
        const t = Math.floor(((px - 120) / (bankWidth * across + gap * (across - 1) - 128)) * frame.times);
        return t >= 0 && t < frame.times ? { time: t } : null;
      }
      for (let b = 0; b < banks; b++) {
        const [x, y] = corner(b * each), c = Math.floor((px - x) / side), r = Math.floor((py - y) / tall);
        const i = r * columns + c;
        if (c >= 0 && c < columns && r >= 0 && i < each) return { item: order(cursor).slot[b * each + i] };
      }
      return null;
    },
    where: (t) => `segment ${t} of ${frame.times - 1}` + (length ? ` (tokens ${t * length}–${(t + 1) * length - 1})` : ""),
    table: (cursor) => [["slot", ...measures], ...Array.from({ length: slots }, (_, s) => s)
      .sort((a, b) => value(cursor.choice.show, cursor.time, b) - value(cursor.choice.show, cursor.time, a))
      .slice(0, 20).map((s) => [s, ...measures.map((m) => exact(value(m, cursor.time, s), frame.arrays[m].step))])],
    actions: used.length ? [{ label: "Next unused slot", key: "d", run: next }] : [],
  };
};
