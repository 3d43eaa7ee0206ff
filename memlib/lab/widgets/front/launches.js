// A kernel launch, access by access: which elements of each tensor its programs load and store.
views.launch = (frame) => {
  const { names, rows, columns, stored_nowhere: nowhere, programs, says, lines } = frame.words;
  const { starts, elements, program, grid, store, loaded, once, stored, flops } = Object.fromEntries(
    Object.entries(frame.arrays).map(([name, array]) => [name, array.data]));
  const n = frame.times, shows = frame.choices.show, head = 26, label = 18, gap = 12, foot = 24;
  const first = [0];
  rows.forEach((count, g) => first.push(first[g] + count * columns[g]));
  const total = first[first.length - 1];
  // What this access touches, and lighter, what its program touched before: loads, stores, pairs.
  const COLOURS = [[[213, 94, 0], [239, 187, 147]], [[0, 114, 178], [143, 195, 227]], [[0, 158, 115], [143, 211, 190]]];
  const DARK = [[[230, 115, 20], [112, 62, 25]], [[60, 160, 220], [28, 72, 102]], [[20, 185, 140], [18, 84, 66]]];
  let boxes = [], tall = 0, last = 0;

  const gridOf = (element) => first.findIndex((start) => start > element) - 1;
  const labelOf = (g) => `${names[g]}  ${rows[g]} × ${columns[g]}`;
  const number = (x) => x.toLocaleString("en");
  const counted = (t) => `${number(loaded[t])} bytes loaded, ${number(once[t])} if each were loaded once; ` +
    `${number(stored[t])} stored` + (flops[n - 1] ? `; ${number(flops[t])} operations` : "");
  function elementName(element) {
    const g = gridOf(element), i = element - first[g], r = Math.floor(i / columns[g]), c = i % columns[g];
    if (nowhere[g]) return `pair ${r}, ${c}`;
    return rows[g] === 1 ? `${names[g]}[${c}]` : columns[g] === 1 ? `${names[g]}[${r}]` : `${names[g]}[${r}, ${c}]`;
  }
  // How often each element has been touched up to access t, and by which programs one of them.
  function touches(t) {
    const count = new Uint16Array(total);
    for (let i = 0; i < starts[t + 1]; i++) count[elements[i]] += 1;
    return count;
  }
  const most = Math.max(...touches(n - 1));
  function touchedBy(element, t) {
    const by = [];
    for (let a = 0; a <= t; a++) {
      for (let i = starts[a]; i < starts[a + 1]; i++) if (elements[i] === element) by.push(programs[program[a]]);
    }
    if (!by.length) return "not touched so far";
    const who = [...new Set(by)], few = who.slice(0, 6).join(", ") + (who.length > 6 ? ", …" : "");
    return `touched ${by.length === 1 ? "once" : `${by.length} times`} so far, by program${who.length > 1 ? "s" : ""} ${few}`;
  }
  function describe(t, element) {
    last = element;
    return `Step ${t}, line ${lines[t]}: ${says[t]}. So far ${counted(t)}. ${elementName(element)}: ${touchedBy(element, t)}.`;
  }

  // Place the grids from left to right, their cells as large as fits.
  function arrange(width) {
    for (let cell = 14; ; cell *= 0.95) {
      let x = 0, y = head, high = 0;
      boxes = rows.map((_, g) => {
        const w = Math.max(3, columns[g]) * cell, h = Math.max(3, rows[g]) * cell, room = Math.max(w, 7 * labelOf(g).length);
        if (x && x + room > width) [x, y, high] = [0, y + label + high + gap, 0];
        const box = { x: x + 1, y: y + label, w, h };
        [x, high] = [x + room + gap, Math.max(high, h)];
        return box;
      });
      tall = y + label + high + foot;
      if (cell < 0.2 || (tall < 480 && boxes.every((box) => box.x + box.w < width))) return;
    }
  }

  function paint(g, cursor) {
    arrange(g.width);
    last = cursor.item;
    const t = cursor.time, dark = isDark(g), colours = dark ? DARK : COLOURS;
    const [untouched, others] = dark ? [[40, 40, 40], [96, 96, 96]] : [[240, 240, 240], [196, 196, 196]];
    g.text(`program ${programs[program[t]]}, one of ${programs.length}`, 0, 10, { bold: true });
    if (cursor.choice.show === shows[1]) {
      const count = touches(t);
      boxes.forEach((box, i) => g.cells(box.x, box.y, box.w, box.h, columns[i], rows[i],
        (e) => (count[first[i] + e] ? count[first[i] + e] / most : NaN)));
      g.legend(g.width - 4, 10, "0", String(most), g.width > 560 ? "times touched" : "");
    } else {
      const state = new Uint8Array(total), kind = new Uint8Array(total); // 1 other programs, 2 this one, 3 now
      for (let a = 0; a <= t; a++) {
        const stage = a === t ? 3 : program[a] === program[t] ? 2 : 1;
        for (let i = starts[a]; i < starts[a + 1]; i++) {
          const e = elements[i];
          if (state[e] > stage) continue;
          state[e] = stage;
          kind[e] = e >= first[grid[a]] && e < first[grid[a] + 1] ? store[a] : 2;
        }
      }
      const shade = (e) => [untouched, others, colours[kind[e]][1], colours[kind[e]][0]][state[e]];
      boxes.forEach((box, i) => g.pixels(box.x, box.y, box.w, box.h, columns[i], rows[i], (e) => shade(first[i] + e)));
      key(g, colours, others);
    }
    boxes.forEach(({ x, y, w, h }, i) => {
      g.text(labelOf(i), x, y - 9, { size: 11, colour: g.faint });
      g.line([[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]], g.rule, 1);
    });
    const { x, y, width, height } = place(t, cursor.item);
    g.mark(x, y, Math.max(3, width), Math.max(3, height));
  }

  function isDark(g) {
    g.ctx.fillStyle = g.paper; // reads as #rrggbb, however the theme wrote it
    return parseInt(g.ctx.fillStyle.slice(1, 3), 16) < 128;
  }

  // The colours in words, as many as fit.
  function key(g, colours, others) {
    const entries = [["loaded now", colours[0][0]], ["stored now", colours[1][0]],
      ...(nowhere.some(Boolean) ? [["pairs met now", colours[2][0]]] : []),
      ["before, in this program", colours[0][1]], ["programs before", others]];
    let x = 0;
    for (const [words, colour] of entries) {
      g.ctx.font = `11px ${g.font}`;
      const wide = g.ctx.measureText(words).width;
      if (x + wide + 16 > g.width) break;
      g.rect(x, tall - 14, 10, 10, `rgb(${colour.join()})`);
      g.text(words, x + 14, tall - 8, { size: 11, colour: g.faint });
      x += wide + 30;
    }
  }

  function place(t, element) {
    const i = gridOf(element), box = boxes[i], e = element - first[i];
    const width = box.w / columns[i], height = box.h / rows[i];
    return { x: box.x + (e % columns[i]) * width, y: box.y + Math.floor(e / columns[i]) * height, width, height };
  }

  // The first access of the next or previous program.
  const other = (cursor, way) => {
    let t = cursor.time;
    while (t + way >= 0 && t + way < n && program[t] === program[cursor.time]) t += way;
    if (program[t] === program[cursor.time]) return null;
    while (t > 0 && program[t - 1] === program[t]) t -= 1;
    return { time: t };
  };
  return {
    get stride() {
      return columns[gridOf(last)];
    },
    height: (width) => {
      arrange(width);
      return tall;
    },
    paint,
    describe,
    place,
    locate: (px, py) => {
      const i = boxes.findIndex(({ x, y, w, h }) => px >= x && px < x + w && py >= y && py < y + h);
      if (i < 0) return null;
      const column = Math.floor(((px - boxes[i].x) / boxes[i].w) * columns[i]);
      return { item: first[i] + Math.floor(((py - boxes[i].y) / boxes[i].h) * rows[i]) * columns[i] + column };
    },
    where: (t) => `step ${t} of ${n - 1}, program ${programs[program[t]]}`,
    table: (cursor) => {
      const t = cursor.time, count = touches(t);
      const sum = (g, test) => {
        let found = 0;
        for (let e = first[g]; e < first[g + 1]; e++) found += test(count[e]);
        return found;
      };
      return [["grid", "elements", "touched so far", "touches so far", "most touches of an element"],
        ...names.map((name, g) => [name, rows[g] * columns[g], sum(g, (c) => c > 0), sum(g, (c) => c),
          Math.max(...count.subarray(first[g], first[g + 1]))])];
    },
    actions: [
      { label: "Next program", key: "n", run: (cursor) => other(cursor, 1) },
      { label: "Previous program", key: "b", run: (cursor) => other(cursor, -1) },
      { label: "Next tensor", key: "g", run: (cursor) => ({ item: first[(gridOf(cursor.item) + 1) % names.length] }) },
    ],
  };
};
