"use strict";
// The token view; the includes make it one script. Text of models reaches the page through text nodes only.
(() => {
const $ = id => document.getElementById(id);
const page = JSON.parse($("page").textContent);
const SIDES = page.sides, LEVELS = 8, RANKED = 3;
const SPECIAL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u2028-\u202e\u2060-\u2069\ufeff\p{Cs}]/u;
const MARKED = new RegExp(`(${SPECIAL.source}|[\\n\\t])`, "u"), SPACED = new RegExp(`(${SPECIAL.source}|[\\n\\t ])`, "u");
const RANKS = ["①", "②", "③"];
const title = document.title;
let index, pieces, special;

{% include "tokens_read.js" %}
{% include "tokens_own.js" %}
// -- words and small things ------------------------------------------------------------------------------------------

const fine = mode => Math.max(2, 2 - Math.floor(Math.log10(mode.scale))); // digits of a token's numbers
const signed = (x, digits = 2) => {
  if (x === null || Number.isNaN(x)) return "–";
  const text = Math.abs(x).toFixed(digits);
  return (+text === 0 ? "" : x > 0 ? "+" : "−") + text;
};
const plain = (x, digits = 2) => signed(x, digits).replace("+", "");
const count = n => n.toLocaleString("en");
const many = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const code = c => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

/** Add text with invisible characters made visible; line breaks keep their mark without the whitespace option. */
function addText(node, text, breaks, marks = $("marks").checked) {
  for (const part of text.split(marks ? SPACED : MARKED)) {
    if (!part) continue;
    if (part === " ") mark(node, "·", " ");
    else if (part === "\n") { if (marks || breaks) mark(node, "↵", "\n"); else node.append("\n"); }
    else if (part === "\t") { if (marks) mark(node, "⇥", "\t"); else node.append("\t"); }
    else if (SPECIAL.test(part)) node.append(make("span", "unseen", code(part)));
    else node.append(part);
  }
}
function mark(node, shown, real) {
  const sign = make("i", "mark", real === " " ? "" : shown);
  sign.setAttribute("aria-hidden", "true");
  if (real === " ") { sign.className = "dot"; sign.append(real); node.append(sign); }
  else node.append(sign, real);
}

// -- the list of pairs -----------------------------------------------------------------------------------------------

const psiKind = () => Object.keys(index.psi)[0];
const gap = both => both[0] - both[1];
const psiDigits = (psi => psi ? fine(psi) : 2)(page.modes.find(mode => mode.show === "psi"));
const margin = at => psiKind() ? gap(index.psi[psiKind()][at]) : null;
const ratios = (a, b) => index.logps[a] && index.logps[b]
  ? at => SIDES.map((_, side) => index.logps[a][at][side] - index.logps[b][at][side]) : null;
const cutOf = at => index.prompt_cut[at] + index.cut[at][0] + index.cut[at][1];

function sorts() {
  const found = [];
  const student = ratios("student", "reference"), teacher = ratios("teacher", "teacher_reference");
  if (psiKind()) found.push(
    ["against", "Ψ most against the label", margin],
    ["with", "Ψ most with the label", at => -margin(at)],
    ["far", "largest difference of Ψ", at => -Math.abs(margin(at))]);
  if (page.fields.some(field => field.path)) found.push(["peak", "largest |ψ| of a token", at => -index.peak[at]]);
  if (student) found.push(["student", "student's DPO margin, lowest", at => gap(student(at))]);
  if (teacher) found.push(["teacher", "teacher's DPO margin, lowest", at => gap(teacher(at))]);
  if (index.scores) found.push(["close", "closest scores", at => Math.abs(gap(index.scores[at]))]);
  found.push(["cut", "most cut by truncation", at => -cutOf(at)],
    ["long", "longest", at => -index.tokens[at][0] - index.tokens[at][1]],
    ["data", "order of the data", at => at]);
  return found;
}

let order = [], all = [], current = null, rowHeight = 60;
const rowOf = new Map();

function arrange() {
  const by = sorts().find(([key]) => key === $("sort").value)[2];
  const keys = index.row.map((_, at) => by(at));
  all = index.row.map((_, at) => at).sort((a, b) => keys[a] - keys[b] || a - b);
}

let texts = null;
async function allTexts() {
  if (texts) return texts;
  const found = new Array(index.row.length), total = Math.ceil(index.row.length / page.block);
  for (let number = 0; number < total; number++) {
    const packed = await block(number);
    for (let at = packed.first, i = 0; at < packed.first + page.block && at < found.length; at++, i++) {
      const from = packed.starts[2 * i], until = from + index.tokens[at][0] + index.tokens[at][1];
      let text = packed.head.prompts[packed.head.which[i]].join("") + "\n";
      for (let t = from; t < until; t++) text += t === packed.starts[2 * i + 1] ? "\n" + pieces.texts[packed.numbers[t]] : pieces.texts[packed.numbers[t]];
      found[at] = text.toLowerCase();
    }
  }
  return texts = found;
}

let searches = 0;
async function filter() {
  const asked = $("search").value.trim(), mine = ++searches;
  if (/^#\d+$/.test(asked)) {
    order = all.filter(at => String(index.row[at]).startsWith(asked.slice(1)));
  } else if (asked) {
    $("found").textContent = "searching …";
    const lower = asked.toLowerCase(), found = await allTexts();
    if (mine !== searches) return;
    order = all.filter(at => found[at].includes(lower));
  } else order = all;
  $("found").textContent = asked ? `${count(order.length)} of ${many(all.length, "pair")}` : many(all.length, "pair");
  $("space").style.height = `${order.length * rowHeight}px`;
  reveal();
  drawList(true);
}

function drawList(anew) {
  const list = $("list"), from = Math.max(0, Math.floor(list.scrollTop / rowHeight) - 4);
  const until = Math.min(order.length, from + Math.ceil(list.clientHeight / rowHeight) + 9);
  if (!anew && drawList.from === from && drawList.until === until) return;
  [drawList.from, drawList.until] = [from, until];
  $("space").replaceChildren(...order.slice(from, until).map((at, i) => option(at, from + i)));
  const active = current !== null && $(`option${current.at}`);
  if (active) list.setAttribute("aria-activedescendant", active.id); else list.removeAttribute("aria-activedescendant");
}

function option(at, place) {
  const node = make("div", "option");
  node.id = `option${at}`;
  node.dataset.at = at;
  node.style.top = `${place * rowHeight}px`;
  node.setAttribute("role", "option");
  node.setAttribute("aria-setsize", order.length);
  node.setAttribute("aria-posinset", place + 1);
  node.setAttribute("aria-selected", current !== null && current.at === at);
  const first = make("div", "line"), second = make("div", "line quiet");
  const snippet = make("span", "snippet");
  snippet.dir = "auto";
  addText(snippet, index.prompt[at], false, false);
  first.append(make("span", "row", `#${index.row[at]}`), snippet);
  second.append(make("span", "", `${index.tokens[at].map(count).join(" / ")} tokens`));
  if (cutOf(at)) second.append(make("span", "cut", "cut"));
  if (psiKind()) second.append(make("span", margin(at) < 0 ? "push against" : "push", `ΔΨ ${signed(margin(at), psiDigits)}${margin(at) < 0 ? " ✗" : margin(at) > 0 ? " ✓" : ""}`));
  node.append(first, second);
  return node;
}

function reveal() {
  const place = current === null ? -1 : order.indexOf(current.at), list = $("list");
  if (place < 0) { list.scrollTop = 0; return; }
  const top = place * rowHeight;
  if (top < list.scrollTop || top + rowHeight > list.scrollTop + list.clientHeight)
    list.scrollTop = Math.max(0, top - list.clientHeight / 3);
}

function step(by) {
  const place = current === null ? -1 : order.indexOf(current.at);
  const next = order[Math.max(0, Math.min(order.length - 1, place + by))];
  if (next !== undefined) go(next);
}

// -- one pair --------------------------------------------------------------------------------------------------------

let wanted = null;
async function go(at) {
  wanted = at;
  const pair = await pairAt(at);
  if (wanted !== at) return; // another pair was asked for meanwhile
  current = pair;
  const hash = `#${index.row[at]}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
  document.title = `${hash} · ${title}`;
  reveal();
  drawList(true);
  show();
}

function show() {
  const {at} = current, place = order.indexOf(at);
  $("name").textContent = `Pair #${index.row[at]}`;
  $("where").textContent = place < 0 ? "not among the search results" : `${count(place + 1)} of ${count(order.length)}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === order.length - 1;
  showNumbers(at);
  showPrompt(at);
  cursor = null;
  colour();
}

function showNumbers(at) {
  const rows = [], told = new Set(), {alpha, beta} = page.weights, names = {values: "Ψ, shaping return", logprob_values: "Ψ of log-probabilities"};
  for (const [kind, psi] of Object.entries(index.psi)) rows.push([names[kind], psi[at], x => signed(x, psiDigits), ["α", alpha]]);
  for (const [a, b, name] of [["teacher", "teacher_reference", "teacher's log-ratio"], ["student", "reference", "student's log-ratio, DPO"]]) {
    const both = ratios(a, b);
    if (!both) continue;
    rows.push([name, both(at), signed, ["β", beta]]);
    told.add(a).add(b);
  }
  for (const [role, logps] of Object.entries(index.logps))
    if (role === "teacher" || !told.has(role)) rows.push([`log-prob, ${role.replace("_", " ")}`, logps[at], signed]);
  if (index.scores) rows.push(["score in the data", index.scores[at], plain]);
  rows.push(["tokens", index.tokens[at], count]);
  $("numbers").tBodies[0].replaceChildren(...rows.map(([name, both, format, weight]) => {
    const line = make("tr"), head = make("th", "", name), difference = both.includes(null) ? null : gap(both);
    head.scope = "row";
    const step = format === count ? x => signed(x, 0) : format === plain ? signed : format;
    line.append(head, ...both.map(x => make("td", "", x === null ? "–" : format(x))),
      make("td", difference < 0 && weight ? "bad" : "", difference === null ? "–" : step(difference)),
      make("td", "quiet", weight ? `${weight[0]} ${weight[1]} → ${format(weight[1] * difference)}` : ""));
    return line;
  }));
  const push = margin(at);
  $("verdict").textContent = push === null ? "" : push === 0 ? "Ψ is the same for both responses."
    : `Ψ is larger for ${push > 0 ? "chosen: it agrees with the label" : "rejected: it contradicts the label"}.`;
  $("verdict").className = push < 0 ? "against" : "";
}

function showPrompt(at) {
  const lost = index.prompt_cut[at], node = $("prompt");
  $("prompt-facts").textContent = many(index.prompt_tokens[at], "token") + (lost ? ` · its first ${many(lost, "token")} truncated by max_prompt_length` : "");
  node.replaceChildren();
  if (lost) node.append(make("span", "lost", `[${many(lost, "token")} truncated] `));
  current.prompt.forEach((text, i) => {
    const part = make("span", i % 2 ? "special" : "");
    addText(part, text, false);
    node.append(part);
  });
  node.scrollTop = 0;
}

let mode = null, cursor = null;

/** Draw the responses in the colours of the mode. */
function colour() {
  current.shown = current.sides.map(side => mode && valuesOf(side, mode));
  current.top = current.shown.map(values => values ? largest(values.shade) : []);
  current.sides.forEach((side, number) => showResponse(side, number));
  showLegend();
  drawPlot();
  point(cursor);
}

function largest(shade) {
  const places = [...shade.keys()].filter(t => Math.abs(shade[t]) > 0);
  return places.sort((a, b) => Math.abs(shade[b]) - Math.abs(shade[a]) || a - b).slice(0, RANKED);
}

function level(x) {
  if (Number.isNaN(x)) return "none";
  const size = Math.min(LEVELS, Math.round(LEVELS * Math.abs(x) / mode.scale));
  return size ? (x > 0 ? "p" : "n") + size : "";
}

function tokenNode(side, t, values) {
  const piece = side.pieces[t], text = pieces.texts[piece], node = make("span", special.has(piece) ? "t special" : "t");
  const shade = values && level(values.shade[t]);
  if (shade) node.classList.add(shade);
  if (side.shared) node.classList.add(side.shared[t] ? "shared" : "apart");
  if (text) addText(node, text, true); else node.append(make("span", "unseen", "◦"));
  node.dataset.t = t;
  return node;
}

function showResponse(side, number) {
  const {at} = current, box = $(side.name), values = current.shown[number], top = current.top[number];
  const lost = index.cut[at][number];
  $(`${side.name}-facts`).textContent = [many(side.n, "token"),
    side.ended ? "ended" : lost ? `cut at max_length: ${many(lost, "token")} lost, not ended` : "has no end token",
  ].join(" · ");
  const nodes = [];
  let text = "";
  for (let t = 0; t < side.n; t++) {
    const node = tokenNode(side, t, values), rank = top.indexOf(t);
    if (rank >= 0) { node.classList.add("top"); node.dataset.rank = RANKS[rank]; }
    if (!special.has(side.pieces[t])) text += pieces.texts[side.pieces[t]];
    nodes.push(node);
  }
  if (!text.trim()) nodes.unshift(make("span", "lost", text ? "[whitespace only] " : "[empty] "));
  if (lost) nodes.push(make("span", "lost", ` [${many(lost, "token")} cut]`));
  if (side.own) showOwn(side.own, side.name);
  box.replaceChildren(...nodes);
  box.setAttribute("aria-label", `${side.name} response, ${many(side.n, "token")}; arrow keys go token by token`);
  const list = $(`${side.name}-largest`);
  list.replaceChildren();
  if (top.length) list.append(make("span", "quiet", `Largest ${mode.show === "V" ? "|V − V(s₀)|" : mode.signed ? "in absolute value" : "surprise"}`));
  top.forEach((t, rank) => {
    const button = make("button", `pick ${level(values.shade[t])}`);
    button.type = "button";
    button.dataset.t = t;
    button.dataset.side = number;
    const label = make("span", "what");
    addText(label, [...tokenText(side, t)].slice(0, 24).join(""), true, true);
    button.append(`${RANKS[rank]} `, label, ` ${number_(values.show[t])}`);
    list.append(button);
  });
}

/** Which tokens a mode has numbers of, in words; nothing if it has those of all. */
const keptBy = shown => page.kept[page.fields[shown.field].role] || (shown.base !== undefined && page.kept[page.fields[shown.base].role]);
const number_ = x => Number.isNaN(x) ? "not stored" : mode.show === "V" ? plain(x, fine(mode)) : signed(x, fine(mode));
const tokenText = (side, t) => pieces.texts[side.pieces[t]] || "◦";

function showLegend() {
  const legend = $("legend");
  legend.replaceChildren();
  if (!mode) return;
  const end = mode.scale.toFixed(fine(mode) - 1), strip = make("span", "strip");
  strip.setAttribute("aria-hidden", "true");
  for (let i = -LEVELS; i <= (mode.signed ? LEVELS : 0); i++) strip.append(make("span", `t ${i ? (i < 0 ? "n" : "p") + Math.abs(i) : ""}`, "\u2002"));
  const low = make("span", "", `−${end}`), high = make("span", "", mode.signed ? `+${end}` : "0");
  const kept = keptBy(mode);
  const words = {
    psi: "ψ: how far this token moved the teacher's value",
    V: "V after this token; colour: its distance from V(s₀), before the response",
    logp: "log-probability of this token",
    ratio: "log-ratio of this token between the two models",
  }[mode.show] + (kept ? `, where it is among ${kept} that the store has` : "");
  const none = kept ? [make("span", "t none", "not stored")] : [];
  legend.append(low, strip, high, ...none, make("span", "quiet", `${words}. 98 % of all tokens lie within the scale (nats).`));
  if (page.own) for (const [edge, text] of [["shared", "teacher and student have this state"], ["apart", "one of the two has: its V holds from the last shared state"]])
    legend.append(make("span", `t ${edge}`, "\u2002"), make("span", "quiet", text));
}

/** Make a token the current one: `{side, t}`, with `own` one of the teacher's own tokens, or null for none. */
function point(to) {
  for (const old of document.querySelectorAll(".t.at, .t.with")) old.classList.remove("at", "with");
  cursor = to;
  const readout = $("readout");
  if (!to) { readout.textContent = mode ? "Point at a token, or use the arrow keys inside a response." : ""; movePlot(); return; }
  const student = current.sides[to.side], side = to.own ? student.own : student, {t} = to;
  const nodeOf = (side, t) => $(side.name).querySelector(`[data-t="${t}"]`);
  nodeOf(side, t).classList.add("at");
  if (student.own) {
    const other = to.own ? student : student.own, [from, until] = twins(side, other, t);
    for (let i = from; i <= until; i++) nodeOf(other, i).classList.add("with");
  }
  readout.replaceChildren(make("b", student.name, student.name), ` ${to.own ? "(teacher's own) " : ""}${count(t + 1)} of ${count(side.n)} `);
  const what = make("span", "what");
  const piece = side.pieces[t];
  addText(what, tokenText(side, t), true, true);
  const id = to.own ? "" : ` id ${pieces.ids[piece]}`, name = pieces.texts[piece] ? "" : `${to.own ? "" : ` ${pieces.names[piece]},`} no text of its own`;
  readout.append(what, make("span", "quiet", id + name + (side.shared && !side.shared[t] ? ", no shared state after it" : "")));
  for (const other of modesOf(side)) {
    const values = valuesOf(side, other), x = values.show[t];
    let text = signed(x, fine(other));
    if (other.show === "V") text = `${plain(statesOf(side, other.field)[t], fine(other))} → ${plain(x, fine(other))}`;
    if (Number.isNaN(x)) text = `not among ${keptBy(other)}`;
    const part = make("span", other === mode ? "part main" : "part");
    part.append(make("span", "quiet", `${other.label} `), text);
    if (other.show === "V" && side.ended && t === side.n - 1 && page.weights.terminal !== "bootstrap")
      part.append(make("span", "quiet", ` (after the end token ${plain(side.fields[other.field][side.n], fine(other))}, not counted)`));
    readout.append(part);
  }
  movePlot();
}

{% include "tokens_plot.js" %}
// -- what the reader does --------------------------------------------------------------------------------------------

function choose(key) {
  mode = page.modes.find(other => other.key === key) || null;
  for (const radio of $("modes").querySelectorAll("input")) radio.checked = radio.value === key;
  if (current) colour();
}

function setUp() {
  for (const [key, label] of sorts().map(([key, label]) => [key, label])) $("sort").append(new Option(label, key));
  page.modes.forEach((each, i) => {
    const label = make("label"), radio = make("input");
    radio.type = "radio";
    radio.name = "mode";
    radio.value = each.key;
    label.append(radio, make("span", "", each.label), make("kbd", "", i < 9 ? i + 1 : ""));
    $("modes").append(label);
  });
  if (!page.modes.length) $("modes").append(make("span", "quiet", "These signals hold nothing of single tokens to colour by; see below what would."));
  $("modes").addEventListener("change", event => choose(event.target.value));
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("sort").addEventListener("change", () => { arrange(); filter().then(() => { if (order.length) go(order[0]); }); });
  let timer = 0;
  $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => filter().then(afterSearch), 150); });
  $("search").addEventListener("keydown", event => {
    if (event.key === "Escape") { $("search").value = ""; filter().then(afterSearch); $("list").focus(); }
    if (event.key === "Enter" && order.length) { go(order[0]); $("list").focus(); }
  });
  $("list").addEventListener("scroll", () => drawList(false));
  $("list").addEventListener("click", event => { const found = event.target.closest(".option"); if (found) go(+found.dataset.at); });
  $("list").addEventListener("keydown", event => {
    const far = Math.max(1, Math.floor($("list").clientHeight / rowHeight) - 1);
    const by = {ArrowDown: 1, ArrowUp: -1, PageDown: far, PageUp: -far, Home: -order.length, End: order.length}[event.key];
    if (by) { event.preventDefault(); step(by); }
  });
  $("marks").addEventListener("change", again);
  $("template").addEventListener("change", () => $("pair").classList.toggle("bare", !$("template").checked));
  SIDES.forEach((name, side) => {
    for (const own of page.own ? [false, true] : [false]) {
      const box = $(own ? `${name}-own` : name), to = event => { const token = event.target.closest(".t"); if (token) point({side, t: +token.dataset.t, own}); };
      box.addEventListener("mouseover", to);
      box.addEventListener("click", to);
      box.addEventListener("focus", () => { if (!isAt(side, own)) point({side, t: 0, own}); });
      box.addEventListener("keydown", event => walk(event, side, own));
    }
    $(`${name}-largest`).addEventListener("click", event => {
      const button = event.target.closest("button");
      if (button) { point({side, t: +button.dataset.t}); seen(); }
    });
  });
  $("plot").addEventListener("pointermove", event => {
    if (!scale) return;
    const box = scale.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - scale.left) / (scale.width - scale.left - scale.right);
    const t = Math.max(0, Math.min(scale.longest, Math.round(share * scale.longest)) - 1);
    const side = cursor && t < current.sides[cursor.side].n ? cursor.side : current.sides.findIndex(s => t < s.n);
    point({side, t});
  });
  document.addEventListener("keydown", shortcut);
  addEventListener("hashchange", () => { const at = rowOf.get(location.hash.slice(1)); if (at !== undefined && (!current || current.at !== at)) go(at); });
  addEventListener("resize", () => { drawList(true); if (current) drawPlot(); });
}

function again() { if (current) { const at = cursor; showPrompt(current.at); colour(); point(at); drawList(true); } }
function afterSearch() { if (current) show(); }
const isAt = (side, own) => cursor && cursor.side === side && !cursor.own === !own;
function seen() { $(`${SIDES[cursor.side]}${cursor.own ? "-own" : ""}`).querySelector(".at").scrollIntoView({block: "nearest"}); }

function walk(event, side, own) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const {n} = own ? current.sides[side].own : current.sides[side], t = isAt(side, own) ? cursor.t : 0;
  const ranked = own ? [] : [...current.top[side]].sort((a, b) => a - b);
  const to = {
    ArrowRight: () => event.shiftKey ? ranked.find(place => place > t) ?? t : Math.min(n - 1, t + 1),
    ArrowLeft: () => event.shiftKey ? ranked.findLast(place => place < t) ?? t : Math.max(0, t - 1),
    Home: () => 0,
    End: () => n - 1,
  }[event.key];
  if (!to) return;
  event.preventDefault();
  point({side, t: to(), own});
  seen();
}

function shortcut(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || !$("shortcuts").checked) return;
  const node = event.target;
  if (node.tagName === "SELECT" || node.tagName === "INPUT" && !["checkbox", "radio"].includes(node.type)) return;
  const press = {
    j: () => step(1), k: () => step(-1), "/": () => $("search").focus(), w: () => $("marks").click(), t: () => $("template").click(),
    c: () => $("chosen").focus(), r: () => $("rejected").focus(),
    "?": () => { $("keys").open = true; $("keys").scrollIntoView(); $("keys").querySelector("summary").focus(); },
  }[event.key];
  const number = /^[1-9]$/.test(event.key) ? page.modes[event.key - 1] : null;
  if (!press && !number) return;
  event.preventDefault();
  if (press) press(); else choose(number.key);
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old: it has no DecompressionStream (Chromium 80, Firefox 113, Safari 16.4 do)");
  [index, pieces] = (await Promise.all([inflate("index"), inflate("pieces")])).map(json);
  special = new Set(pieces.special);
  index.row.forEach((row, at) => rowOf.set(String(row), at));
  setUp();
  rowHeight = parseFloat(getComputedStyle($("list")).getPropertyValue("--row")) || rowHeight;
  arrange();
  choose(page.modes.length ? page.modes[0].key : "");
  const asked = rowOf.get(location.hash.slice(1));
  await filter();
  if (/^#\d+$/.test(location.hash) && asked === undefined) $("state").textContent = `There is no pair ${location.hash} here; this is the first.`;
  await go(asked === undefined ? order[0] : asked);
  document.documentElement.dataset.ready = Math.round(performance.now());
}
start().catch(error => { $("state").textContent = `This page could not be opened: ${error.message}`; throw error; });
})();
