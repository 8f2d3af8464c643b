// -- the plot of V ---------------------------------------------------------------------------------------------------

const NS = "http://www.w3.org/2000/svg";
function draw(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function ticks(low, high, about) {
  const rough = (high - low) / about || 1, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].find(m => m * power >= rough) * power, found = [];
  for (let x = Math.ceil(low / gap) * gap; x <= high + gap * 1e-6; x += gap) found.push([x, gap < 1 ? Math.ceil(-Math.log10(gap)) : 0]);
  return found;
}

let scale = null;
function drawPlot() {
  const field = mode && page.fields[mode.field].path ? mode.field : page.fields.findIndex(f => f.path);
  $("figure").hidden = field < 0;
  scale = null;
  if (field < 0) return;
  const width = Math.max(280, $("plot").clientWidth), height = 200, left = 46, right = 74, top = 12, bottom = 32;
  const paths = current.sides.map(side => side.fields[field]);
  const longest = Math.max(...current.sides.map(side => side.n));
  const values = paths.flatMap(path => [...path]);
  let low = Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-6) { low -= 0.5; high += 0.5; }
  const x = t => left + (width - left - right) * t / longest, y = v => top + (height - top - bottom) * (high - v) / (high - low);
  const words = current.sides.map((side, i) => `${side.name} goes from ${plain(paths[i][0])} to ${plain(paths[i][side.n])} over ${many(side.n, "token")}, lowest ${plain(Math.min(...paths[i]))}, highest ${plain(Math.max(...paths[i]))}`);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `V over tokens: ${words.join("; ")}.`});
  for (const [v, digits] of ticks(low, high, 4)) svg.append(
    draw("line", {x1: left, x2: width - right, y1: y(v), y2: y(v), class: "rule"}),
    draw("text", {x: left - 8, y: y(v) + 4, "text-anchor": "end"}, v.toFixed(digits).replace("-", "−")));
  for (const [t] of ticks(0, longest, width / 90).filter(([t]) => Number.isInteger(t)))
    svg.append(draw("text", {x: x(t), y: height - 14, "text-anchor": "middle"}, count(t)));
  svg.append(draw("text", {x: width - right + 8, y: height - 14}, "tokens"));
  svg.append(draw("line", {x1: left, x2: width - right, y1: y(paths[0][0]), y2: y(paths[0][0]), class: "start"}));
  const ends = [];
  current.sides.forEach((side, i) => {
    const path = paths[i], until = side.ended ? side.n - 1 : side.n;
    let d = "";
    for (let t = 0; t <= until; t++) d += `${t ? "L" : "M"}${x(t).toFixed(1)} ${y(path[t]).toFixed(1)}`;
    svg.append(draw("path", {d, class: `line ${side.name}`}));
    if (side.ended) svg.append(
      draw("path", {d: `M${x(until)} ${y(path[until])}L${x(side.n)} ${y(path[side.n])}`, class: `after ${side.name}`}),
      draw("circle", {cx: x(side.n), cy: y(path[side.n]), r: 3, class: `after ${side.name}`}));
    ends.push({name: side.name, at: x(side.n) + 8, y: y(path[until])});
  });
  if (Math.abs(ends[0].at - ends[1].at) < 62 && Math.abs(ends[0].y - ends[1].y) < 15) {
    const upper = ends[0].y <= ends[1].y ? 0 : 1, middle = (ends[0].y + ends[1].y) / 2;
    ends[upper].y = middle - 7.5; ends[1 - upper].y = middle + 7.5;
  }
  for (const end of ends) svg.append(draw("text", {x: end.at, y: Math.min(Math.max(end.y + 4, 12), height - bottom), class: `name ${end.name}`}, end.name));
  const line = draw("line", {y1: top, y2: height - bottom, class: "cursor", visibility: "hidden"});
  const dots = SIDES.map(name => draw("circle", {r: 4, class: `dot ${name}`, visibility: "hidden"}));
  svg.append(line, ...dots);
  $("plot").replaceChildren(svg);
  scale = {x, y, paths, line, dots, svg, width, left, right, longest};
  movePlot();
}

function movePlot() {
  if (!scale) return;
  const {x, y, paths, line, dots} = scale;
  line.setAttribute("visibility", cursor ? "visible" : "hidden");
  const state = cursor ? inPlot() + 1 : 0;
  dots.forEach((dot, i) => {
    const there = cursor && state < paths[i].length;
    dot.setAttribute("visibility", there ? "visible" : "hidden");
    if (there) { dot.setAttribute("cx", x(state)); dot.setAttribute("cy", y(paths[i][state])); }
  });
  if (cursor) for (const name of ["x1", "x2"]) line.setAttribute(name, x(state));
}
