"use strict";
// The image in panes that zoom and move in step: slider, difference and latents of each model, and maps of channels.
(function () {
  const page = window.capacitor;
  const { el } = page;
  const ZOOMS = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32];
  const ORIGINAL = "original";
  const PCA = "pca";

  page.file = (row, what) => `images/${String(row).padStart(6, "0")}-${what}.webp`;

  // options: {root, data, scores(row, model) -> text, changed()}
  page.panes = ({ root, data, scores, changed }) => {
    const { models, images, hasOriginals, maps } = data;
    // `zoom` 0 fits the image; else screen pixels per image pixel around the image's point (x, y)
    const state = { reference: hasOriginals ? ORIGINAL : "0", split: 50, gain: 8, zoom: 0, x: 0, y: 0, latents: models.map(() => PCA) };
    const views = models.map(build);
    const details = page.byId("maps");
    let row = 0;

    function image(kind) {
      return el("img", { alt: "", draggable: "false", "data-kind": kind });
    }
    function stage(...inside) {
      return el("div", { class: "stage" }, ...inside);
    }

    function build(model, m) {
      const name = el("h3", { text: model.name });
      const figures = el("p", { class: "scores" });
      const left = image("reference");
      const right = image("model");
      const divider = el("div", { class: "divider" });
      const slider = el("div", { class: "pane", "data-pane": `slider-${m}` },
        el("div", { class: "layer" }, stage(right)), el("div", { class: "layer reference" }, stage(left)), divider);
      const [under, over] = [image("reference"), image("model")];
      const difference = el("div", { class: "pane", "data-pane": `difference-${m}` },
        el("div", { class: "layer amplified" }, stage(under, over)));
      const latent = image("latent");
      const colours = el("div", { class: "pane latent", "data-pane": `latent-${m}` }, el("div", { class: "layer" }, stage(latent)));
      const choice = el("select", { "aria-label": `Latents of ${model.name}` },
        el("option", { value: PCA, text: "three principal components" }),
        ...Array.from({ length: model.channels }, (_, c) => el("option", { value: c, text: `channel ${c}` })));
      choice.addEventListener("change", () => set({ latents: state.latents.map((was, i) => (i === m ? choice.value : was)) }));
      const captions = [el("span"), el("span"), el("span")];
      root.append(el("section", { class: "model", "aria-label": model.name },
        el("div", { class: "head" }, name, figures),
        el("div", { class: "row-of-panes" },
          el("figure", null, slider, el("figcaption", null, captions[0])),
          el("figure", null, difference, el("figcaption", null, captions[1])),
          el("figure", null, colours, el("figcaption", null, captions[2], choice)))));
      divider.addEventListener("pointerdown", (event) => {
        event.stopPropagation();
        event.preventDefault();
        divider.setPointerCapture(event.pointerId);
      });
      divider.addEventListener("pointermove", (event) => {
        if (!divider.hasPointerCapture(event.pointerId)) return;
        const box = slider.getBoundingClientRect();
        set({ split: Math.max(0, Math.min(100, ((event.clientX - box.left) / box.width) * 100)) });
      });
      const panes = [slider, difference, colours];
      panes.forEach(listen);
      return { figures, left, right, under, over, latent, choice, captions, panes };
    }

    const width = () => images.width[row];
    const height = () => images.height[row];
    const box = () => views[0].panes[0].getBoundingClientRect();
    const fit = ({ width: w, height: h } = box()) => Math.min(w / width(), h / height());
    const scale = () => state.zoom || fit();

    function place() {
      const { width: w, height: h } = box();
      if (!w) return; // its tab is not shown
      const s = scale();
      const [x, y] = state.zoom ? [state.x, state.y] : [width() / 2, height() / 2];
      root.style.setProperty("--tx", w / 2 - x * s);
      root.style.setProperty("--ty", h / 2 - y * s);
      root.style.setProperty("--scale", s);
      root.toggleAttribute("data-magnified", s >= 1);
      root.toggleAttribute("data-zoomed", state.zoom > 0);
      page.byId("zoom").textContent = state.zoom ? `${Number(s.toPrecision(3))}x` : "fit";
    }

    // Screen pixels per image pixel, such that the image's point (x, y) stays where it is in its pane.
    function zoomTo(next, anchor) {
      const s = scale();
      const [x0, y0] = state.zoom ? [state.x, state.y] : [width() / 2, height() / 2];
      if (next <= fit() * 1.001) return set({ zoom: 0 });
      const zoom = Math.min(ZOOMS.at(-1), next);
      const { x, y } = anchor || { x: x0, y: y0 };
      return moveTo(x + ((x0 - x) * s) / zoom, y + ((y0 - y) * s) / zoom, zoom);
    }
    function moveTo(x, y, zoom = state.zoom) {
      set({ zoom, x: Math.max(0, Math.min(width(), x)), y: Math.max(0, Math.min(height(), y)) });
    }
    function step(direction) {
      const s = scale();
      zoomTo(direction > 0 ? ZOOMS.find((z) => z > s * 1.001) || s : ZOOMS.findLast((z) => z < s * 0.999) || 0);
    }

    // The image's point under the pointer.
    function pointOf(pane, event) {
      const { left, top, width: w, height: h } = pane.getBoundingClientRect();
      const [x, y] = state.zoom ? [state.x, state.y] : [width() / 2, height() / 2];
      return { x: x + (event.clientX - left - w / 2) / scale(), y: y + (event.clientY - top - h / 2) / scale() };
    }

    function listen(pane) {
      const down = new Map();
      pane.addEventListener("wheel", (event) => {
        // without a modifier the page scrolls, until one has begun to look at pixels
        if (!state.zoom && !event.ctrlKey && !event.shiftKey && event.deltaY > 0) return;
        event.preventDefault();
        const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 33 : 1;
        zoomTo(scale() * 2 ** ((-event.deltaY * lines) / 250), pointOf(pane, event));
      }, { passive: false });
      pane.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        down.set(event.pointerId, event);
        if (state.zoom || down.size > 1) pane.setPointerCapture(event.pointerId);
      });
      pane.addEventListener("pointermove", (event) => {
        const before = down.get(event.pointerId);
        if (!before) return;
        const other = [...down].find(([id]) => id !== event.pointerId);
        down.set(event.pointerId, event);
        if (other) {
          const distance = (e) => Math.hypot(e.clientX - other[1].clientX, e.clientY - other[1].clientY) || 1;
          zoomTo((scale() * distance(event)) / distance(before), pointOf(pane, event));
        } else if (state.zoom) {
          moveTo(state.x - (event.clientX - before.clientX) / scale(), state.y - (event.clientY - before.clientY) / scale());
        }
      });
      for (const end of ["pointerup", "pointercancel"]) pane.addEventListener(end, (event) => down.delete(event.pointerId));
      pane.addEventListener("dblclick", (event) => (state.zoom ? set({ zoom: 0 }) : zoomTo(Math.max(4, fit() * 2), pointOf(pane, event))));
    }

    // models of as many channels share one basis, so that their colours compare; others cannot
    const own = new Set(models.map((model) => model.channels)).size > 1;
    const variance = (m) => `${(100 * models[m].share).toPrecision(2)} % of the variance${own ? ", its own basis" : ""}`;
    const nameOf = (which) => (which === ORIGINAL ? "original" : models[Number(which)].name);
    const source = (which) => page.file(row, which === ORIGINAL ? ORIGINAL : which);

    // A map is one tile of a picture of all of them: the picture is that much larger than its window, and moved.
    function windowOn(img, channel, channels) {
      const rows = Math.ceil(channels / maps.columns);
      img.style.width = `${maps.columns * 100}%`;
      img.style.height = `${rows * 100}%`;
      img.style.left = `${-(channel % maps.columns) * 100}%`;
      img.style.top = `${-Math.floor(channel / maps.columns) * 100}%`;
    }

    function draw() {
      const name = images.name[row];
      root.style.setProperty("--width", width());
      root.style.setProperty("--height", height());
      root.style.setProperty("--aspect", `${width()} / ${height()}`);
      views.forEach((view, m) => {
        const label = models[m].name;
        view.figures.textContent = scores(row, m);
        for (const img of [view.left, view.under]) {
          img.src = source(state.reference);
          img.alt = `${name}, ${nameOf(state.reference)}`;
        }
        for (const img of [view.right, view.over]) {
          img.src = page.file(row, m);
          img.alt = `${name}, reconstruction of ${label}`;
        }
        const latent = state.latents[m];
        view.choice.value = latent;
        view.latent.src = page.file(row, latent === PCA ? `${m}-pca` : `${m}-maps`);
        view.latent.alt = latent === PCA ? `Latents of ${label} as colours` : `Channel ${latent} of the latents of ${label}`;
        if (latent === PCA) view.latent.removeAttribute("style");
        else windowOn(view.latent, Number(latent), models[m].channels);
        view.captions[0].textContent = `${nameOf(state.reference)} | ${label}`;
        view.captions[1].textContent = `difference x ${state.gain}`;
        view.captions[2].textContent = latent === PCA ? `latents, ${variance(m)}` : `-${maps.clip} to ${maps.clip}`;
      });
      if (details.open) drawMaps();
    }

    // All channels of all models; made when first asked for, since most visits never look.
    function drawMaps() {
      const holder = page.byId("maps-of");
      page.byId("maps-about").textContent =
        `Blue is -${maps.clip}, red ${maps.clip}, in units of a whitened channel's standard deviation; beyond that colours are cut off. A map opens in the panes above.`;
      if (!holder.firstChild) {
        models.forEach((model, m) => {
          const buttons = Array.from({ length: model.channels }, (_, c) => {
            const img = el("img", { alt: "" });
            windowOn(img, c, model.channels);
            const button = el("button", { type: "button", "aria-label": `Channel ${c} of ${model.name}`, "aria-pressed": "false" }, el("span", { class: "map" }, img), String(c));
            button.addEventListener("click", () => {
              const again = state.latents[m] === String(c);
              set({ latents: state.latents.map((was, i) => (i === m ? (again ? PCA : String(c)) : was)) });
            });
            return button;
          });
          holder.append(el("h3", { text: model.name }), el("div", { class: "channels" }, ...buttons));
        });
      }
      holder.style.setProperty("--aspect", `${width()} / ${height()}`);
      holder.querySelectorAll(".channels").forEach((grid, m) => {
        [...grid.children].forEach((button, c) => {
          button.querySelector("img").src = page.file(row, `${m}-maps`);
          button.setAttribute("aria-pressed", String(state.latents[m] === String(c)));
        });
      });
    }

    function set(changes) {
      Object.assign(state, changes);
      root.style.setProperty("--split", state.split);
      root.style.setProperty("--gain", state.gain);
      if ("reference" in changes || "latents" in changes || "gain" in changes) draw();
      place();
      changed();
    }

    details.addEventListener("toggle", () => details.open && drawMaps());
    new ResizeObserver(place).observe(views[0].panes[0]);
    return {
      state,
      set,
      step,
      hold: (held) => root.toggleAttribute("data-held", held),
      show(next) {
        row = next;
        draw();
        place();
      },
    };
  };
})();
