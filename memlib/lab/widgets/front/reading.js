// Reading over text: how much each token reads from memory, and from which earlier tokens.
views.reading = (frame) => {
  const { tokens, segment_length: length, marked, amount_label: label } = frame.words, n = tokens.length;
  const { amount, source, weight } = frame.arrays, hits = source.shape[1], top = 24;
  const peak = amount.data.reduce((a, b) => Math.max(a, b), 0) || 1, scored = new Set(marked);
  const small = n > 1024, widest = Math.max(...tokens.map((t) => t.length));
  let columns = 1, wide = 40;
  const tall = small ? 10 : 28, edge = small ? 0 : 62;
  function measure(width) {
    const room = width - edge, least = small ? 6 : Math.min(74, 14 + 8 * widest);
    columns = Math.max(1, Math.floor(room / least));
    // One row per segment if the words are readable then: other line breaks hide where a segment begins.
    if (length && room >= length * (small ? 6 : Math.min(74, 8 * widest))) columns = length;
    wide = Math.min(room / columns, small ? 12 : 74);
  }
  const lines = () => Math.ceil(n / columns);
  const corner = (t) => [edge + (t % columns) * wide, top + Math.floor(t / columns) * tall];
  const from = (t) => Array.from({ length: hits }, (_, i) => [source.data[t * hits + i], weight.data[t * hits + i]])
    .filter(([s, w]) => s >= 0 && w > 0.03);
  const say = (t) => `token ${t} “${tokens[t]}”`;
  function describe(t) {
    const found = from(t).map(([s, w]) => `${say(s)} ${exact(w, weight.step)}`);
    return `${say(t)}: ${label} ${exact(amount.data[t], amount.step)}` +
      (found.length ? `; from ${found.join(", ")}` : "");
  }
  function paint(g, cursor) {
    measure(g.width);
    g.legend(g.width - 4, 10, "0", brief(peak), label);
    for (let t = 0; t < n; t++) {
      const [x, y] = corner(t), part = amount.data[t] / peak;
      g.rect(x, y, wide - 1, tall - 2, rgb(part));
      if (small) continue;
      g.text(tokens[t], x + wide / 2, y + tall / 2 - 1, { align: "center", colour: onColour(part), room: wide - 4,
        bold: scored.has(t) });
      if (scored.has(t)) g.rect(x + 4, y + tall - 6, wide - 9, 2, onColour(part));
      if (length && t % length === 0) g.text(`segment ${t / length}`, 0, y + tall / 2 - 1, { size: 11, colour: g.faint });
    }
    const [x, y] = corner(cursor.time);
    for (const [s, w] of from(cursor.time)) {
      const [sx, sy] = corner(s), up = (y - sy) * 0.4;
      const ctx = g.ctx;
      for (const [colour, thick] of [["#000", 2.4 + 3 * w], ["#fff", 0.8 + 3 * w]]) {
        ctx.globalAlpha = 0.35 + 0.65 * w;
        ctx.beginPath();
        ctx.moveTo(x + wide / 2, y);
        ctx.bezierCurveTo(x + wide / 2, y - up, sx + wide / 2, sy + tall + up, sx + wide / 2, sy + tall - 2);
        ctx.strokeStyle = colour;
        ctx.lineWidth = thick;
        ctx.stroke();
        ctx.globalAlpha = 1;
      }
      g.mark(sx + 1, sy + 1, wide - 3, tall - 4);
    }
    g.mark(x, y, wide - 1, tall - 2);
    g.ctx.lineWidth = 3;
    g.ctx.strokeStyle = "#d55e00";
    g.ctx.strokeRect(x - 2, y - 2, wide + 3, tall + 2);
  }
  const next = (cursor, way) => {
    for (let t = cursor.time + way; t >= 0 && t < n; t += way) {
      if (scored.size ? scored.has(t) : amount.data[t] > 0.5 * peak) return { time: t };
    }
    return null;
  };
  return {
    height: (width) => {
      measure(width);
      return top + lines() * tall + 6;
    },
    paint,
    describe,
    place: (t) => {
      const [x, y] = corner(t);
      return { x, y, width: wide, height: tall };
    },
    locate: (px, py) => {
      const c = Math.floor((px - edge) / wide), r = Math.floor((py - top) / tall), t = r * columns + c;
      return c >= 0 && c < columns && r >= 0 && t < n ? { time: t } : null;
    },
    where: (t) => `token ${t} of ${n - 1}` + (length ? `, segment ${Math.floor(t / length)}` : ""),
    table: (cursor) => [["from", "weight"], ...from(cursor.time).map(([s, w]) => [say(s), exact(w, weight.step)])],
    actions: [
      { label: scored.size ? "Next question" : "Next strong read", key: "n", run: (cursor) => next(cursor, 1) },
      { label: scored.size ? "Previous question" : "Previous strong read", key: "b", run: (cursor) => next(cursor, -1) },
    ],
  };
};
