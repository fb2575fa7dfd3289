// Draws the charts where they come into view, in the colours of the page, and switches the large one.
const charts = (() => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touched = matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();
  let style = getComputedStyle(root);

  function coloured(value) {
    if (typeof value === "string") return value.replace(/^var\((--[\w-]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each)]));
  }

  function axis(own, large, log) {
    const found = {gridcolor: "var(--line)", zerolinecolor: "var(--muted)", linecolor: "var(--muted)", automargin: true,
      fixedrange: touched && !large, ...own};
    found.title = {...own.title, standoff: large ? 12 : 6, font: {size: large ? 13 : 11}};
    if (!large) found.nticks = 5;
    if (log) { found.type = "log"; delete found.range; delete found.dtick; delete found.tickformat; }
    return found;
  }

  function draw(place) {
    const large = place.classList.contains("large"), chart = figures[place.dataset.chart];
    const layout = {...chart.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {family: getComputedStyle(document.body).fontFamily, size: large ? 13 : 11, color: "var(--ink)"},
      margin: large ? {l: 20, r: 12, t: 36, b: 20} : {l: 16, r: 6, t: 6, b: 16},
      hoverlabel: {bgcolor: "var(--card)", bordercolor: "var(--line)", font: {color: "var(--ink)"}},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: "var(--muted)", activecolor: "var(--ink)"},
      legend: {orientation: "h", x: 0, y: 1, yanchor: "bottom"}, dragmode: touched ? false : "zoom",
      xaxis: axis(chart.layout.xaxis, large, place.dataset.logX), yaxis: axis(chart.layout.yaxis, large, place.dataset.logY)};
    const config = {responsive: true, displaylogo: false, displayModeBar: large && !touched ? "hover" : false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], toImageButtonOptions: {scale: 2, filename: "liveselect"}};
    drawn.add(place);
    return Plotly.react(place, coloured(chart.data), coloured(layout), config);
  }

  function redraw() {
    style = getComputedStyle(root);
    drawn.forEach(draw);
  }

  const places = [...document.querySelectorAll(".plot")].filter(place => !place.parentElement.hidden);
  const seen = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) if (isIntersecting && !drawn.has(target)) {
      // those beside it too: on a phone they are swiped into view
      const beside = target.closest(".charts")?.querySelectorAll(".plot") ?? [target];
      beside.forEach(each => { seen.unobserve(each); draw(each); });
    }
  }, {rootMargin: "400px"});
  places.forEach(place => seen.observe(place));

  // The switches of the chart of the losses: each choice is a figure of its own.
  for (const tools of document.querySelectorAll(".chart-tools")) {
    const place = tools.parentElement.querySelector(".plot.large"), first = Number(place.dataset.chart);
    const choices = tools.dataset.choices.split("\n"), metrics = tools.querySelector("select");
    const labels = [place, ...tools.parentElement.querySelectorAll("[hidden] > .plot")].map(each => each.getAttribute("aria-label"));
    tools.addEventListener("change", () => {
      const metric = metrics ? metrics.value : choices[0].split("\t")[0];
      const wanted = choices.indexOf(`${metric}\t${tools.querySelector("[name=axis]:checked").value}`);
      if (wanted < 0) return;
      place.dataset.chart = first + wanted;
      place.setAttribute("aria-label", labels[wanted]);
      place.dataset.logX = tools.querySelector("[name=log-x]").checked || "";
      place.dataset.logY = tools.querySelector("[name=log-y]").checked || "";
      draw(place);
    });
  }

  // Light or dark, as the system has it until the button is pressed.
  const button = document.querySelector(".theme");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  const named = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  named();
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; named(); redraw(); });
  dark.addEventListener("change", () => { named(); redraw(); });

  // Paper is light and narrow, and has all charts.
  let before;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    root.classList.add("printed");
    style = getComputedStyle(root);
    places.forEach(place => { draw(place); Plotly.relayout(place, {width: place.clientWidth, height: place.clientHeight}); });
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printed");
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    redraw();
  });
})();
