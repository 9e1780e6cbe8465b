"""From a card to runs, records, tables, figures and executed notebooks."""
