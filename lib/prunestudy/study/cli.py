"""The console command `prunestudy`: its words, and what becomes of errors and Ctrl-C."""

import argparse
import contextlib
import math
import os
import signal
import sys
from typing import Any

import psutil

import prunestudy
from prunestudy.errors import InputError, file_line, require

_STOPPED = "stopped; finished work is kept: run the same command again to continue"


def main(words: list[str] | None = None) -> int:
    """Run one command; bad input is one line on stderr and exit code 2, Ctrl-C 130."""
    if words is None:
        # A request to end counts as Ctrl-C; a log file gets a line of progress now and then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: PTH123, SIM115
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, stream)
        if not sys.stderr.isatty():
            os.environ |= {"TQDM_DELAY": "15", "TQDM_MININTERVAL": "15"}
    try:
        parser = _parser()
        arguments = parser.parse_args(words)
        if not arguments.command:
            parser.print_help()
            return 0
        for name in ("results", "data", "file"):
            text = getattr(arguments, name, "")
            right = text == text.encode(errors="ignore").decode()  # safetensors opens no others
            require(right, name, text, "a path in UTF-8")
        from prunestudy.study import commands  # after parsing: it takes seconds

        return getattr(commands, f"do_{arguments.command}")(arguments) or 0
    except InputError as error:
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # once is enough
            signal.signal(number, signal.SIG_IGN)
        _end_children()
        print(file=sys.stderr)  # ends the line of a progress bar
        return _refuse(_STOPPED, 130)
    except BrokenPipeError:
        # The reader (head, less) has gone; Python would complain when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _refuse(file_line(error))
    return 0


def _refuse(line: str, code: int = 2) -> int:
    print(f"prunestudy: {line}", file=sys.stderr)
    return code


def _end_children() -> None:
    children = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(child)
        _, children = psutil.wait_procs(children, timeout=10)


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(prog="prunestudy", description="A study of neural network pruning.")
    parser.add_argument("--version", action="version", version=prunestudy.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (text, takes) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for argument in f"{takes} --results".split():
            command.add_argument(argument, **ARGUMENTS[argument])
    return parser


# Name of a command to what it does, and what it takes besides --results.
_COMMANDS = {
    "study": (
        "run what is missing",
        "--profile --paper --searches --data --jobs --executor --minutes --gang",
    ),
    "plan": ("say what the runs would cost", "--profile --paper"),
    "list": ("list the runs, or the names that settings take", "--profile --paper what name"),
    "status": ("say what is done and what is missing", "--profile --paper --data"),
    "search": ("say which settings are the best of a search", "--profile --paper --check"),
    "latency": ("time the finished nets (keep the machine otherwise idle)", "--profile --paper"),
    "run": ("train runs by name", "--profile --paper --data --device --weights runs"),
    "collect": ("merge finished runs into one file", "--profile --replace folders"),
    "show": ("print a run's record and history", "--profile first"),
    "compare": ("say what differs between two runs", "--profile first second"),
    "export": ("write a finished net as an ONNX file", "--profile first file"),
    "train": ("train one run with settings of your own", "--data --device --set"),
}
LISTS = ("models", "datasets", "methods", "papers", "profiles")
_RUN = {"metavar": "RUN", "help": "a run's name or its beginning"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--results": {"default": "", "help": "results folder (default: results/)"},
    "--profile": {"default": "quick", "help": "see `prunestudy list profiles`; custom: your own"},
    "--paper": {"action": "append", "default": [], "help": "one of several papers (default: all)"},
    "--data": {"default": "", "help": "data root (default: PRUNESTUDY_DATA, else data/)"},
    "--device": {"default": "auto", "help": "auto, cpu or cuda"},
    "--jobs": {"type": int, "default": 2, "help": "jobs side by side (default: 2)"},
    "--executor": {"default": "local", "help": "a Snakemake executor (default: local)"},
    "--minutes": {"type": float, "default": math.inf, "help": "profile gpu: time limit in minutes"},
    "--gang": {"type": int, "default": 8, "help": "profile gpu: runs at a time (default: 8)"},
    "--weights": {"action": "store_true", "help": "also retrain runs whose net file is missing"},
    "--searches": {"action": "store_true", "help": "also train the hyperparameter-search runs"},
    "--check": {"action": "store_true", "help": "exit with 1 if a card differs from the best"},
    "--replace": {"action": "store_true", "help": "replace stored records by the new ones"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "dataset (a name, or folder:NAME for images in NAME/{train,test}/<class>/ below"
        " the data root), model, method, target, seed, validation, epochs, lr, batch_size, ... or"
        " a parameter of the method as params.NAME; `prunestudy list` models, datasets, methods",
    },
    "what": {"nargs": "?", "choices": (*LISTS, "method"), "help": "which names to list"},
    "name": {"nargs": "?", "metavar": "NAME", "help": "the method whose parameters to list"},
    "runs": {"nargs": "+", **_RUN},
    "first": _RUN,
    "second": _RUN,
    "folders": {"nargs": "*", "metavar": "FOLDER", "help": "results copied from another machine"},
    "file": {"metavar": "FILE", "help": "the ONNX file"},
}


if __name__ == "__main__":
    sys.exit(main())
