/* The ledger's table: choose by section, verdict and whose claim, search, sort by a column. */
(function () {
  "use strict";
  const table = document.getElementById("ledger");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const controls = document.createElement("form");
  controls.className = "bn-controls";
  controls.addEventListener("submit", (event) => event.preventDefault());

  function labelled(text, field) {
    const label = document.createElement("label");
    label.append(text + " ", field);
    controls.append(label);
    field.addEventListener("input", show);
    return field;
  }

  function choice(text, key) {
    const select = document.createElement("select");
    const values = Array.from(new Set(rows.map((row) => row.dataset[key])));
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    return labelled(text, select);
  }

  const chosen = {
    source: choice("Whose", "source"),
    section: choice("Section", "section"),
    verdict: choice("Verdict", "verdict"),
  };
  const words = document.createElement("input");
  words.type = "search";
  labelled("Words", words);
  const count = document.createElement("p");
  count.setAttribute("aria-live", "polite");
  controls.append(count);
  table.parentNode.before(controls);

  function show() {
    const wanted = words.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = Object.keys(chosen).every(
        (key) => !chosen[key].value || row.dataset[key] === chosen[key].value
      );
      row.hidden = !(fits && row.textContent.toLowerCase().includes(wanted));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown + " of " + rows.length + " claims";
  }

  Array.from(table.tHead.rows[0].cells).forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = cell.textContent;
    cell.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key || row.cells[column].textContent;
      const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
      body.append(...rows);
    });
  });

  /* A link to a claim shows it, whatever is chosen. */
  chosen.source.value = location.hash.startsWith("#row-") ? "" : "the paper";
  show();
  if (location.hash.startsWith("#row-")) {
    const row = document.getElementById(location.hash.slice(1));
    if (row) row.scrollIntoView();
  }
})();
