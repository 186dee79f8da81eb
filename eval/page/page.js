"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const measureOf = Object.fromEntries(data.measures.map((m) => [m.name, m]));
const CELL = 68; // pixels of a picture on the page, unless it is larger than that in its sheet
let chosen = null; // a row of data.rows
let order = null; // {name, up}: how the table is sorted

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const visible = () => data.rows.filter((row) => row.scope === byId("scope").value);
const name = (row) => data.methods[row.method].title + (row.label ? ", " + row.label : "");
const number = (value) => (value === undefined || value === null ? "–" : value.toFixed(3));

function nonDominated(rows, x, y) {
  const signs = [x, y].map((m) => (measureOf[m].higher ? 1 : -1));
  const at = (row) => [signs[0] * row.scores[x][0], signs[1] * row.scores[y][0]];
  return rows.filter((a) => !rows.some((b) => {
    const [p, q] = [at(a), at(b)];
    return q[0] >= p[0] && q[1] >= p[1] && (q[0] > p[0] || q[1] > p[1]);
  }));
}

function bars(rows, axis) {
  const side = (k, sign) => rows.map((r) => (r.scores[axis][k] === null ? 0 : Math.max(0, sign * (r.scores[axis][k] - r.scores[axis][0]))));
  return { type: "data", symmetric: false, array: side(2, 1), arrayminus: side(1, -1), thickness: 1, width: 0 };
}

// Plotly takes <b>, <br> and the like in its texts for markup, and &lt; for a letter.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function draw() {
  const [x, y] = [byId("x").value, byId("y").value];
  const rows = visible().filter((row) => row.scores[x] && row.scores[y]);
  const traces = [];
  data.methods.forEach((method, k) => {
    const mine = rows.filter((row) => row.method === k);
    if (!mine.length) return;
    const front = nonDominated(mine, x, y).sort((a, b) => a.scores[x][0] - b.scores[x][0]);
    const common = { legendgroup: method.name, x: [], y: [] };
    if (front.length > 1) {
      traces.push({ ...common, x: front.map((r) => r.scores[x][0]), y: front.map((r) => r.scores[y][0]), mode: "lines",
        line: { color: method.colour, width: 2 }, opacity: 0.7, hoverinfo: "skip", showlegend: false });
    }
    // A mark of its own for the legend, which else would look like the method's first point, chosen or hollow.
    traces.push({ ...common, x: [null], y: [null], mode: "markers", name: plain(method.title),
      marker: { symbol: method.symbol, color: method.colour, size: 10 } });
    const many = mine.length > 16;
    traces.push({ ...common, showlegend: false, x: mine.map((r) => r.scores[x][0]), y: mine.map((r) => r.scores[y][0]),
      customdata: mine.map((r) => data.rows.indexOf(r)), mode: many ? "markers" : "markers+text",
      text: mine.map((r) => plain(r.label)), textposition: "top right", textfont: { size: 10.5, color: "#667078" },
      error_x: { ...bars(mine, x), color: method.colour + "55" }, error_y: { ...bars(mine, y), color: method.colour + "55" },
      marker: { symbol: method.symbol, opacity: 1, size: mine.map((r) => (r === chosen ? 17 : 10)),
        color: mine.map((r) => (front.includes(r) ? method.colour : "#ffffff")),
        line: { color: mine.map((r) => (r === chosen ? "#1d2125" : method.colour)), width: mine.map((r) => (r === chosen ? 2.5 : 1.5)) } },
      hovertext: mine.map((r) => `<b>${plain(name(r))}</b><br>${plain(measureOf[x].title)} ${number(r.scores[x][0])}<br>${plain(measureOf[y].title)} ${number(r.scores[y][0])}`),
      hoverinfo: "text" });
  });
  const axis = (m) => ({ title: { text: plain(measureOf[m].title) + (measureOf[m].higher ? "  →" : "  (lower is better)"), font: { size: 14 } },
    gridcolor: "#eceff1", zeroline: false, linecolor: "#9aa3a9", ticks: "outside", tickcolor: "#9aa3a9" });
  const layout = { margin: { l: 64, r: 14, t: 14, b: 52 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, color: "#1d2125" }, xaxis: axis(x), yaxis: axis(y),
    legend: { bgcolor: "#ffffffcc", orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, uirevision: [byId("scope").value, x, y].join() };
  Plotly.react("plot", traces, layout, { responsive: true, displayModeBar: false });
}

