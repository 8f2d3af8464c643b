// -- unpacking; report/packed.py documents the layout -------------------------------------------------------------

async function inflate(id) {
  const text = atob($(id).textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
const json = bytes => JSON.parse(new TextDecoder().decode(bytes));

const blocks = new Map();
function block(number) {
  if (!blocks.has(number)) blocks.set(number, inflate(`block${number}`).then(bytes => unpack(bytes, number)));
  return blocks.get(number);
}

function unpack(bytes, number) {
  const first = number * page.block, last = Math.min(first + page.block, index.row.length);
  const starts = [];
  let count = 0;
  for (let at = first; at < last; at++) for (const n of index.tokens[at]) { starts.push(count); count += n; }
  const length = new DataView(bytes.buffer).getUint32(0, true);
  let offset = 4 + length;
  const planes = (width, size = count) => {
    const found = new Int32Array(size);
    for (let plane = 0; plane < width; plane++, offset += size)
      for (let i = 0; i < size; i++) found[i] |= bytes[offset + i] << (8 * plane);
    return found;
  };
  const head = json(bytes.subarray(4, offset)), numbers = planes(page.width);
  const int16 = x => x << 16 >> 16, fields = page.fields.map(() => planes(2).map(int16));
  return {first, head, starts, numbers, fields, own: page.own && unpackOwn(planes, first, last, int16)};
}

/** Unpack a pair for the page: `at` is its place in the index. */
async function pairAt(at) {
  const packed = await block(Math.floor(at / page.block)), i = at - packed.first;
  const sides = SIDES.map((name, side) => {
    const from = packed.starts[2 * i + side], n = index.tokens[at][side];
    const fields = page.fields.map((field, f) => {
      const raw = packed.fields[f].subarray(from, from + n), step = 2 ** index.steps[at][f];
      if (!field.path) return Float64Array.from(raw, x => x === -32768 ? NaN : x * step);
      const path = new Float64Array(n + 1).fill(index[`${field.kind}_start`][name][at]);
      for (let t = 0, sum = 0; t < n; t++) path[t + 1] += (sum += raw[t]) * step;
      return path;
    });
    const shared = packed.own && packed.own.studentShared.subarray(from, from + n);
    return {name, n, ended: index.ended[at][side], pieces: packed.numbers.subarray(from, from + n), fields, shared};
  });
  if (packed.own) sides.forEach((side, number) => { side.own = ownOf(packed.own, side, at, 2 * i + number, number); });
  return {at, prompt: packed.head.prompts[packed.head.which[i]], sides};
}

/** Return the values of the states as psi uses them: `terminal` defines the one after an end token. */
function statesOf(side, field) {
  const states = Float64Array.from(side.fields[field]), {terminal} = page.weights;
  if (side.ended && terminal !== "bootstrap") states[side.n] = terminal === "zero" ? 0 : states[side.n - 1];
  return states;
}

/** Return what a mode shows of each token, and the number for its colour and rank. */
function valuesOf(side, mode) {
  if (mode.show === "logp") return {show: side.fields[mode.field], shade: side.fields[mode.field]};
  if (mode.show === "ratio") {
    const ratio = side.fields[mode.field].map((x, t) => x - side.fields[mode.base][t]);
    return {show: ratio, shade: ratio};
  }
  const states = statesOf(side, mode.field), after = states.subarray(1);
  if (mode.show === "V") return {show: after, shade: after.map(v => v - states[0])};
  const psi = after.map((v, t) => page.weights.discount * v - states[t]);
  return {show: psi, shade: psi};
}
