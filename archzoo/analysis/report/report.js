"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  // ---- Tables: a click on a heading sorts, another one the other way round.
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    if (!body.rows.length || body.rows[0].classList.contains("empty")) continue;
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numeric = heading.classList.contains("number");
        const rows = [...body.rows].map((row) => {
          const cell = row.cells[column];
          const key = numeric ? parseFloat(cell.dataset.number) : cell.textContent;
          return { row, key, missing: cell.classList.contains("missing") };
        });
        rows.sort((a, b) => {
          if (a.missing || b.missing) return a.missing - b.missing; // last, whichever way
          const order = numeric
            ? (a.key > b.key) - (a.key < b.key)
            : a.key.localeCompare(b.key, undefined, { numeric: true });
          return down ? -order : order;
        });
        body.append(...rows.map((entry) => entry.row));
      });
    });
  }

  // ---- Plots, in the colours of the page.
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll("[data-chart]")];

  function layout(chart, figure) {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const lines = { gridcolor: colour("--line"), linecolor: colour("--weak") };
    const narrow = chart.clientWidth < 640;
    const below = { orientation: "h", x: 0, xanchor: "left", y: -0.25, yanchor: "top", maxheight: 0.3 };
    return {
      ...figure.layout,
      xaxis: { ...figure.layout.xaxis, ...lines },
      yaxis: { ...figure.layout.yaxis, ...lines },
      font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      legend: narrow ? below : { orientation: "v" },
      margin: { l: 60, r: narrow ? 10 : 20, t: 20, b: 60 },
      height: narrow ? 460 : 440,
      dragmode: narrow ? false : "zoom", // a finger scrolls the page
    };
  }

  function draw(first) {
    for (const chart of charts) {
      const figure = figures[chart.dataset.chart];
      const settings = { responsive: true, displaylogo: false, scrollZoom: false };
      if (first) Plotly.newPlot(chart, figure.data, layout(chart, figure), settings);
      else Plotly.relayout(chart, layout(chart, figure));
    }
  }

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = isDark() ? "light" : "dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
    draw(false);
  });
  system.addEventListener("change", () => { name(); draw(false); });
  name();
  draw(true);
  root.dataset.drawn = charts.length;
})();