function table() {
  const rows = visible();
  const shown = data.measures.filter((m) => rows.some((row) => row.scores[m.name]));
  if (order) {
    const value = (row) => (row.scores[order.name] ? row.scores[order.name][0] : -Infinity);
    rows.sort((a, b) => (order.up ? 1 : -1) * (value(a) - value(b)));
  }
  const best = Object.fromEntries(shown.map((m) => {
    const means = rows.filter((row) => row.scores[m.name]).map((row) => Number(number(row.scores[m.name][0])));
    return [m.name, means.length < 2 ? null : (m.higher ? Math.max : Math.min)(...means)];
  }));
  const head = element("tr", {}, element("th", {}, "method"), element("th", { class: "left" }, "setting"), element("th", {}, "pictures"));
  for (const m of shown) {
    const cell = element("th", { title: m.about, onclick: () => {
      order = { name: m.name, up: order && order.name === m.name ? !order.up : !m.higher };
      table();
    } }, m.title + (m.higher ? "" : " (lower is better)"));
    if (order && order.name === m.name) cell.setAttribute("aria-sort", order.up ? "ascending" : "descending");
    head.append(cell);
  }
  const body = element("tbody");
  for (const row of rows) {
    const method = data.methods[row.method];
    const line = element("tr", { tabindex: 0, onclick: () => choose(row),
      onkeydown: (event) => { if (event.key === "Enter") choose(row); } },
      element("td", {}, element("span", { class: "dot", style: `background:${method.colour}` }), method.title),
      element("td", { class: "left" }, row.label || "–"), element("td", {}, String(row.images)));
    for (const m of shown) {
      const score = row.scores[m.name];
      const text = number(score && score[0]);
      const cell = element("td", {}, score && Number(text) === best[m.name] ? element("b", {}, text) : text);
      if (score && score[1] !== null) {
        cell.append(" ", element("i", {}, "±" + ((score[2] - score[1]) / 2).toFixed(3)));
        cell.title = `[${number(score[1])}, ${number(score[2])}]`;
      }
      line.append(cell);
    }
    if (row === chosen) line.className = "chosen";
    body.append(line);
  }
  byId("scores").replaceChildren(element("thead", {}, head), body);
}

function cells(sheet, prompt) {
  const scale = Math.max(1, CELL / sheet.width);
  const [width, height] = [sheet.width * scale, sheet.height * scale];
  return prompt.cells.map(([index, seed, ...scores]) => {
    const [column, row] = [index % sheet.columns, Math.floor(index / sheet.columns)];
    const said = sheet.measures.map((m, k) => (scores[k] === null ? null : `${measureOf[m].title} ${number(scores[k])}`));
    const title = [seed === null ? null : `seed ${seed}`, ...said].filter((part) => part !== null).join("\n");
    return element("div", { class: sheet.width <= 64 ? "cell small" : "cell", title, style:
      `width:${width}px;height:${height}px;background-image:url("${sheet.source}");` +
      `background-size:${width * sheet.columns}px ${height * sheet.rows}px;background-position:${-column * width}px ${-row * height}px` });
  });
}

function choose(row) {
  chosen = row;
  byId("chosen").replaceChildren(element("span", { class: "dot", style: `background:${data.methods[row.method].colour}` }), name(row));
  const blocks = row.sheets.map((k) => {
    const sheet = data.sheets[k];
    const pictures = sheet.concept.split(" + ").flatMap((c) => (data.references[c] || []).slice(0, 2));
    const heading = element("h3", { class: "concept" }, ...pictures.map((source) => element("img", { src: source, alt: "reference" })),
      element("span", {}, sheet.concept, " ", element("small", {}, sheet.said)));
    return element("div", {}, heading, ...sheet.prompts.map((prompt) =>
      element("div", { class: "prompt" }, element("span", {}, data.prompts[prompt.prompt]), element("div", { class: "cells" }, ...cells(sheet, prompt)))));
  });
  byId("grids").replaceChildren(...blocks);
  byId("grids").scrollTop = 0;
  draw();
  table();
}

function volumes() {
  const heads = data.volumes.map((v) => `${measureOf[v.x].title} × ${measureOf[v.y].title}, above (${v.reference.join(", ")})`);
  const body = data.methods.map((method) => {
    const line = element("tr", {}, element("td", {}, element("span", { class: "dot", style: `background:${method.colour}` }), method.title));
    for (const volume of data.volumes) {
      const found = volume.methods[method.name];
      line.append(element("td", {}, !found ? "–" : found[1] === null ? number(found[0])
        : `${number(found[0])}  [${number(found[1])}, ${number(found[2])}]`));
    }
    return line;
  });
  byId("volumes").replaceChildren(element("thead", {}, element("tr", {}, element("th", {}, "method"), ...heads.map((h) => element("th", {}, h)))),
    element("tbody", {}, ...body));
}

function begin() {
  byId("about").textContent = data.about;
  byId("made").textContent = data.made;
  for (const [value, title] of data.scopes) byId("scope").append(element("option", { value }, title));
  for (const id of ["x", "y"]) {
    for (const m of data.measures) byId(id).append(element("option", { value: m.name }, m.title));
    byId(id).value = data[id];
    byId(id).addEventListener("change", draw);
  }
  byId("scope").addEventListener("change", () => {
    const scope = byId("scope").value;
    const same = chosen && data.rows.find((r) => r.scope === scope && r.method === chosen.method && r.key === chosen.key);
    if (same) choose(same);
    else { draw(); table(); }
  });
  for (const m of data.measures) byId("measures").append(element("dt", {}, m.title), element("dd", {}, m.about + (m.higher ? "." : "; lower is better.")));
  volumes();
  const harmonic = (row) => (row.scores.harmonic ? row.scores.harmonic[0] : -1);
  choose(visible().reduce((best, row) => (harmonic(row) > harmonic(best) ? row : best)));
  byId("plot").on("plotly_click", (event) => {
    const index = event.points[0].customdata;
    if (index !== undefined) choose(data.rows[index]);
  });
}

begin();
