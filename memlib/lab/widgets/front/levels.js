// The hierarchy of states: four levels, and the banks of the last level, over the tokens of a stream.
views.levels = (frame) => {
  const { tokens, rows, levels, half_lives: halves, segment_length: length } = frame.words;
  const { level, bounds, block, nothing, read, written, filled, left, norm } = frame.arrays;
  const n = tokens.length, banks = halves.length, blocks = bounds.shape[0], slots = norm.shape[1], each = slots / banks;
  const start = 132, bar = 110, top = 24, tall = 24, strip = 18, thin = 8, bank = strip + thin + 6, ribbon = 30;
  const SEES = frame.choices.show[0], WRITES = frame.choices.show[2];
  const most = (array) => array.data.reduce((a, b) => Math.max(a, b), 0) || 1;
  const peak = { left: most(left), written: most(written), norm: most(norm) };
  let span = 1;
  const x = (t) => start + (t * span) / n;
  const y = (row) => top + (row < levels ? row * tall : levels * tall + 4 + (row - levels) * bank);
  const foot = () => y(levels + banks);
  const segment = (t) => Math.floor(t / length);
  const past = (t) => segment(t) * length; // tokens of the segments that are over
  const share = (t, row) => (row < levels ? level.data[t * levels + row]
    : level.data[t * levels + levels - 1] * read.data[t * banks + row - levels]);
  const weight = (t, m) => block.data[t * blocks + m];
  const remains = (t, u, k) => left.data[(segment(t) * n + u) * banks + k];
  const say = (t) => `token ${t} “${tokens[t]}”`;
  const best = (count, value) => {
    let top = -1;
    for (let i = 0; i < count; i++) if (value(i) > 0 && (top < 0 || value(i) > value(top))) top = i;
    return top;
  };
  const complete = (t) => {
    let count = 0;
    while (count < blocks && bounds.data[2 * count + 1] < past(t)) count++;
    return count;
  };

  function describe(t, row) {
    const reads = `${say(t)}, ${rows[row]}${row < levels ? "" : " segments"}: ${exact(share(t, row), level.step)} of its read`;
    if (row === 1) {
      const m = best(blocks, (i) => weight(t, i)), fill = filled.data[t];
      return `${reads}; ${complete(t)} blocks are complete` + (m < 0 ? "" : `, most weight: tokens ${bounds.data[2 * m]}–` +
        `${bounds.data[2 * m + 1]} ${exact(weight(t, m), block.step)}`) + `, empty block ${exact(nothing.data[t], nothing.step)}` +
        `; its own block is ${exact(fill, filled.step)} full`;
    }
    if (row === 2) return `${reads}; the mean of ${past(t)} tokens`;
    if (row < levels) return reads;
    const k = row - levels, u = best(past(t), (i) => remains(t, i, k));
    return `${reads}; it writes ${exact(written.data[t * banks + k], written.step)}` +
      (u < 0 ? "; nothing written yet" : `; most remains of ${say(u)}: ${exact(remains(t, u, k), left.step)}`);
  }

  function sees(g, t) {
    const wide = Math.max(2, span / n);
    g.rect(x(t), y(0), wide, tall - 6, rgb(share(t, 0)));
    for (let m = 0; m < blocks; m++) {
      const from = x(bounds.data[2 * m]), to = x(bounds.data[2 * m + 1] + 1), seen = weight(t, m);
      if (seen > 0) g.rect(from, y(1), to - from - 1, tall - 6, rgb(share(t, 1) * seen));
      const middle = y(1) + (tall - 6) / 2;
      if (!(seen > 0)) g.line([[from + 1, middle], [to - 2, middle]], g.faint, 1, m < complete(t) ? [] : [2, 3]);
    }
    if (past(t)) g.rect(start, y(2), x(past(t)) - start, tall - 6, rgb(share(t, 2)));
    if (past(t)) g.rect(start, y(3), x(past(t)) - start, tall - 6, rgb(share(t, 3)));
    for (let k = 0; k < banks; k++) {
      g.cells(start, y(levels + k), span, strip, n, 1, (u) => (u < past(t) ? remains(t, u, k) / peak.left : NaN));
    }
  }
  function strips(g, mode) {
    const values = mode === WRITES
      ? (row) => (row === 1 ? (t) => filled.data[t] : row < levels ? null : (t) => written.data[t * banks + row - levels] / peak.written)
      : (row) => (t) => share(t, row);
    for (let row = 0; row < levels + banks; row++) {
      const of = values(row);
      if (of) g.cells(start, y(row), span, row < levels ? tall - 6 : strip, n, 1, of);
      else g.line([[start, y(row) + 9], [start + span, y(row) + 9]], g.rule, 1);
    }
  }
  function paint(g, cursor) {
    span = g.width - start - bar;
    const t = cursor.time, mode = cursor.choice.show;
    const label = { [SEES]: "banks: what remains", [WRITES]: "banks: written" }[mode];
    const above = { [SEES]: "weight, 0 to 1", [WRITES]: "how full, 0 to 1" }[mode];
    if (above && span > 250) g.text(above, start - 8, 10, { align: "right", size: 11, colour: g.faint });
    g.legend(start + span, 10, "0", brief(mode === SEES ? peak.left : mode === WRITES ? peak.written : 1), label || "weight in the read");
    g.text("weight in its read", g.width - 4, 10, { align: "right", size: 11, colour: g.faint });
    if (mode === SEES) sees(g, t);
    else strips(g, mode);
    for (let row = 0; row < levels + banks; row++) {
      const height = row < levels ? tall - 6 : strip, chosen = row === cursor.item, part = share(t, row);
      g.text(rows[row], start - 8, y(row) + height / 2, { align: "right", bold: chosen, room: start - 12 });
      g.rect(start + span + 10, y(row) + 3, part * (bar - 60), height - 6, colourOf("read", 1));
      g.text(exact(part, level.step), g.width - 4, y(row) + height / 2, { align: "right", size: 11, bold: chosen });
      if (row < levels) continue;
      const from = row - levels;
      g.text(`its ${each} slots`, start - 8, y(row) + strip + 6, { align: "right", size: 9, colour: g.faint });
      g.cells(start, y(row) + strip + 1, span, thin, each, 1, (s) => norm.data[segment(t) * slots + from * each + s] / peak.norm);
    }
    for (let border = length; border < n; border += length) g.line([[x(border), top], [x(border), foot() - 4]], g.faint, 1, [2, 3]);
    const height = cursor.item < levels ? tall - 6 : strip;
    g.mark(x(t), y(cursor.item), Math.max(3, span / n), height);
    g.line([[x(t + 0.5), top - 6], [x(t + 0.5), foot()]], g.ink, 1);
    readAlong(g, tokens, t, start, foot() + 16, span);
  }
  const nextBorder = (cursor) => {
    for (let m = 0; m < blocks; m++) if (bounds.data[2 * m + 1] > cursor.time) return { time: bounds.data[2 * m + 1] };
    return null;
  };
  return {
    height: () => foot() + ribbon + 4,
    paint,
    describe,
    place: (t, row) => ({ x: x(t), y: y(row), width: span / n, height: row < levels ? tall - 6 : strip }),
    locate: (px, py) => {
      const t = Math.floor(((px - start) / span) * n);
      const row = py < y(levels) ? Math.floor((py - top) / tall) : levels + Math.floor((py - y(levels)) / bank);
      if (t < 0 || t >= n || py < top) return null;
      return row < levels + banks ? { time: t, item: row } : { time: t };
    },
    where: (t) => `token ${t} of ${n - 1}, segment ${segment(t)}`,
    table: (cursor) => [["level or bank", "weight in its read", "written"], ...rows.map((name, row) => [name,
      exact(share(cursor.time, row), level.step),
      row < levels ? "" : exact(written.data[cursor.time * banks + row - levels], written.step)])],
    actions: [{ label: "Next completed block", key: "n", run: nextBorder }],
  };
};
