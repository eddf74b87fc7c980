"use strict";
// Launches in their order, one lane for each way to know how long they take.
(function () {
  const page = window.capacitor;
  const { el, svg, charts } = page;

  // lanes: [{name, ops, us}], microseconds of each launch.
  charts.timeline = (lanes, label) => {
    const totals = lanes.map((lane) => lane.us.reduce((a, b) => a + b, 0));
    const longest = Math.max(...totals);
    const ops = [...new Set(lanes.flatMap((lane) => lane.ops))];
    const height = 44 + 54 * lanes.length;
    const frame = charts.frame({ x: [0, longest], y: [0, 1], yTicks: [], xLabel: "microseconds", yLabel: "", label, height });
    lanes.forEach((lane, i) => {
      const top = 28 + i * 54;
      let at = 0;
      frame.root.append(svg("text", { x: 62, y: top - 4, text: `${lane.name}: ${page.number(totals[i] / 1000, 3)} ms` }));
      lane.us.forEach((us, n) => {
        const left = frame.x(at);
        const width = Math.max(0.6, frame.x(at + us) - left - 0.4);
        const words = `${n + 1}. ${lane.ops[n]}: ${page.number(us, 1)} us`;
        frame.root.append(svg("rect", { class: `s${ops.indexOf(lane.ops[n]) % 8}`, stroke: "none", x: left, y: top, width, height: 24 }, svg("title", { text: words })));
        at += us;
      });
    });
    return el("div", { class: "chart" }, charts.legend(ops), frame.root);
  };
})();
