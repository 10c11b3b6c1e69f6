"use strict";
// Tables of class "sortable": a click on a heading sorts by the data-value of its cells, another one turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const value = (row, column) => {
    const given = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    return given !== "" && !Number.isNaN(Number(given)) ? Number(given) : given;
  };
  headings.forEach((heading, column) => {
    heading.querySelector("button")?.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (first, second) => {
        const a = value(first, column), b = value(second, column);
        if (a === "" || b === "") return (a === "") - (b === "");  // what was not measured comes last
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
for (const field of document.querySelectorAll("input.filter")) {
  const body = document.getElementById(field.dataset.table).tBodies[0];
  field.addEventListener("input", () => {
    for (const row of body.rows) row.hidden = !row.cells[0].textContent.includes(field.value.trim());
  });
}
// What is long is folded; where there is room it opens. Paper shows everything.
const folds = document.querySelectorAll("details.fold");
if (matchMedia("(min-width: 641px)").matches) for (const fold of folds) fold.open = true;
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
for (const button of document.querySelectorAll("button[data-open]")) {
  const rungs = [...document.getElementById(button.dataset.open).querySelectorAll("details")];
  button.addEventListener("click", () => {
    const open = rungs.some((one) => !one.open);
    for (const one of rungs) one.open = open;
    button.textContent = open ? "Close all" : "Open all";
  });
}
