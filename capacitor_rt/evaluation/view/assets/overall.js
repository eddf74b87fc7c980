"use strict";
// The part of the page about all images: distributions, every image as a point, latents per channel.
(function () {
  const page = window.capacitor;
  const { el, byId, charts } = page;

  function choose(select, keys, initial) {
    select.append(...keys.map(({ key, label }) => el("option", { value: key, text: label })));
    if (keys.some(({ key }) => key === initial)) select.value = initial;
  }

  // Distribution of a measure for all models in one frame, or of a difference alone.
  function histogramOf(key, data, rows) {
    const measure = key.replace(/^delta.*/, "");
    const label = rows.keys.find((k) => k.key === key).label;
    if (!measure) return charts.histogram([{ name: label, values: rows.values[key] }], label);
    const series = data.models.map((model, m) => ({ name: model.name, values: rows.values[m ? `${key}${m + 1}` : key] }));
    return charts.histogram(series, { psnr: "PSNR, dB", ssim: "SSIM", lpips: "LPIPS" }[key]);
  }

  function drawFigures(data, rows, open) {
    const { keys, values } = rows;
    const histogram = byId("histogram-of");
    const measures = Object.keys(data.measures).map((key) => ({ key, label: { psnr: "PSNR", ssim: "SSIM", lpips: "LPIPS" }[key] }));
    choose(histogram, [...measures, ...keys.filter(({ key }) => key.startsWith("delta"))], "psnr");
    const redraw = () => byId("histogram").replaceChildren(histogramOf(histogram.value, data, rows));
    histogram.addEventListener("change", redraw);
    redraw();

    const [across, up] = [byId("scatter-x"), byId("scatter-y")];
    const two = "psnr2" in values;
    choose(across, keys, two ? "psnr2" : "bpp" in values ? "bpp" : "pixels");
    choose(up, keys, "psnr");
    const scatter = () => {
      const [x, y] = [across.value, up.value];
      const points = data.images.name.map((name, id) => ({ name, id, x: values[x][id], y: values[y][id] }));
      const label = (key) => keys.find((k) => k.key === key).label;
      // two models by one measure lie around the diagonal
      const diagonal = x !== y && x.replace(/\d+$/, "") === y.replace(/\d+$/, "");
      byId("scatter").replaceChildren(charts.scatter(points, { xLabel: label(x), yLabel: label(y), diagonal, open }));
    };
    across.addEventListener("change", scatter);
    up.addEventListener("change", scatter);
    scatter();
  }

  function drawLatents(data) {
    for (const { a, b, channels } of data.cosines) {
      const values = channels.map((v) => (v === null ? NaN : v));
      const [low, high] = charts.extent(values);
      const label = `Cosine per channel of the latents of ${a} and ${b}: ${page.number(low, 3)} to ${page.number(high, 3)}`;
      byId("cosines").append(charts.bars([{ name: `${a} and ${b}`, values }], { yLabel: "cosine", base: 0, rule: 1, label, range: [Math.min(0, low), 1] }));
    }
    const holder = byId("whitening");
    for (const { name, mean, std } of data.models) {
      const far = mean.filter((m, c) => Math.abs(m) > 1 || std[c] < 0.5 || std[c] > 2).length;
      const [lowMean, highMean] = charts.extent(mean);
      const [lowStd, highStd] = charts.extent(std);
      const words = `Means from ${page.number(lowMean, 2)} to ${page.number(highMean, 2)}, deviations from ${page.number(lowStd, 2)} to ${page.number(highStd, 2)}; ` +
        `${far} of ${mean.length} channels are off by more than one deviation or a factor of two.`;
      holder.append(
        el("h3", { text: name }),
        el("p", { text: words }),
        charts.bars([{ name: "mean", values: mean }], { yLabel: "mean", base: 0, rule: 0, label: `${name}: mean per channel. ${words}` }),
        charts.bars([{ name: "deviation", values: std }], { yLabel: "deviation", base: 0, rule: 1, label: `${name}: standard deviation per channel. ${words}`, range: [0, Math.max(1.1, highStd)] }),
      );
    }
  }

  // Draws once, when its tab is first opened.
  page.overall = ({ data, rows, open }) => {
    let drawn = false;
    return () => {
      if (drawn) return;
      drawn = true;
      if (data.hasOriginals) drawFigures(data, rows, open);
      drawLatents(data);
    };
  };
})();
