"""A kernel for notebooks: a fork of this process, so that modules are imported only once."""

import asyncio
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from ipykernel.kernelapp import IPKernelApp
from jupyter_client import AsyncKernelClient, write_connection_file
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from prunestudy.errors import InputError
from prunestudy.study.figures import groups, overview, papers  # noqa: F401 (all notebooks do)


class _Kernel:
    """A fork of this process that runs cells, with what nbclient asks of a kernel's manager."""

    has_kernel = True

    def __init__(self, folder: str) -> None:
        # Sockets in a folder: kernels that start at the same time race for network ports.
        self.file, _ = write_connection_file(
            f"{folder}/kernel.json", transport="ipc", ip=f"{folder}/kernel"
        )
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(self.file, os.getpid()), daemon=True)
        self.process.start()

    def client(self) -> AsyncKernelClient:
        client = AsyncKernelClient(connection_file=self.file)
        client.load_connection_file()
        # Not by its heartbeat, which is late on a busy machine.
        client.is_alive = client._async_is_alive = self.is_alive
        return client

    async def is_alive(self) -> bool:
        return self.process.is_alive()

    def shutdown_kernel(self, **_: bool) -> None:
        self.process.kill()
        self.process.join()

    def cleanup_resources(self) -> None:
        pass


def _serve(connection_file: str, parent: int) -> None:
    """Run as a fresh kernel: reset what the parent process did before the fork."""
    with open(os.devnull, "r+b") as nothing:  # noqa: PTH123
        for number in (0, 1, 2):
            os.dup2(nothing.fileno(), number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.set_event_loop(asyncio.new_event_loop())
    torch.set_num_threads(1)  # a pool of threads does not outlive the fork
    torch.manual_seed(0)  # cells that draw without a seed of their own draw the same each time
    mpl.rcdefaults()
    backend = "module://matplotlib_inline.backend_inline"
    mpl.rcParams["backend"] = os.environ["MPLBACKEND"] = backend
    os.environ.pop("PYTHONSTARTUP", None)  # nothing of the user's own
    words = ["-f", connection_file, f"--ipython-dir={Path(connection_file).parent}"]
    IPKernelApp.launch_instance(words, parent_handle=parent)


def run_cells(notebook: Any) -> None:
    """Execute `notebook` in place; `InputError` where a cell fails or the kernel dies."""
    long = len(os.fsencode(tempfile.gettempdir())) > 80  # for the path of a socket
    near = "/tmp" if long else None
    with tempfile.TemporaryDirectory(dir=near) as folder:
        client = NotebookClient(notebook, km=_Kernel(folder))
        try:
            client.execute()
        except CellExecutionError as error:
            raise InputError(f"{error.ename}: {error.evalue}") from None
        except DeadKernelError:
            raise InputError("its kernel died, perhaps of too little memory") from None
        finally:
            if client.km:  # else it was done when the kernel died
                client._cleanup_kernel()
