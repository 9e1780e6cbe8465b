"""All scripts of this folder, one after the other: `python bench [--quick]`."""

import batches
import commands
import layers
import sparse_linear
import steps
from common import main

if __name__ == "__main__":
    table: list[dict[str, float]] = []
    linear = sparse_linear.rows(table)
    rows = {**steps.ROWS, **layers.ROWS, **batches.ROWS, **commands.ROWS, **linear}
    results = main(rows, anew=True)
    if results:
        sparse_linear.write(table, results)
