// A training run: the loss, and other measured values in 0 … 1.
views.training = (frame) => {
  const { names, state, chance } = frame.words, { steps, loss, parts } = frame.arrays, n = frame.times;
  const left = 46, top = 24, tall = 170, gap = 60;
  let span = 1;
  const last = Math.max(steps.data[n - 1], 1), peak = loss.data.reduce((a, b) => Math.max(a, b), 1e-9);
  const x = (i, from) => from + (steps.data[i] / last) * span;
  const part = (k, i) => parts.data[k * n + i];
  const said = (k, i) => (part(k, i) < 0 ? "not measured yet" : exact(part(k, i)));
  function panel(g, from, label, high) {
    g.text(label, from, 10, { bold: true });
    for (const v of [0, 0.5, 1]) {
      const y = top + (1 - v) * tall;
      g.line([[from, y], [from + span, y]], g.rule, 1);
      g.text(brief(v * high), from - 6, y, { align: "right", size: 11, colour: g.faint });
    }
    g.text("step 0", from, top + tall + 12, { size: 11, colour: g.faint });
    g.text(String(last), from + span, top + tall + 12, { align: "right", size: 11, colour: g.faint });
  }
  function paint(g, cursor) {
    span = (g.width - 2 * left - gap) / 2;
    const second = left + span + gap, indices = Array.from({ length: n }, (_, i) => i);
    panel(g, left, "loss", peak);
    panel(g, second, "between 0 and 1", 1);
    g.line(indices.map((i) => [x(i, left), top + (1 - loss.data[i] / peak) * tall]), colourOf("loss", 0), 2);
    if (chance) g.line([[second, top + (1 - chance) * tall], [second + span, top + (1 - chance) * tall]], g.ink, 1, [2, 3]);
    names.forEach((name, k) => {
      const colour = colourOf(name, k), known = indices.filter((i) => part(k, i) >= 0);
      g.line(known.map((i) => [x(i, second), top + (1 - part(k, i)) * tall]), colour, 2);
      const column = second + (k * span) / names.length;
      g.rect(column, top + tall + 24, 10, 10, colour);
      g.text(name, column + 14, top + tall + 29, { size: 11, room: span / names.length - 16 });
    });
    for (const from of [left, second]) {
      g.line([[x(cursor.time, from), top], [x(cursor.time, from), top + tall]], g.ink, 1);
    }
  }
  const describe = (i) => `step ${steps.data[i]}: loss ${exact(loss.data[i])}` +
    names.map((name, k) => `, ${name} ${said(k, i)}`).join("") + ` (${state})`;
  return {
    height: () => top + tall + 42,
    paint,
    describe,
    place: (i) => ({ x: x(i, left), y: top, width: 1, height: tall }),
    locate: (px, py) => {
      const second = left + span + gap, from = px >= second ? second : left;
      if (px < from || px > from + span || py < top) return null;
      const step = ((px - from) / span) * last;
      let best = 0;
      for (let i = 0; i < n; i++) if (Math.abs(steps.data[i] - step) < Math.abs(steps.data[best] - step)) best = i;
      return { time: best };
    },
    where: (i) => `step ${steps.data[i]} (${state})`,
    table: () => [["step", "loss", ...names], ...Array.from({ length: n }, (_, i) => n - 1 - i).slice(0, 30).map((i) =>
      [steps.data[i], exact(loss.data[i]), ...names.map((_, k) => said(k, i))])],
    actions: [
      { label: state === "paused" ? "Continue" : "Pause", run: () => ({ send: "pause" }) },
      { label: "One step", run: () => ({ send: "step" }) },
      { label: "Stop", run: () => ({ send: "stop" }) },
    ].slice(state === "training" || state === "paused" ? 0 : 3),
  };
};
