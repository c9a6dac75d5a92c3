"use strict";
(() => {
  const root = document.documentElement;
  const toggle = document.querySelector("button.theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const say = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  toggle.hidden = false;
  toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; say(); });
  say();

  // On a narrow screen the contents would push the title out of sight.
  const contents = document.querySelector("nav details");
  const narrow = matchMedia("(max-width: 60rem)");
  const fold = () => { contents.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();

  const key = (row, column) => {
    const cell = row.cells[column];
    const marked = cell.querySelector("[data-sort]");
    const text = marked ? marked.dataset.sort : cell.textContent.replace(/,/g, "");
    // A date or a commit begins with a digit and is none the less no number.
    const number = text.trim() === "" ? NaN : Number(text.trim().replace(/ ?%$/, ""));
    return Number.isNaN(number) ? text : number;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = table.tHead.rows[table.tHead.rows.length - 1].cells;
    [...heads].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].sort((a, b) => {
          const x = key(a, column), y = key(b, column);
          const numeric = typeof x === "number" && typeof y === "number";
          // Numbers stand apart from what has none, such as a row that was not run.
          const order = typeof x === typeof y
            ? (numeric ? x - y : x.localeCompare(y))
            : (typeof x === "number" ? 1 : -1);
          return down ? -order : order;
        });
        body.replaceChildren(...rows);
      });
    });
  }

  for (const film of document.querySelectorAll("figure.film")) {
    const count = Number(film.dataset.frames);
    const [button, slider, output] = film.querySelectorAll("button, input, output");
    const frames = [...film.querySelectorAll(".frame")];
    let timer = null;
    const show = (step) => {
      slider.value = step;
      output.textContent = step;
      for (const frame of frames) {
        frame.style.backgroundPositionX = `${-step * parseInt(frame.style.width, 10)}px`;
      }
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      button.textContent = "▶";
      button.setAttribute("aria-label", "play");
    };
    button.addEventListener("click", () => {
      if (timer) { stop(); return; }
      if (Number(slider.value) >= count - 1) show(0);
      button.textContent = "❚❚";
      button.setAttribute("aria-label", "pause");
      timer = setInterval(() => {
        const next = Number(slider.value) + 1;
        show(next);
        if (next >= count - 1) stop();
      }, 250);
    });
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  }
})();
