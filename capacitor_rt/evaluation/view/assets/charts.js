"use strict";
// Charts as SVG: histogram, points, curves, bars over channels. Each has a label that says in words what it shows.
(function () {
  const page = window.capacitor;
  const { el, svg } = page;
  // a phone's chart has fewer marks, and letters of the same size
  const WIDTH = window.innerWidth > 760 ? 900 : 440;
  const HEIGHT = 300;
  const BOX = { left: 60, right: 14, top: 12, bottom: 40 };
  const charts = (page.charts = {});

  // Round values that divide [low, high] into about `count` steps.
  charts.ticks = (low, high, count) => {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(n * step);
    return found.map((value) => Number(value.toPrecision(12)));
  };

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const n of [1, 2, 5]) found.push(n * 10 ** power);
    }
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    return inside.length > WIDTH / 75 ? inside.filter((value) => /^1(e|0*$)|^0\.0*1$/.test(String(value))) : inside;
  }

  // A frame with axes; `x(value)` and `y(value)` are places in it.
  charts.frame = ({ x, y, xLabel, yLabel, label, height = HEIGHT, xTicks, xNames, yTicks, logX = false, logY = false }) => {
    const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label });
    const scale = ([low, high], from, to, log) => {
      const f = log ? Math.log : (v) => v;
      const span = f(high) - f(low) || 1;
      return (value) => from + ((f(value) - f(low)) / span) * (to - from);
    };
    const place = {
      x: scale(x, BOX.left, WIDTH - BOX.right, logX),
      y: scale(y, height - BOX.bottom, BOX.top, logY),
    };
    const bottom = height - BOX.bottom;
    const short = (value) => String(Number(value.toPrecision(4)));
    for (const value of xTicks || (logX ? logTicks(...x) : charts.ticks(...x, WIDTH / 110))) {
      const at = place.x(value);
      root.append(svg("path", { class: "axis", d: `M${at} ${bottom}v5` }));
      root.append(svg("text", { x: at, y: bottom + 18, "text-anchor": "middle", text: xNames ? xNames[value] : short(value) }));
    }
    for (const value of yTicks || (logY ? logTicks(...y) : charts.ticks(...y, 5))) {
      const at = place.y(value);
      root.append(svg("path", { class: "axis", d: `M${BOX.left} ${at}H${WIDTH - BOX.right}` }));
      root.append(svg("text", { x: BOX.left - 8, y: at + 4, "text-anchor": "end", text: short(value) }));
    }
    root.append(svg("path", { class: "axis", d: `M${BOX.left} ${BOX.top}V${bottom}H${WIDTH - BOX.right}` }));
    const middle = (BOX.left + WIDTH - BOX.right) / 2;
    root.append(svg("text", { x: middle, y: height - 4, "text-anchor": "middle", text: xLabel }));
    root.append(svg("text", { x: 0, y: 0, "text-anchor": "middle", text: yLabel, transform: `translate(13 ${(BOX.top + bottom) / 2}) rotate(-90)` }));
    return { root, ...place, bottom };
  };

  charts.extent = (values) => {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (!Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  };

  charts.legend = (names) =>
    el("p", { class: "legend" }, ...names.map((name, i) => el("span", { class: `s${i % 8}`, text: name })));

  // Counts of values in bins of one width for all series: [{name, values}].
  charts.histogram = (series, xLabel) => {
    const every = series.flatMap((s) => s.values).filter(Number.isFinite);
    const [low, high] = charts.extent(every);
    const bins = Math.max(5, Math.min(40, Math.round(Math.sqrt(every.length / series.length) * 2)));
    const width = (high - low) / bins;
    const counts = series.map(({ values }) => {
      const found = new Array(bins).fill(0);
      for (const value of values) {
        if (Number.isFinite(value)) found[Math.min(bins - 1, Math.floor((value - low) / width))] += 1;
      }
      return found;
    });
    const most = Math.max(1, ...counts.flat());
    const label = `Histogram of ${xLabel}: ${series.map((s) => s.name).join(", ")}, from ${page.number(low, 3)} to ${page.number(high, 3)}`;
    const frame = charts.frame({ x: [low, high], y: [0, most], xLabel, yLabel: "images", label, yTicks: charts.ticks(0, most, 4).filter(Number.isInteger) });
    counts.forEach((found, i) => {
      let path = `M${frame.x(low)} ${frame.bottom}`;
      found.forEach((count, bin) => {
        path += `V${frame.y(count)}H${frame.x(low + (bin + 1) * width)}`;
      });
      path += `V${frame.bottom}`;
      frame.root.append(svg("path", { class: `area s${i % 8}`, d: `${path}Z` }), svg("path", { class: `curve s${i % 8}`, d: path }));
    });
    return el("div", null, ...(series.length > 1 ? [charts.legend(series.map((s) => s.name))] : []), frame.root);
  };

  // Points that open something. points: [{x, y, name, id}]; the arrow keys go along x, Enter opens.
  charts.scatter = (points, { xLabel, yLabel, diagonal, open }) => {
    const shown = points.filter((p) => Number.isFinite(p.x) && Number.isFinite(p.y)).sort((a, b) => a.x - b.x);
    let x = charts.extent(shown.map((p) => p.x));
    let y = charts.extent(shown.map((p) => p.y));
    if (diagonal) x = y = [Math.min(x[0], y[0]), Math.max(x[1], y[1])];
    const label = `${yLabel} over ${xLabel}, ${shown.length} images`;
    const frame = charts.frame({ x, y, xLabel, yLabel, label, height: 420 });
    if (diagonal) frame.root.append(svg("path", { class: "rule", d: `M${frame.x(x[0])} ${frame.y(x[0])}L${frame.x(x[1])} ${frame.y(x[1])}` }));
    const words = el("p", { class: "quiet", role: "status" });
    const dots = shown.map((point, i) =>
      svg("circle", { class: "point s0", cx: frame.x(point.x), cy: frame.y(point.y), r: shown.length > 400 ? 3 : 5, "data-at": i }),
    );
    frame.root.append(...dots);
    frame.root.setAttribute("tabindex", "0");
    let here = -1;
    const go = (to) => {
      if (here >= 0) dots[here].classList.remove("here");
      here = to;
      if (here < 0) return;
      dots[here].classList.add("here");
      const { name, x: across, y: up } = shown[here];
      words.textContent = `${name}: ${page.number(across, 3)} and ${page.number(up, 3)}`;
    };
    const at = (event) => (event.target.dataset && event.target.dataset.at !== undefined ? Number(event.target.dataset.at) : -1);
    frame.root.addEventListener("pointerover", (event) => at(event) >= 0 && go(at(event)));
    frame.root.addEventListener("click", (event) => at(event) >= 0 && open(shown[at(event)].id));
    frame.root.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && shown.length) go((here + step + shown.length) % shown.length);
      else if (event.key === "Enter" && here >= 0) open(shown[here].id);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    return el("div", null, frame.root, words);
  };

  // A bar per channel for each series, from `base`; `rule` is where it should be.
  charts.bars = (series, { yLabel, base, rule, label, range }) => {
    const [low, high] = range || charts.extent([...series.flatMap((s) => s.values), base, rule]);
    const count = series[0].values.length;
    const frame = charts.frame({ x: [0, count], y: [low, high], xLabel: "channel", yLabel, label, height: 220 });
    series.forEach(({ values }, i) => {
      const step = frame.x(1) - frame.x(0);
      const width = Math.max(1, (step / series.length) * 0.8);
      let path = "";
      values.forEach((value, c) => {
        if (!Number.isFinite(value)) return;
        const left = frame.x(c) + step * 0.1 + i * width;
        path += `M${left} ${frame.y(base)}V${frame.y(value)}h${width}V${frame.y(base)}Z`;
      });
      frame.root.append(svg("path", { class: `s${i % 8}`, stroke: "none", d: path }));
    });
    if (rule !== null) frame.root.append(svg("path", { class: "rule", d: `M${frame.x(0)} ${frame.y(rule)}H${frame.x(count)}` }));
    return el("div", { class: "chart" }, ...(series.length > 1 ? [charts.legend(series.map((s) => s.name))] : []), frame.root);
  };

  // Curves with points, or with `dots` points alone: [{name, points: [[x, y, words], ...], dots}]; `rule` is a limit.
  charts.curves = (series, { rule = [], ...options }) => {
    const every = [...rule, ...series.flatMap((s) => s.points)];
    const frame = charts.frame({ x: charts.extent(every.map((p) => p[0])), y: charts.extent(every.map((p) => p[1])), ...options });
    if (rule.length) frame.root.append(svg("path", { class: "rule", d: `M${rule.map(([a, b]) => `${frame.x(a)} ${frame.y(b)}`).join("L")}` }));
    series.forEach(({ points, dots }, i) => {
      const at = points.map(([a, b]) => `${frame.x(a)} ${frame.y(b)}`);
      if (!dots) frame.root.append(svg("path", { class: `curve s${i % 8}`, d: `M${at.join("L")}` }));
      for (const [a, b, title] of points) {
        frame.root.append(svg("circle", { class: `s${i % 8}`, cx: frame.x(a), cy: frame.y(b), r: 3.5 }, svg("title", { text: title || `${a}, ${b}` })));
      }
    });
    return el("div", { class: "chart" }, charts.legend(series.map((s) => s.name)), frame.root);
  };
})();
