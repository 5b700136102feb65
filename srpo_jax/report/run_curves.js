// The curves of a run's page: one uPlot chart for each entry of data.charts.
"use strict";

// A new element with a class and contents; text never becomes markup.
function make(tag, name, ...contents) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...contents);
  return node;
}

function readData(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function curves(data) {
  const COLOURS = ["#2f74d8", "#d9691e", "#1c9c6f", "#a552c7", "#cc4058", "#8f7d18", "#2899ab",
    "#87694f", "#6c7edb", "#d654a5"];
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [14, 4], [5, 2], [1, 5], [8, 2, 2, 2, 2, 2]];
  const HEIGHT = 220;
  const place = document.getElementById("curves");
  const slider = document.getElementById("smoothing");
  const many = data.runs.length > 1;
  const drawn = [];

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function short(value) {
    if (value == null) return "";
    const small = value && Math.abs(value) < 1e-3;
    return small ? value.toExponential(1) : String(Number(value.toPrecision(4)));
  }

  // Exponential mean that starts without a bias to 0; a gap stays a gap.
  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value == null) return value;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  // Each series twice: as it is, faint, and smoothed.
  function columns(series) {
    const weight = Number(slider.value);
    const tables = series.map((one) => {
      const smooth = weight ? smoothed(one.values, weight) : one.values;
      return [data.axes[one.axis], weight ? one.values : one.values.map(() => null), smooth];
    });
    return uPlot.join(tables);
  }

  // What all names begin with, up to a slash: the legend does without it.
  function shared(names) {
    const first = names[0].slice(0, names[0].lastIndexOf("/") + 1);
    return names.length > 1 && names.every((name) => name.startsWith(first)) ? first : "";
  }

  function draw(chart, place) {
    const names = [...new Set(chart.series.map((one) => one.name))];
    const prefix = shared(names);
    const lines = chart.series.flatMap((one) => {
      const name = names.indexOf(one.name);
      // A run has one colour on the whole page; without others, colours tell metrics apart.
      const stroke = COLOURS[(many ? one.run : name) % COLOURS.length];
      const dash = many ? DASHES[name % DASHES.length] : [];
      const own = one.name.slice(prefix.length);
      const label = many ? `${own} · ${data.runs[one.run]}` : own;
      const value = (plot, y, at, step) =>
        short(step == null ? plot.data[at].findLast((last) => last != null) : y);
      return [
        { label, stroke, dash, alpha: 0.25, width: 1, class: "raw", points: { show: false } },
        { label, stroke, dash, value, width: 1.5, spanGaps: false },
      ];
    });
    const title = make("h3", "", chart.title);
    const frame = make("figure", "chart", title);
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", `${chart.title}: ${names.join(", ")}`);
    place.append(frame);
    const axis = {
      stroke: () => style("--soft"),
      grid: { stroke: () => style("--line"), width: 1 },
      ticks: { stroke: () => style("--line"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
    const plot = new uPlot({
      width: frame.clientWidth,
      height: HEIGHT,
      scales: { x: { time: false } },
      cursor: { sync: { key: "step" }, y: false },
      axes: [{ ...axis, size: 34 }, { ...axis, size: 58, values: (_, at) => at.map(short) }],
      legend: { markers: { dash: (_, at) => (lines[at - 1]?.dash.length ? "dashed" : "solid") } },
      series: [{ label: "step", value: (plot, x) => short(x ?? plot.data[0].at(-1)) }, ...lines],
    }, columns(chart.series), frame);
    frame.addEventListener("keydown", (event) => move(event, plot));
    new ResizeObserver(() => {
      if (frame.clientWidth && frame.clientWidth !== plot.width)
        plot.setSize({ width: frame.clientWidth, height: HEIGHT });
    }).observe(frame);
    drawn.push({ chart, plot, frame, place });
  }

  // Arrows, Home and End move the cursor from step to step.
  function move(event, plot) {
    const last = plot.data[0].length - 1, now = plot.cursor.idx ?? last;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const step = plot.data[0][Math.min(Math.max(to, 0), last)];
    plot.setCursor({ left: plot.valToPos(step, "x"), top: HEIGHT / 3 }, true, true);
  }

  const top = document.getElementById("key-curves");
  for (const title of data.key) draw(data.charts.find((chart) => chart.title === title), top);
  let section = null;
  for (const chart of data.charts) {
    if (chart.section !== section) {
      section = chart.section;
      place.append(make("h2", "", section));
    }
    draw(chart, place);
  }

  slider.form.addEventListener("submit", (event) => event.preventDefault());
  slider.addEventListener("input", () => {
    slider.nextElementSibling.textContent = slider.value;
    for (const { chart, plot } of drawn) {
      plot.setData(columns(chart.series), false);
      plot.redraw();
    }
  });
  for (const box of document.querySelectorAll("input[name=run]"))
    box.addEventListener("change", () => {
      for (const { chart, plot } of drawn)
        chart.series.forEach((one, at) => {
          if (one.run !== Number(box.value)) return;
          for (const line of [2 * at + 1, 2 * at + 2]) plot.setSeries(line, { show: box.checked });
        });
    });
  document.getElementById("find").addEventListener("input", (event) => {
    const text = event.target.value.toLowerCase();
    for (const { chart, frame } of drawn.filter((one) => one.place === place)) {
      const words = [chart.section, chart.title, ...chart.series.map((one) => one.name)];
      frame.hidden = !words.join(" ").toLowerCase().includes(text);
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const { plot } of drawn) plot.redraw();
  });
}
