// -- the tokens of a teacher that reads the text in other ones -------------------------------------------------------

function unpackOwn(planes, first, last, int16) {
  const starts = [];
  let count = 0;
  for (let at = first; at < last; at++) for (const n of index.own.tokens[at]) { starts.push(count); count += n; }
  const studentShared = planes(1), numbers = planes(page.width, count), shared = planes(1, count);
  return {starts, studentShared, numbers, shared, steps: page.own.kind ? planes(2, count).map(int16) : null};
}

/** Return a response in the teacher's own tokens; its values are a field of the same number as the student's. */
function ownOf(own, student, at, place, number) {
  const from = own.starts[place], n = index.own.tokens[at][number], part = numbers => numbers.subarray(from, from + n);
  const fields = [], field = page.fields.findIndex(each => each.kind === page.own.kind);
  if (own.steps) {
    const path = fields[field] = new Float64Array(n + 1).fill(student.fields[field][0]), step = 2 ** index.own.steps[at];
    for (let t = 0, sum = 0; t < n; t++) path[t + 1] += (sum += own.steps[from + t]) * step;
  }
  return {name: `${student.name}-own`, n, ended: student.ended, pieces: part(own.numbers), shared: part(own.shared), fields};
}

const modesOf = side => page.modes.filter(each => side.fields[each.field]); // the teacher's own tokens have V and psi alone

function showOwn(own, name) {
  const values = mode && own.fields[mode.field] ? valuesOf(own, mode) : null;
  const shared = own.shared.reduce((a, b) => a + b, 0);
  $(`${own.name}-facts`).textContent = `${many(own.n, "token")} · ${count(shared)} end where one of the student's does`;
  $(own.name).replaceChildren(...Array.from({length: own.n}, (_, t) => tokenNode(own, t, values)));
  $(own.name).setAttribute("aria-label", `${name} response in the teacher's own tokens, ${many(own.n, "token")}; arrow keys go token by token`);
}

/** Return the first and the last token of the other tokenisation between the two shared boundaries around token t. */
function twins(side, other, t) {
  let segment = 0, from = 0;
  for (let i = 0; i < t; i++) segment += side.shared[i];
  for (let passed = 0; passed < segment && from < other.n - 1; from++) passed += other.shared[from];
  let until = from;
  while (until < other.n - 1 && !other.shared[until]) until++;
  return [from, until];
}

/** Return the token of the student at which the plot shows the current token. */
function inPlot() {
  const side = current.sides[cursor.side];
  return cursor.own ? twins(side.own, side, cursor.t)[1] : cursor.t;
}
