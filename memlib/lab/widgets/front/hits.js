// Retrieval hits of one token in each head: the retrieved token, its position, score and weight.
views.hits = (frame) => {
  const { tokens, layers, segment_length: length, marked } = frame.words, n = tokens.length;
  const { source, score, weight, gate, search } = frame.arrays, [, heads, , hits] = source.shape;
  const asked = new Set(marked), named = frame.choices.layer || [];
  const past = 22, ribbon = 44, top = past + ribbon + 16, head = 20, tall = 36, gap = 8;
  let span = 1, columns = heads, wide = 100;
  function measure(width) {
    span = width - 2;
    columns = Math.ceil(heads / Math.ceil(heads / clamp(Math.floor(span / 104), 1, heads)));
    wide = Math.min(span / columns, 230);
  }
  const layerOf = (cursor) => Math.max(0, named.indexOf(cursor.choice.layer));
  const at = (l, t, item) => ((l * heads + Math.floor(item / hits)) * n + t) * hits + (item % hits);
  const place = (t) => (length ? `${Math.floor(t / length)}:${t % length}` : `${t}`);
  const long = (t) => (length ? `segment ${Math.floor(t / length)}, token ${t % length} of it` : "");
  const say = (t) => `token ${t} “${tokens[t]}”`;
  const under = (t) => (t ? tokens[t - 1] : "the start");
  const skipped = (l, t) => search && !search.data[l * n + t];
  function whole(l, t) { // the weight of each past token for this one, mean over heads
    const sum = new Float32Array(n);
    for (let i = 0; i < heads * hits; i++) {
      const k = at(l, t, i);
      if (source.data[k] >= 0) sum[source.data[k]] += weight.data[k] / heads;
    }
    return sum;
  }
  function describe(t, item, cursor) {
    const l = layerOf(cursor), k = at(l, t, item), u = source.data[k];
    let text = `${say(t)}, layer ${layers[l]}, head ${Math.floor(item / hits)}, hit ${(item % hits) + 1} of ${hits}: `;
    if (skipped(l, t)) text += "search skipped";
    else if (u < 0) text += "no hit";
    else text += `${say(u)} after “${under(u)}”` + (length ? ` (${long(u)})` : "") +
      `, score ${exact(score.data[k], score.step)}, weight ${exact(weight.data[k], weight.step)}`;
    return text + (gate ? `; retrieval gate ${exact(gate.data[l * n + t], gate.step)}` : "");
  }
  const corner = (item) => {
    const h = Math.floor(item / hits);
    return [(h % columns) * wide, top + Math.floor(h / columns) * (head + hits * tall + gap) + head + (item % hits) * tall];
  };
  const x = (t) => 1 + (t * span) / n;
  function paint(g, cursor) {
    measure(g.width);
    const l = layerOf(cursor), t = cursor.time, sum = whole(l, t);
    g.text(`${say(t)}${length ? `, ${long(t)}` : ""}`, 0, 9, { bold: true });
    if (g.width > 560) g.legend(g.width - 4, 9, "0", "1", "weight");
    g.cells(1, past, span, 12, n, 1, (i) => (i < t || sum[i] ? sum[i] : NaN));
    for (let i = length; length && i < n; i += length) g.line([[x(i), past], [x(i), past + 12]], g.faint, 1, [2, 3]);
    g.mark(x(t), past, Math.max(3, span / n), 12);
    readAlong(g, tokens, t, 0, past + 32, span);
    for (let h = 0; h < heads; h++) {
      const [left, y] = corner(h * hits);
      g.text(`head ${h}`, left + 2, y - head / 2, { bold: true, colour: g.faint, size: 11 });
    }
    for (let i = 0; i < heads * hits; i++) {
      const [left, y] = corner(i), k = at(l, t, i), u = source.data[k], w = weight.data[k];
      if (u < 0) {
        g.text(i % hits ? "–" : skipped(l, t) ? "skipped" : "no hit", left + 8, y + tall / 2, { colour: g.faint });
        continue;
      }
      g.rect(left, y, wide - 4, tall - 3, rgb(w));
      const ink = { colour: onColour(w), room: (wide - 18) / 2 };
      g.text(`${under(u)} `, left + 6, y + 10, ink);
      g.text(tokens[u], left + 8 + Math.min(ink.room, textWidth(g, `${under(u)} `)), y + 10, { ...ink, bold: true });
      g.text(place(u), left + wide - 10, y + 10, { ...ink, align: "right", size: 11 });
      g.text(`score ${brief(score.data[k])}`, left + 6, y + 24, { ...ink, size: 11 });
      g.text(w.toFixed(2), left + wide - 10, y + 24, { ...ink, align: "right", size: 11 });
    }
    const [left, y] = corner(cursor.item);
    g.mark(left, y, wide - 4, tall - 3);
  }
  function textWidth(g, words) {
    g.ctx.font = `12px ${g.font}`;
    return g.ctx.measureText(words).width;
  }
  const next = (cursor, way) => {
    for (let t = cursor.time + way; t >= 0 && t < n; t += way) {
      if (asked.size ? asked.has(t) : whole(layerOf(cursor), t).some((w) => w > 0.5)) return { time: t };
    }
    return null;
  };
  return {
    height: (width) => {
      measure(width);
      return top + Math.ceil(heads / columns) * (head + hits * tall + gap);
    },
    paint,
    describe,
    place: (t, item) => {
      const [left, y] = corner(item);
      return { x: left, y, width: wide - 4, height: tall - 3 };
    },
    locate: (px, py) => {
      if (py >= past && py < past + 12) return { time: clamp(Math.floor(((px - 1) / span) * n), 0, n - 1) };
      const column = Math.floor(px / wide), band = head + hits * tall + gap, line = Math.floor((py - top) / band);
      const rank = Math.floor((py - top - line * band - head) / tall), h = line * columns + column;
      return py >= top && column < columns && h < heads && rank >= 0 && rank < hits ? { item: h * hits + rank } : null;
    },
    where: (t) => `token ${t} of ${n - 1}` + (length ? `, segment ${Math.floor(t / length)}` : ""),
    table: (cursor) => [["layer", "head", "hit", "token", "previous token", "score", "weight"],
      ...Array.from({ length: heads * hits }, (_, i) => [i, at(layerOf(cursor), cursor.time, i)])
        .filter(([, k]) => source.data[k] >= 0)
        .map(([i, k]) => [layers[layerOf(cursor)], Math.floor(i / hits), (i % hits) + 1, say(source.data[k]),
          under(source.data[k]), exact(score.data[k], score.step), exact(weight.data[k], weight.step)])],
    actions: [
      { label: asked.size ? "Next question" : "Next strong hit", key: "n", run: (cursor) => next(cursor, 1) },
      { label: asked.size ? "Previous question" : "Previous strong hit", key: "b", run: (cursor) => next(cursor, -1) },
      { label: "Next head", key: "h", run: (cursor) => ({ item: (cursor.item + hits) % (heads * hits) }) },
      { label: "Go to this hit", key: "g", run: (cursor) => {
        const u = source.data[at(layerOf(cursor), cursor.time, cursor.item)];
        return u < 0 ? null : { time: u };
      } },
    ],
  };
};
