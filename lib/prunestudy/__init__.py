"""A reproducible study of five papers on making neural networks smaller.

The rooms, each knowing only those before it: `models`, `datasets`, `shrink`, `measure`,
`methods`, `train`, `papers`, `study`.
"""

from importlib.metadata import version

__version__ = version("prunestudy")
