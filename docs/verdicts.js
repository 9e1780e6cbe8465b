// Filters of the table of verdicts: a choice for each column that rows carry as data.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.verdicts");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const choices = [...document.querySelectorAll("select[data-filter]")];
  const shown = document.querySelector("output.shown");
  const update = () => {
    const fits = (row) => choices.every((c) => !c.value || row.dataset[c.dataset.filter] === c.value);
    rows.forEach((row) => { row.hidden = !fits(row); });
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  for (const choice of choices) {
    const values = new Set(rows.map((row) => row.dataset[choice.dataset.filter]).filter(Boolean));
    for (const value of values) choice.add(new Option(value, value));
    choice.addEventListener("change", update);
  }
  update();
});
