"use strict";
// Sliders of the page and its colours. Everything comes from the element #data; nothing is fetched.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement, $ = (id) => document.getElementById(id);
  const whole = (n) => Math.round(n).toLocaleString("en-US");
  const tokens = (v) => !isFinite(v) ? "–" : v >= 0.05 && v < 9.95 ? v.toFixed(1) : whole(v);
  root.classList.add("script");

  // ---- light and dark ----
  const button = $("theme"), system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  function nameButton() {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  }
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameButton(); });
  system.addEventListener("change", nameButton);
  nameButton();

  // Index of the last of ascending numbers that is not above x; -1 before the first.
  function before(numbers, x) {
    let low = 0, high = numbers.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[middle] <= x) low = middle + 1; else high = middle;
    }
    return low - 1;
  }

  // ---- spans: float32, little-endian, [update, layer, head] ----
  const spans = data.spans;
  let values = null;
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  if (spans) {
    const bytes = bytesOf(spans.data), view = new DataView(bytes.buffer);
    values = Float32Array.from({length: bytes.length / 4}, (_, i) => view.getFloat32(4 * i, true));
  }
  const spanAt = (column, layer, head) => values[(column * spans.layers + layer) * spans.heads + head];
  const level = (v) => !(v >= 1) ? 0 :
    Math.min(spans.levels - 1, 1 + Math.floor((spans.levels - 1) * Math.log(v) / Math.log(spans.top)));
  const columnAt = (update) => Math.max(0, before(spans.updates, update));

  // A map of heads: cells of the same step are one path. edges: where columns begin and end; stepAt(head, column).
  function drawCells(svg, heads, edges, stepAt) {
    const paths = {}, columns = edges.length - 1;
    for (let head = 0; head < heads; head++) {
      for (let from = 0; from < columns;) {
        const step = stepAt(head, from);
        let to = from + 1;
        while (to < columns && stepAt(head, to) === step) to++;
        (paths[step] = paths[step] || []).push(`M${edges[from]} ${head}H${edges[to]}V${head + 1}H${edges[from]}z`);
        from = to;
      }
    }
    svg.setAttribute("viewBox", `0 0 ${edges[columns]} ${heads}`);
    svg.replaceChildren(...Object.entries(paths).map(([step, parts]) => {
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("class", `l${step}`);
      path.setAttribute("d", parts.join(""));
      return path;
    }));
  }

  // A column of spans reaches from the row before to its own.
  function drawMap(layer) {
    drawCells($("map-cells"), spans.heads, [0, ...spans.updates], (head, column) => level(spanAt(column, layer, head)));
    describeMap(layer);
  }

  function describeMap(layer) {
    const column = columnAt(update()), row = Array.from({length: spans.heads}, (_, head) => spanAt(column, layer, head));
    const mean = row.reduce((a, b) => a + b, 0) / row.length;
    const words = `${layer}: mean ${tokens(mean)}, longest ${tokens(Math.max(...row))} tokens`;
    $("layer-now").textContent = words;
    $("layer").setAttribute("aria-valuetext", `layer ${words}`);
    $("map-title").textContent = `Spans of the heads of layer ${words} at update ${whole(spans.updates[column])}`;
  }

  function fillTable() {
    const column = columnAt(update());
    for (const [layer, row] of [...$("span-table").tBodies[0].rows].entries()) {
      const found = Array.from({length: spans.heads}, (_, head) => spanAt(column, layer, head));
      found.forEach((v, head) => { row.cells[head + 1].textContent = tokens(v); row.cells[head + 1].className = `l${level(v)}`; });
      row.cells[spans.heads + 1].textContent = tokens(found.reduce((a, b) => a + b, 0) / found.length);
      row.cells[spans.heads + 2].textContent = tokens(Math.max(...found));
    }
    document.querySelector("#spans .now").textContent = whole(spans.updates[column]);
  }

  // ---- the chosen update ----
  const slider = $("at-update");
  const update = () => data.updates[Number(slider.value)];

  function show() {
    const now = update(), atEnd = Number(slider.value) === data.updates.length - 1;
    $("update-now").textContent = whole(now);
    slider.setAttribute("aria-valuetext", `update ${whole(now)}`);
    for (const [key, chart] of Object.entries(data.charts)) {
      const figure = $(`chart-${key}`);
      chart.series.forEach((s, i) => {
        const at = before(s.x, now);
        figure.querySelector(`[data-series="${i}"]`).textContent = at < 0 ? "–" : s.text[at];
      });
      moveCursor(figure, now / chart.last, atEnd);
    }
    if (spans) {
      moveCursor($("map"), now / spans.last, atEnd);
      describeMap(Number($("layer").value));
      fillTable();
    }
  }

  function moveCursor(figure, place, hidden) {
    const cursor = figure.querySelector(".cursor");
    cursor.setAttribute("x1", `${100 * place}%`);
    cursor.setAttribute("x2", `${100 * place}%`);
    cursor.setAttribute("visibility", hidden ? "hidden" : "visible");
  }

  // A click on a chart chooses the update under it.
  function choose(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const last = event.currentTarget.closest("#map") ? spans.last : data.charts[event.currentTarget.closest("figure").dataset.chart].last;
    const x = (event.clientX - box.left) / box.width * last;
    slider.value = Math.max(0, before(data.updates, x));
    show();
  }

  // ---- attention: steps of the scales, [layer, head, bin] and [position, layer, mean and heads, token] ----
  function showAttention(file, number) {
    const part = (name) => $(`attention-${name}-${number}`), steps = bytesOf(file.map), bins = file.edges.length - 1;
    const drawLayer = () => {
      const layer = Number(part("layer").value);
      drawCells(part("cells"), file.heads, file.edges, (head, bin) => steps[(layer * file.heads + head) * bins + bin]);
      part("now").textContent = layer;
      part("title").textContent = `Mean weight by distance of the heads of layer ${layer}`;
    };
    const text = file.text && bytesOf(file.text);
    const drawText = () => {
      const k = Number(part("position").value), layer = Number(part("layer").value), head = Number(part("head").value);
      const at = file.positions[k], first = ((k * file.layers + layer) * (file.heads + 1) + head) * file.tokens;
      part("words").textContent = `Layer ${layer}, ${head ? `head ${head - 1}` : "mean of all heads"}, before token ${whole(at.at)} of ` +
        `the split, which is '${at.token.trim() || at.token}' and costs ${at.bits} bits. The last token is at distance 0.`;
      part("text").replaceChildren(...at.context.map((symbol, i) => {
        const mark = document.createElement("span");
        mark.className = `l${text[first + i]}`;
        mark.textContent = symbol;
        return mark;
      }));
    };
    const draw = () => { drawLayer(); if (text) drawText(); };
    part("layer").addEventListener("input", draw);
    if (text) ["position", "head"].forEach((name) => part(name).addEventListener("input", drawText));
    draw();
  }

  data.attention.forEach(showAttention);
  slider.addEventListener("input", show);
  document.querySelectorAll(".space:not(.still)").forEach((space) => space.addEventListener("click", choose));
  if (spans) {
    $("layer").addEventListener("input", () => drawMap(Number($("layer").value)));
    drawMap(0);
  }
  show();
})();
