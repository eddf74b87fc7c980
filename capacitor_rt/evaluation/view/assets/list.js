"use strict";
// A list that holds as many elements as can be seen, however many rows there are.
(function () {
  const page = window.capacitor;
  const { el } = page;
  const ROW = 64;
  const SPARE = 4; // rows ready above and below

  // options: {root, describe(row) -> {name, scores, thumb}, choose(row)}
  page.list = ({ root, describe, choose }) => {
    const space = root.querySelector(".space");
    const free = [];
    const shown = new Map(); // position -> element
    let rows = [];
    let selected = -1;
    let waiting = false;

    function element() {
      const node = free.pop();
      if (node) return node;
      const made = el("div", { class: "row", role: "option" },
        el("img", { alt: "", width: 52, height: 52, decoding: "async" }),
        el("div", null, el("div", { class: "name" }), el("div", { class: "scores" })));
      root.append(made);
      return made;
    }

    function put(position) {
      const row = rows[position];
      const node = element();
      const { name, scores, thumb } = describe(row);
      const image = node.firstChild;
      if (image.getAttribute("src") !== thumb) image.setAttribute("src", thumb);
      node.querySelector(".name").textContent = name;
      node.querySelector(".scores").textContent = scores;
      node.id = `row-${row}`;
      node.dataset.row = row;
      node.setAttribute("aria-posinset", position + 1);
      node.setAttribute("aria-setsize", rows.length);
      node.setAttribute("aria-selected", String(row === selected));
      node.style.transform = `translateY(${position * ROW}px)`;
      node.hidden = false;
      shown.set(position, node);
    }

    function draw() {
      waiting = false;
      const first = Math.max(0, Math.floor(root.scrollTop / ROW) - SPARE);
      const last = Math.min(rows.length, Math.ceil((root.scrollTop + root.clientHeight) / ROW) + SPARE);
      for (const [position, node] of shown) {
        if (position >= first && position < last) continue;
        node.hidden = true;
        node.removeAttribute("id");
        shown.delete(position);
        free.push(node);
      }
      for (let position = first; position < last; position += 1) if (!shown.has(position)) put(position);
      const active = shown.get(rows.indexOf(selected));
      if (active) root.setAttribute("aria-activedescendant", active.id);
      else root.removeAttribute("aria-activedescendant");
    }

    function drawSoon() {
      if (!waiting) requestAnimationFrame(draw);
      waiting = true;
    }

    function reveal(position) {
      const top = position * ROW;
      if (top < root.scrollTop) root.scrollTop = top;
      else if (top + ROW > root.scrollTop + root.clientHeight) root.scrollTop = top + ROW - root.clientHeight;
    }

    root.addEventListener("scroll", drawSoon, { passive: true });
    new ResizeObserver(drawSoon).observe(root);
    root.addEventListener("click", (event) => {
      const node = event.target.closest(".row");
      if (node) choose(Number(node.dataset.row));
    });
    root.addEventListener("keydown", (event) => {
      const visible = Math.max(1, Math.floor(root.clientHeight / ROW) - 1);
      const at = rows.indexOf(selected);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + visible, PageUp: at - visible, Home: 0, End: rows.length - 1 }[event.key];
      if (to === undefined || !rows.length) return;
      event.preventDefault();
      event.stopPropagation();
      choose(rows[Math.max(0, Math.min(rows.length - 1, to))]);
    });

    return {
      rows: () => rows,
      // Show these rows, from the top.
      set(next) {
        rows = next;
        space.style.height = `${rows.length * ROW}px`;
        for (const node of shown.values()) {
          node.hidden = true;
          node.removeAttribute("id");
          free.push(node);
        }
        shown.clear();
        root.scrollTop = 0;
        if (rows.includes(selected)) reveal(rows.indexOf(selected));
        draw();
      },
      select(row) {
        selected = row;
        for (const node of shown.values()) node.setAttribute("aria-selected", String(Number(node.dataset.row) === row));
        if (rows.includes(row)) reveal(rows.indexOf(row));
        drawSoon();
      },
    };
  };
})();
