"""Notebooks after each other on one kernel: each begins as the first did."""

import os
import sys
import warnings
from pathlib import Path


def note_start() -> None:
    """Import what is slow to import, note the kernel's state, give its shell `start_afresh()`."""
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch
    from IPython import get_ipython

    import prunestudy.study.session  # noqa: F401

    shell, folder, drawn = get_ipython(), Path.cwd(), torch.get_rng_state()
    style, variables, filters = dict(plt.rcParams), dict(os.environ), list(warnings.filters)

    def start_afresh() -> None:
        plt.close("all")
        shell.reset(new_session=True)
        for name in [name for name in sys.modules if name.split(".")[0] == "prunestudy"]:
            del sys.modules[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pd.reset_option("all")
            plt.rcParams.update(style)
        warnings.filters[:] = filters
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        torch.set_rng_state(drawn)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)

    shell.start_afresh = start_afresh
    start_afresh()
