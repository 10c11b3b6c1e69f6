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
