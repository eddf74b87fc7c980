"use strict";
// The page of the benchmarks: what was measured, and where nothing was, what is modelled.
(function () {
  const page = window.capacitor;
  const { el, byId, charts } = page;
  const data = window.capacitorPage;
  const nothing = () => el("p", { text: "Not measured yet." });

  // launches

  const unique = (key) => [...new Set(data.timelines.map((t) => t[key]))];
  for (const [id, key] of [["call", "call"], ["gpu", "gpu"]]) {
    byId(id).append(...unique(key).map((text) => el("option", { value: text, text })));
    byId(id).addEventListener("change", drawTimeline);
  }
  function drawTimeline() {
    const found = data.timelines.find((t) => t.call === byId("call").value && t.gpu === byId("gpu").value);
    const label = `Launches of ${found.call} on ${found.gpu} in order, ${found.lanes[0].ops.length} of them`;
    byId("timeline").replaceChildren(charts.timeline(found.lanes, label), ...modelledRoofline(found));
  }

  // Of the launches above, by their modelled times; those of one op lie on each other.
  function modelledRoofline({ call, gpu, lanes, work, ceilings }) {
    const lane = lanes.find(({ name }) => name === "from machine code (modelled)");
    if (!lane) return [];
    const points = lane.ops.map((op, i) => {
      const [flops, bytes] = work[i];
      return { op, x: flops / bytes, y: flops / lane.us[i] / 1e6, words: `${page.number(lane.us[i], 1)} us` };
    });
    const shown = points.filter((p) => p.x > 0).filter((p, i, all) => all.findIndex((q) => q.op === p.op && q.x === p.x) === i);
    const label = `Modelled roofline of ${call} on ${gpu}: ${shown.length} different launches`;
    return [el("h3", { text: "Roofline of these launches (modelled)" }), roofline(shown, ...ceilings, label)];
  }

  // points: [{op, x, y, words}], FLOP per byte and TFLOP/s
  function roofline(points, tflops, gbps, label) {
    const edge = (1000 * tflops) / gbps;
    const [low, high] = charts.extent([...points.map((p) => p.x), edge / 8, edge * 2]);
    const rule = [low, edge, high].map((x) => [x, Math.min(tflops, (x * gbps) / 1000)]);
    const series = [...new Set(points.map((p) => p.op))].map((op) => ({
      name: op,
      dots: true,
      points: points.filter((p) => p.op === op).map((p) => [p.x, p.y, `${op} ${p.words}, ${page.number(p.y, 1)} TFLOP/s`]),
    }));
    return charts.curves(series, { rule, xLabel: "FLOP per byte", yLabel: `TFLOP/s, of ${tflops} at most`, label, logX: true, logY: true, height: 420 });
  }
  for (const { gpu, tflops, gbps, points } of data.rooflines) {
    const shown = points.map((p) => ({ ...p, words: `at ${p.images}, ${page.number(p.percent, 0)} % of the floor` }));
    byId("rooflines").append(el("h3", { text: `${gpu} (measured)` }), roofline(shown, tflops, gbps, `Roofline of ${gpu}: ${points.length} launches`));
  }
  drawTimeline();
  if (!data.rooflines.length) byId("rooflines").append(nothing());

  // throughput

  for (const { gpu, direction, series } of data.throughput) {
    const label = `Throughput of ${direction} on ${gpu} over the batch, ${series.length} curves`;
    byId("curves").append(
      el("h3", { text: `${direction}, ${gpu} (measured)` }),
      charts.curves(series, { xLabel: "batch", yLabel: "megapixels/s", label, logX: true, logY: true }),
    );
  }
  if (!data.throughput.length) byId("curves").append(nothing());

  // history

  for (const { gpu, commits, series } of data.history) {
    const label = `Milliseconds of the published rows on ${gpu} over ${commits.length} commits`;
    const xTicks = commits.map((_, i) => i);
    byId("commits").append(
      el("h3", { text: `${gpu} (measured)` }),
      charts.curves(series, { xLabel: "commit", yLabel: "ms", label, logY: true, xTicks, xNames: commits }),
    );
  }
  if (!data.history.length) byId("commits").append(nothing());

  const tabs = page.tabs((id) => {
    try {
      history.replaceState(null, "", `#${id}`);
    } catch {
      // the address then stays as it is
    }
  });
  if (tabs.ids.includes(location.hash.slice(1))) tabs.select(location.hash.slice(1));
})();
