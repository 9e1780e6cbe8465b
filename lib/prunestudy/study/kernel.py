"""Notebooks after each other on one kernel: each finds it as the first did."""

import builtins
import os
import random
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any


def note_start(shell: Any) -> None:
    """Import what is slow to import, note the kernel's state, give it `start_afresh()`.

    `shell` is IPython's. Not brought back: what other libraries than prunestudy keep in modules.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    import torch

    import prunestudy.study.session  # noqa: F401

    tables = [vars(builtins), os.environ]
    for formatter in shell.display_formatter.formatters.values():
        tables += [formatter.type_printers, formatter.deferred_printers]
    kept = [(table, dict(table)) for table in tables]
    lists = [(items, list(items)) for items in (sys.path, warnings.filters)]
    state = (
        (partial(dict.update, plt.rcParams), dict(plt.rcParams)),
        (os.chdir, Path.cwd()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
        (torch.set_num_threads, torch.get_num_threads()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
    )

    def start_afresh() -> None:
        plt.close("all")
        shell.reset(new_session=True)
        for name in [name for name in sys.modules if name.split(".")[0] == "prunestudy"]:
            del sys.modules[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pd.reset_option("all")
        for table, before in kept:
            for added in set(table) - set(before):
                del table[added]
            table.update(before)
        for items, before in lists:
            items[:] = before
        for put, value in state:
            put(value)

    shell.start_afresh = start_afresh
    start_afresh()
