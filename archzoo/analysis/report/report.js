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
          const missing = numeric ? Number.isNaN(key) : cell.classList.contains("missing");
          return { row, key, missing };
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

  // ---- Plots, in the colours of the page and as wide as it is.
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll("[data-chart]")];

  // plotly's usual buttons include one that uploads the plot to a server of theirs.
  const settings = {
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { scale: 2 },
  };

  // What depends on the colours and the width, by plotly's dotted names.
  function look(chart) {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const width = chart.clientWidth;
    const narrow = width < 640;
    const names = figures[chart.dataset.chart].data.filter((trace) => trace.showlegend !== false);
    const lines = narrow ? Math.min(names.length, 6) : 0; // of the legend below the plot
    const found = {
      width,
      height: 420 + 20 * lines,
      "font.color": colour("--text"),
      "font.family": getComputedStyle(document.body).fontFamily,
      "font.size": 13,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": colour("--raised"),
      "hoverlabel.bordercolor": colour("--line"),
      "hoverlabel.font.color": colour("--text"),
      "hoverlabel.namelength": narrow ? 15 : 40,
      "modebar.color": colour("--weak"),
      "modebar.activecolor": colour("--accent"),
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "legend.orientation": narrow ? "h" : "v",
      "legend.yref": narrow ? "container" : "paper",
      "legend.y": narrow ? 0 : 1,
      "legend.yanchor": narrow ? "bottom" : "top",
      "legend.x": narrow ? 0 : 1.02,
      "legend.xanchor": "left",
      "legend.maxheight": narrow ? 130 : 1, // pixels, or the plot's height; what is over scrolls
      "margin.l": narrow ? 45 : 60,
      "margin.r": narrow ? 10 : 20,
      "margin.t": 30,
      "margin.b": 60,
      dragmode: narrow ? false : "zoom", // there a finger scrolls the page
    };
    for (const axis of ["xaxis", "yaxis"]) {
      found[`${axis}.gridcolor`] = colour("--line");
      found[`${axis}.linecolor`] = colour("--weak");
    }
    return found;
  }

  function first(chart) {
    const { data, layout } = figures[chart.dataset.chart];
    for (const [name, value] of Object.entries(look(chart))) {
      const path = name.split(".");
      const last = path.pop();
      path.reduce((inner, key) => (inner[key] ??= {}), layout)[last] = value;
    }
    Plotly.newPlot(chart, data, layout, settings);
  }

  const again = () => charts.forEach((chart) => Plotly.relayout(chart, look(chart)));

  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = isDark() ? "light" : "dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    name();
    again();
  });
  system.addEventListener("change", () => { name(); again(); });
  let waiting;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar came or went
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(again, 100);
  });
  name();
  charts.forEach(first);
  root.dataset.drawn = charts.length;
})();
