// One slot: its writers, its readers, the drift of its content, and the model's answers without it.
views.inspector = (frame) => {
  const { tokens, slots, names, questions, segment_length: length } = frame.words, n = tokens.length;
  const { written, read, drift, before, alone, together } = frame.arrays;
  const left = 120, top = 22, band = 54, mid = top + band + 2, strip = mid + band + 30, bars = strip + 74, bar = 19;
  const shown = 6, answers = names.length, asked = frame.choices.question || [];
  let span = 1;
  const of = (array, s, t) => array.data[s * array.shape[1] + t];
  const x = (t) => left + (t * span) / n;
  const top3 = (array, s) => Array.from({ length: n }, (_, t) => t).sort((a, b) => of(array, s, b) - of(array, s, a))[0];
  const writer = slots.map((_, s) => top3(written, s)), reader = slots.map((_, s) => top3(read, s));
  const peak = (array) => array.data.reduce((a, b) => Math.max(a, b), 1e-9);
  const most = { written: peak(written), read: peak(read) };
  const use = slots.map((_, s) => {
    let total = 0;
    for (let t = 0; t < n; t++) total += of(read, s, t);
    return total;
  });
  const busiest = Math.max(...use, 1e-9);
  const question = (cursor) => Math.max(0, asked.indexOf(cursor.choice.question));
  const without = (s, q, v, cursor) => (cursor.choice.without === "this slot" ? alone : together)
    .data[(s * questions.length + q) * answers + v];
  const say = (t) => `token ${t} “${tokens[t]}”`;

  function describe(t, s, cursor) {
    let text = `slot ${slots[s]}: at ${say(t)} written ${exact(of(written, s, t), written.step)}, read ` +
      `${exact(of(read, s, t), read.step)}. Written most by ${say(writer[s])}, read most by ${say(reader[s])}.`;
    if (questions.length) {
      const q = question(cursor), { answer, token } = questions[q];
      text += ` Without ${cursor.choice.without}, ${names[answer]} after ${say(token)} goes from ` +
        `${exact(before.data[q * answers + answer], before.step)} to ${exact(without(s, q, answer, cursor), alone.step)}.`;
    }
    return text;
  }
  function paint(g, cursor) {
    span = g.width - left - 10;
    const s = cursor.item, wide = Math.max(1, span / n - 1);
    g.text(`slot ${slots[s]}`, 0, top - 10, { bold: true });
    [["written by", "written", -1], ["read by", "read", 1]].forEach(([label, role, way], i) => {
      g.text(label, left - 24, mid + (way * band) / 2, { align: "right" });
      g.rect(left - 18, mid + (way * band) / 2 - 5, 10, 10, colourOf(role, i));
    });
    for (let t = length; length && t < n; t += length) g.line([[x(t), top], [x(t), mid + band]], g.faint, 1, [2, 3]);
    for (let t = 0; t < n; t++) {
      const up = (of(written, s, t) / most.written) * band, down = (of(read, s, t) / most.read) * band;
      g.rect(x(t), mid - up, wide, up, colourOf("written", 0));
      g.rect(x(t), mid + 1, wide, down, colourOf("read", 1));
    }
    g.line([[left, mid], [left + span, mid]], g.ink, 1);
    g.mark(x(cursor.time), top, Math.max(2, wide), 2 * band + 4);
    readAlong(g, tokens, cursor.time, left, mid + band + 16, span);
    g.text("slots in use", left - 8, strip + 10, { align: "right", colour: g.faint, size: 11 });
    g.cells(left, strip, span, 20, slots.length, 1, (i) => use[i] / busiest);
    g.mark(left + (s * span) / slots.length, strip, Math.max(3, span / slots.length), 20);
    const steps = drift.shape[1], at = (i) => left + ((i + 0.5) * span) / steps;
    g.text("cosine after write", left - 8, strip + 42, { align: "right", colour: g.faint, size: 11 });
    for (let i = 0; i < steps; i++) {
      const kept = of(drift, s, i);
      g.text(brief(kept), at(i), strip + 42, { align: "center", size: 11,
        colour: kept < 0.9 ? g.ink : g.faint, bold: kept < 0.9, room: span / steps - 4 });
    }
    if (!questions.length) return;
    const q = question(cursor), { answer, token } = questions[q];
    g.text(`after ${say(token)}: grey with every slot, colour without ${cursor.choice.without}`, 0, bars - 12,
      { size: 11, colour: g.faint });
    Array.from({ length: answers }, (_, v) => v)
      .sort((a, b) => Math.max(before.data[q * answers + b], without(s, q, b, cursor)) -
        Math.max(before.data[q * answers + a], without(s, q, a, cursor)))
      .slice(0, shown).forEach((v, i) => {
        const y = bars + i * bar, was = before.data[q * answers + v], is = without(s, q, v, cursor);
        g.text(names[v] + (v === answer ? " ✓" : ""), left - 8, y + bar / 2, { align: "right", bold: v === answer });
        g.rect(left, y + 2, (span - 110) * was, 6, g.faint);
        g.rect(left, y + 9, (span - 110) * is, 6, colourOf("read", 1));
        g.text(`${was.toFixed(3)} → ${is.toFixed(3)}`, left + span, y + bar / 2, { align: "right", size: 11 });
      });
  }
  return {
    height: () => (questions.length ? bars + shown * bar + 6 : strip + 56),
    paint,
    describe,
    place: (t, s) => ({ x: left + (s * span) / slots.length, y: strip, width: span / slots.length, height: 20 }),
    locate: (px, py) => {
      const part = (px - left) / span;
      if (part < 0 || part >= 1) return null;
      if (py >= top && py < mid + band) return { time: Math.floor(part * n) };
      if (py >= strip && py < strip + 20) return { item: Math.floor(part * slots.length) };
      return null;
    },
    where: (t) => `token ${t} of ${n - 1}` + (length ? `, segment ${Math.floor(t / length)}` : ""),
    table: (cursor) => [["slot", "written most by", "read most by", "right answer without it"],
      ...slots.map((slot, s) => [slot, say(writer[s]), say(reader[s]), questions.length
        ? exact(without(s, question(cursor), questions[question(cursor)].answer, cursor), alone.step) : "none"])],
    actions: [
      { label: "Go to its writer", key: "w", run: (cursor) => ({ time: writer[cursor.item] }) },
      { label: "Go to its reader", key: "r", run: (cursor) => ({ time: reader[cursor.item] }) },
    ],
  };
};
