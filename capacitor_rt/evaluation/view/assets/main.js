"use strict";
// The page as a whole: which image is shown and how, in the address, so that a link leads to what one saw.
(function () {
  const page = window.capacitor;
  const { el, byId } = page;
  const data = window.capacitorPage;
  const { images, models } = data;
  const rows = page.rows(data);
  const labels = { psnr: "PSNR", ssim: "SSIM", lpips: "LPIPS" };
  const state = { tab: "images", image: 0, sort: "order", descending: false, filter: "" };
  let ready = false;

  const keyOf = (measure, m) => (m ? `${measure}${m + 1}` : measure);
  const digits = Object.fromEntries(rows.keys.map(({ key, digits: n }) => [key, n]));
  const value = (key, row) => page.number(rows.values[key][row], digits[key]);

  function scoresOf(row, m) {
    const found = Object.keys(data.measures).map((key) => {
      const unit = key === "psnr" && Number.isFinite(rows.values[keyOf(key, m)][row]) ? " dB" : "";
      return `${labels[key]} ${value(keyOf(key, m), row)}${unit}`;
    });
    return [...found, `latents ${page.bytes(images.latentBytes[row][m])}`].join(", ");
  }

  function shortScores(row) {
    if (!data.hasOriginals) return `${images.width[row]}x${images.height[row]}`;
    const all = models.map((_, m) => value(keyOf("psnr", m), row)).join(" | ");
    const delta = "delta" in rows.values ? `  ${page.signed(rows.values.delta[row], 2)}` : "";
    return `${all} dB${delta}`;
  }

  const panes = page.panes({ root: byId("panes"), data, scores: scoresOf, changed: remember });
  const list = page.list({
    root: byId("list"),
    describe: (row) => ({ name: images.name[row], scores: shortScores(row), thumb: `thumbs/${String(row).padStart(6, "0")}.webp` }),
    choose: show,
  });
  const overall = page.overall({ data, rows, open: (row) => { show(row); tabs.select("images"); } });
  const tabs = page.tabs((id) => {
    state.tab = id;
    if (id === "overall") overall();
    remember();
  });

  function show(row) {
    state.image = row;
    byId("name").textContent = images.name[row];
    const facts = [`${images.width[row]}x${images.height[row]} pixels`];
    if (images.fileBytes[row] !== null) facts.push(`file ${page.bytes(images.fileBytes[row])}`);
    if (images.note[row]) facts.push(images.note[row]);
    for (const { key, label } of rows.keys) if (key.startsWith("delta")) facts.push(`${label}: ${page.signed(rows.values[key][row], digits[key])}`);
    byId("facts").textContent = facts.join("; ");
    panes.show(row);
    list.select(row);
    remember();
  }

  function arrange() {
    const found = rows.sort(rows.filter(state.filter), state.sort, state.descending);
    list.set(found);
    byId("count").textContent = found.length === rows.count ? `${rows.count} images` : `${found.length} of ${rows.count} images`;
    byId("order").textContent = state.descending ? "\u2193" : "\u2191";
    byId("order").setAttribute("aria-label", `Order: ${state.descending ? "descending" : "ascending"}`);
    remember();
  }

  function go(step) {
    const shown = list.rows();
    if (!shown.length) return;
    const at = shown.indexOf(state.image);
    show(shown[at < 0 ? 0 : Math.max(0, Math.min(shown.length - 1, at + step))]);
  }

  // the address

  function address() {
    const { reference, split, gain, zoom, x, y, latents } = panes.state;
    const round = (n) => Number(n.toFixed(2));
    const all = { tab: state.tab, image: state.image, sort: state.sort, down: state.descending ? 1 : "", filter: state.filter, reference, split: round(split), gain };
    if (zoom) Object.assign(all, { zoom: Number(zoom.toPrecision(5)), x: round(x), y: round(y) });
    latents.forEach((latent, m) => {
      if (latent !== "pca") all[`channel${m}`] = latent;
    });
    return `#${new URLSearchParams(Object.entries(all).filter(([, v]) => v !== ""))}`;
  }

  let timer = 0;
  function remember() {
    if (!ready) return;
    // browsers limit how often an address may change
    clearTimeout(timer);
    timer = setTimeout(write, 120);
  }
  function write() {
    byId("link").setAttribute("href", address());
    try {
      history.replaceState(null, "", address());
    } catch {
      // the link above holds it all the same
    }
  }

  // Nothing in an address is trusted: what is no value of ours is left as it is.
  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const inside = (name, low, high, otherwise) => {
      const number = given.has(name) && given.get(name) !== "" ? Number(given.get(name)) : NaN;
      return number >= low && number <= high ? number : otherwise;
    };
    const image = inside("image", 0, rows.count - 1, state.image);
    if (Number.isInteger(image)) state.image = image;
    if (["order", "name", ...Object.keys(rows.values)].includes(given.get("sort"))) state.sort = given.get("sort");
    state.descending = given.get("down") === "1";
    state.filter = given.get("filter") || "";
    const references = [...byId("reference").options].map((option) => option.value);
    const changes = { split: inside("split", 0, 100, 50), gain: inside("gain", 1, 64, 8), zoom: inside("zoom", 0, 32, 0) };
    if (references.includes(given.get("reference"))) changes.reference = given.get("reference");
    changes.x = inside("x", 0, images.width[state.image], images.width[state.image] / 2);
    changes.y = inside("y", 0, images.height[state.image], images.height[state.image] / 2);
    changes.latents = models.map((model, m) => {
      const channel = inside(`channel${m}`, 0, model.channels - 1, -1);
      return Number.isInteger(channel) && channel >= 0 ? String(channel) : "pca";
    });
    byId("filter").value = state.filter;
    byId("sort").value = state.sort;
    panes.show(state.image);
    panes.set(changes);
    controls();
    arrange();
    show(state.image);
    tabs.select(tabs.ids.includes(given.get("tab")) ? given.get("tab") : state.tab);
  }

  // the controls

  function controls() {
    byId("split").value = panes.state.split;
    byId("gain").value = panes.state.gain;
    byId("reference").value = panes.state.reference;
  }
  function set(changes) {
    panes.set(changes);
    controls();
  }
  const within = (n, low, high) => Math.max(low, Math.min(high, n));

  const sortable = [{ key: "order", label: "order of the input" }, { key: "name", label: "name" }, ...rows.keys];
  byId("sort").append(...sortable.map(({ key, label }) => el("option", { value: key, text: label })));
  const references = models.map((model, m) => el("option", { value: m, text: model.name }));
  if (data.hasOriginals) references.unshift(el("option", { value: "original", text: "original" }));
  byId("reference").append(...references);
  byId("filter-help").textContent = `Words of the name, or ${data.hasOriginals ? (models.length > 1 ? "psnr<30, psnr2<30, delta>0.5, ssim<0.9" : "psnr<30, ssim<0.9") : "pixels>100000"}.`;

  byId("filter").addEventListener("input", (event) => {
    state.filter = event.target.value;
    arrange();
  });
  byId("sort").addEventListener("change", (event) => {
    state.sort = event.target.value;
    arrange();
  });
  byId("order").addEventListener("click", () => {
    state.descending = !state.descending;
    arrange();
  });
  byId("previous").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  byId("reference").addEventListener("change", (event) => set({ reference: event.target.value }));
  byId("split").addEventListener("input", (event) => panes.set({ split: Number(event.target.value) }));
  byId("gain").addEventListener("input", (event) => {
    if (event.target.value) panes.set({ gain: within(Number(event.target.value), 1, 64) });
  });
  byId("zoom-in").addEventListener("click", () => panes.step(1));
  byId("zoom-out").addEventListener("click", () => panes.step(-1));
  byId("zoom-fit").addEventListener("click", () => panes.set({ zoom: 0 }));

  function hold(held) {
    panes.hold(held);
    byId("hold").setAttribute("aria-pressed", String(held));
  }
  const button = byId("hold");
  button.addEventListener("pointerdown", (event) => {
    button.setPointerCapture(event.pointerId);
    hold(true);
  });
  for (const end of ["pointerup", "pointercancel", "blur"]) button.addEventListener(end, () => hold(false));
  button.addEventListener("keydown", (event) => (event.key === " " || event.key === "Enter") && hold(true));
  button.addEventListener("keyup", () => hold(false));
  button.addEventListener("contextmenu", (event) => event.preventDefault());

  const keys = {
    ArrowLeft: () => go(-1),
    ArrowRight: () => go(1),
    k: () => go(-1),
    j: () => go(1),
    o: () => hold(true),
    "+": () => panes.step(1),
    "=": () => panes.step(1),
    "-": () => panes.step(-1),
    0: () => panes.set({ zoom: 0 }),
    "[": () => set({ split: within(panes.state.split - 5, 0, 100) }),
    "]": () => set({ split: within(panes.state.split + 5, 0, 100) }),
    ",": () => set({ gain: within(Math.round(panes.state.gain / 2), 1, 64) }),
    ".": () => set({ gain: within(panes.state.gain * 2, 1, 64) }),
    "/": () => byId("filter").focus(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || state.tab !== "images") return;
    // fields and lists have keys of their own
    if (event.target.closest("input, select, textarea")) return;
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keyup", (event) => event.key.toLowerCase() === "o" && hold(false));
  window.addEventListener("blur", () => hold(false));
  window.addEventListener("hashchange", read);

  read();
  ready = true;
  write();
})();
