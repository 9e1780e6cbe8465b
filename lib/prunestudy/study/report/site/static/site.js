// Formulas drawn, tables sortable. Long headings of two rows stay as they are.
document.addEventListener("DOMContentLoaded", () => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
    throwOnError: false,
  });
  for (const table of document.querySelectorAll(".sortable, .dataframe, .output table.docutils")) {
    if (table.tHead?.rows.length === 1 && table.rows.length > 2) new Tablesort(table);
  }
});
