// Several values in 0 … 1 over the same positions: a colour strip and a line each, with labels at the cursor.
views.strips = (frame) => {
  const { rows, places, segment_length: length, gates } = frame.words, { data, step } = frame.arrays.lines;
  const [low, high] = gates || [-1, 2]; // below low a gate is shut, above high it is open
  const n = places.length, left = 120, right = 118, strip = 24, top = 22, ribbon = 30;
  const chart = Math.max(120, 16 * rows.length + 8);
  let span = 1;
  const value = (row, t) => data[row * n + t];
  const x = (t) => left + ((t + 0.5) * span) / n;
  const lines = top + rows.length * strip + 14;
  const share = (row, test) => {
    let count = 0;
    for (let t = 0; t < n; t++) count += test(value(row, t));
    return `${Math.round((100 * count) / n)} %`;
  };
  const saturation = rows.map((_, r) => `${share(r, (v) => v > high)} open, ${share(r, (v) => v < low)} shut`);
  const state = (v) => (v > high ? ", open" : v < low ? ", shut" : "");
  const describe = (t, row, cursor) => {
    const now = value(row, t);
    let text = `${frame.unit} ${t}, “${places[t]}”: ${rows[row]} = ${exact(now, step)}${state(now)}`;
    if (cursor.pin !== null && cursor.pin !== t) {
      const change = now - value(row, cursor.pin);
      text += `; ${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(4)} against pinned ${frame.unit} ${cursor.pin}`;
    }
    return text;
  };
  const opening = (cursor, way) => {
    for (let t = cursor.time + way; t > 0 && t < n; t += way) {
      if (value(cursor.item, t) >= 0.5 && value(cursor.item, t - 1) < 0.5) return { time: t };
    }
    return null;
  };

  function paint(g, cursor) {
    span = g.width - left - right;
    g.legend(g.width - 4, 10, "0", "1", gates ? "gate" : "");
    rows.forEach((label, r) => {
      const y = top + r * strip, chosen = r === cursor.item;
      g.cells(left, y, span, strip - 4, n, 1, (i) => value(r, i));
      g.text(label, left - 8, y + strip / 2 - 2, { align: "right", bold: chosen, room: left - 12 });
      g.text(gates ? saturation[r] : exact(value(r, cursor.time), step), left + span + 8, y + strip / 2 - 2,
        { size: 11, colour: g.faint, room: right - 10 });
    });
    const y = (v) => lines + (1 - v) * chart;
    if (gates) {
      g.ctx.globalAlpha = 0.35;
      g.rect(left, y(1), span, chart * (1 - high), g.rule);
      g.rect(left, y(low), span, chart * low, g.rule);
      g.ctx.globalAlpha = 1;
    }
    for (const v of [0, 0.5, 1]) {
      g.text(String(v), left - 8, y(v), { align: "right", size: 11, colour: g.faint });
      g.line([[left, y(v)], [left + span, y(v)]], g.rule, 1);
    }
    for (let t = length; length && t < n; t += length) {
      g.line([[x(t - 0.5), top], [x(t - 0.5), lines + chart]], g.faint, 1, [2, 3]);
    }
    const order = rows.map((_, r) => r).sort((a) => (a === cursor.item ? 1 : -1));
    for (const r of order) {
      const points = Array.from({ length: n }, (_, t) => [x(t), y(value(r, t))]);
      g.ctx.globalAlpha = r === cursor.item ? 1 : 0.45;
      // A repeated colour is dashed, in the line and in its legend.
      const colour = colourOf(rows[r].split(",")[0], r), again = r >= SERIES.length;
      g.line(points, colour, r === cursor.item ? 2.5 : 1.5, again ? [5, 3] : []);
      g.ctx.globalAlpha = 1;
      g.text(rows[r], left + span + 8, lines + 12 + r * 16, { size: 11, bold: r === cursor.item,
        colour: g.ink, room: right - 26 });
      g.rect(g.width - 14, lines + 7 + r * 16, 10, 10, colour);
      if (again) g.rect(g.width - 10, lines + 7 + r * 16, 2, 10, g.paper);
    }
    if (cursor.pin !== null) g.line([[x(cursor.pin), top], [x(cursor.pin), lines + chart]], g.faint, 2);
    g.line([[x(cursor.time), top], [x(cursor.time), lines + chart]], g.ink, 1.5);
    const r = cursor.item, side = Math.max(3, span / n);
    g.mark(x(cursor.time) - side / 2, top + r * strip, side, strip - 4);
    readAlong(g, places, cursor.time, left, lines + chart + 18, span);
  }

  return {
    height: () => lines + chart + ribbon + 6,
    paint,
    describe,
    place: (t, row) => ({ x: x(t) - span / n / 2, y: top + row * strip, width: span / n, height: strip - 4 }),
    locate: (px, py) => {
      const t = Math.floor(((px - left) / span) * n);
      if (t < 0 || t >= n || py < top) return null;
      const row = Math.floor((py - top) / strip);
      return row < rows.length ? { time: t, item: row } : { time: t };
    },
    where: (t) => `${frame.unit} ${t} of ${n - 1}` + (length ? `, segment ${Math.floor(t / length)}` : ""),
    table: (cursor) => [["name", "value", "state"], ...rows.map((label, r) =>
      [label, exact(value(r, cursor.time), step), state(value(r, cursor.time)).slice(2) || (gates ? "between" : "")])],
    actions: [
      { label: gates ? "Next opening" : "Next rise", key: "n", run: (cursor) => opening(cursor, 1) },
      { label: gates ? "Previous opening" : "Previous rise", key: "b", run: (cursor) => opening(cursor, -1) },
      { label: `Pin this ${frame.unit}`, key: "p", run: (cursor) => ({ pin: cursor.pin === cursor.time ? null : cursor.time }) },
    ],
  };
};

// Draw token names with the one at the cursor marked: each below its position if all fit, else those around
// the cursor, with dots for omitted ones.
function readAlong(g, tokens, time, left, y, span) {
  const n = tokens.length, place = span / n;
  g.ctx.font = `600 12px ${g.font}`;
  const widest = n > 64 ? 34 : Math.max(...tokens.map((word) => g.ctx.measureText(word).width));
  const size = Math.min(12, Math.floor((12 * (place - 4)) / widest)), all = size >= 10 && n <= 64;
  const width = all ? place : clamp(widest + 12, 46, 120);
  const fit = all ? n : clamp(Math.floor(span / width), 1, n), first = clamp(time - (fit >> 1), 0, n - fit);
  const more = (i) => [i === 0 && first > 0, i === fit - 1 && first + fit < n].map((yes) => (yes ? "…" : ""));
  for (let i = 0; i < fit; i++) {
    const here = first + i === time, middle = left + (i + 0.5) * width, room = width - 4, [before, after] = more(i);
    if (here) g.rect(middle - room / 2, y - 11, room, 22, g.ink);
    g.text(`${before} ${tokens[first + i]} ${after}`.trim(), middle, y, { align: "center", bold: here, colour: here ? g.paper : g.ink, room,
      size: all ? size : 12 });
  }
}
