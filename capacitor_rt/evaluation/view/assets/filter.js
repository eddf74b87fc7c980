"use strict";
// Rows of the page: their values by key, filtering and sorting. Pure: nothing here touches the document.
(function () {
  const page = window.capacitor;
  const NAMES = { psnr: "PSNR", ssim: "SSIM", lpips: "LPIPS" };
  const UNITS = { psnr: "dB" };
  const DIGITS = { psnr: 2, ssim: 4, lpips: 4 };

  // data: what data.js holds. `values[key][row]` are numbers, `keys` say how they are called.
  page.rows = (data) => {
    const { images, measures, models } = data;
    const count = images.name.length;
    const values = {};
    const keys = [];
    const define = (key, label, digits, column) => {
      values[key] = column;
      keys.push({ key, label, digits });
    };
    for (const [measure, byModel] of Object.entries(measures)) {
      // identical pixels have an infinite PSNR, which JSON lacks
      const exact = measure === "psnr" ? Infinity : NaN;
      const columns = byModel.map((column) => column.map((value) => (value === null ? exact : value)));
      const unit = UNITS[measure] ? `, ${UNITS[measure]}` : "";
      columns.forEach((column, m) => {
        const label = models.length > 1 ? `${NAMES[measure]}${unit}, ${models[m].name}` : `${NAMES[measure]}${unit}`;
        define(m ? `${measure}${m + 1}` : measure, label, DIGITS[measure], column);
      });
      columns.slice(1).forEach((column, m) => {
        // two exact reproductions do not differ
        const difference = column.map((other, i) => (columns[0][i] === other ? 0 : columns[0][i] - other));
        const label = `${NAMES[measure]}${unit}, ${models[0].name} - ${models[m + 1].name}`;
        define(`delta${measure === "psnr" ? "" : `-${measure}`}${m ? m + 2 : ""}`, label, DIGITS[measure], difference);
      });
    }
    if (images.fileBytes.some((n) => n !== null)) {
      define("bytes", "bytes of the file", 0, images.fileBytes.map((n) => (n === null ? NaN : n)));
      define("bpp", "bits per pixel of the file", 2, images.fileBytes.map((n, i) => (n === null ? NaN : (8 * n) / images.width[i] / images.height[i])));
    }
    define("pixels", "pixels", 0, images.width.map((w, i) => w * images.height[i]));
    const lower = images.name.map((name, i) => `${name} ${images.note[i]}`.toLowerCase());

    const condition = /^([a-z]+(?:-[a-z]+)?\d*)(<=|>=|<|>)(-?\d+(?:\.\d+)?)$/;
    const compare = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };

    // Numbers of the rows that all words of the text fit: `cat psnr<30` are names with "cat" of less than 30 dB.
    function filter(text) {
      const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
        const found = condition.exec(word);
        if (!found || !values[found[1]]) return (i) => lower[i].includes(word);
        return (i) => compare[found[2]](values[found[1]][i], Number(found[3]));
      });
      const kept = [];
      for (let i = 0; i < count; i += 1) if (tests.every((test) => test(i))) kept.push(i);
      return kept;
    }

    // The same numbers in another order; rows without a value come last either way, equal ones stay in order.
    function sort(rows, key, descending) {
      const sign = descending ? -1 : 1;
      if (key === "order") return descending ? [...rows].reverse() : rows;
      if (key === "name") {
        const collator = new Intl.Collator("en", { numeric: true });
        return [...rows].sort((a, b) => sign * collator.compare(images.name[a], images.name[b]) || a - b);
      }
      const column = values[key];
      return [...rows].sort((a, b) => {
        const [x, y] = [column[a], column[b]];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a - b;
        return x === y ? a - b : sign * (x < y ? -1 : 1);
      });
    }
    return { count, values, keys, filter, sort };
  };
})();
