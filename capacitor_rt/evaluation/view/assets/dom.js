"use strict";
// Elements, numbers as text, the theme. Text reaches the page as text nodes and attributes alone, never as markup.
(function () {
  const page = (window.capacitor = {});
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "text") node.textContent = value;
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  page.el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  page.svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  page.byId = (id) => document.getElementById(id);

  // A figure with so many digits after the point; null is what could not be computed.
  page.number = (value, digits) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "none";
    if (!Number.isFinite(value)) return value > 0 ? "exact" : "-exact";
    return value.toFixed(digits);
  };
  page.signed = (value, digits) => (value > 0 ? "+" : "") + page.number(value, digits);
  page.bytes = (count) => {
    const units = ["B", "kB", "MB", "GB"];
    let unit = 0;
    while (count >= 1000 && unit < 3) {
      count /= 1000;
      unit += 1;
    }
    return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
  };

  const themes = ["auto", "light", "dark"];
  function remembered() {
    try {
      return localStorage.getItem("capacitor-theme");
    } catch {
      return null; // a browser may refuse storage to a page from disk
    }
  }
  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    page.byId("theme").textContent = `Theme: ${theme}`;
    try {
      localStorage.setItem("capacitor-theme", theme);
    } catch {
      // it then lasts as long as the page
    }
  }
  setTheme(themes.includes(remembered()) ? remembered() : "auto");
  page.byId("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
  });

  // Tabs: arrow keys move between them, and `shown(id)` hears of every change.
  page.tabs = (shown) => {
    const tabs = [...document.querySelectorAll('[role="tab"]')];
    function select(id, focus) {
      for (const tab of tabs) {
        const panel = tab.getAttribute("aria-controls");
        const here = panel === id;
        tab.setAttribute("aria-selected", String(here));
        tab.tabIndex = here ? 0 : -1;
        page.byId(panel).hidden = !here;
        if (here && focus) tab.focus();
      }
      shown(id);
    }
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(tab.getAttribute("aria-controls"), false));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        event.stopPropagation();
        select(tabs[(i + step + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
      });
    });
    return { select: (id) => select(id, false), ids: tabs.map((tab) => tab.getAttribute("aria-controls")) };
  };
})();
