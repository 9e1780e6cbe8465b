"""One card per paper, a TOML file in this folder: citation, claims, published numbers, experiments.

`shorthand` describes the abbreviations that a card may use.
"""

import json
import tomllib
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from prunestudy.errors import InputError, require, require_one_of
from prunestudy.papers.claims import Claim, Mark, ProfileName, Strict, Strongest, TargetKind
from prunestudy.papers.shorthand import written_out
from prunestudy.train import Recipe

_Precision = Literal["fp32", "bf16"]
_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0)]

PROFILES: tuple[str, ...] = get_args(ProfileName)


class RunRecipe(Recipe):
    """A recipe with `period` 1 by default, as the records have it."""

    period: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class _Read(Strict):
    text: str
    method: str
    model: str
    dataset: str
    mark: Mark
    source: str


class _Published(_Read):
    """`value` (and `dense` one) of `metric`; share `kept`, `nonzeros`, our `target` beside it."""

    metric: Literal["top1", "top5", "psnr", "miou"]
    value: float
    speed_up: float | None = None
    dense: float | None = None
    kept: float | None = None
    nonzeros: int | None = None
    target: float | None = None
    target_kind: TargetKind = "sparsity"


class _Ranks(_Read):
    """`ranks` of `full` by layer, the net's `top1`, and the layers' speed-ups where published."""

    layers: tuple[str, ...]
    full: tuple[int, ...]
    ranks: tuple[int, ...]
    top1: float | None = None
    gpu: tuple[float, ...] = ()
    cpu: tuple[float, ...] = ()
    theory: tuple[float, ...] = ()


class _Unknown(Strict):
    """What the paper leaves open, how we read it, and the ablation of that reading."""

    text: str
    reading: str
    ablation: str = ""


class Entry(Strict):
    """A method in an experiment; `variant` names a reading with other `params` than the default.

    `stage` is "half" and "combined" for the halves of a combination, "fine-tuned" for training
    after pruning. `after` is the label of an earlier entry whose run, of the same seed and target
    (or `after_target`), is the parent. `fresh` starts from random weights and adds the epochs of
    the dense start. `grid`, of a search, is the label of the entry whose settings this one tries.
    """

    method: str
    variant: str = ""
    stage: Literal["", "half", "fine-tuned", "combined"] = ""
    params: dict[str, Any] = {}
    first_seed: _Seed | None = None
    seeds: _Count | None = None
    targets: tuple[float, ...] | None = None
    target_kind: TargetKind | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    epochs: Annotated[int, Field(ge=0)] | None = None
    fresh: bool = False
    after: str = ""
    after_target: float | None = None
    grid: str = ""

    @property
    def label(self) -> str:
        """Name within the experiment: "method, variant, stage" without the empty ones."""
        return ", ".join(filter(None, (self.method, self.variant, self.stage)))


class Experiment(Strict):
    """Methods side by side on one net and data set, from the same dense start.

    `start` trains the dense parent (None: start from random weights), with `pretrained` from
    torchvision's weights, and `recipe` trains everything after it. `validation` is a number of
    images; a "search" is scored on them. The seeds are `seeds` numbers from `first_seed` on.
    """

    name: str
    dataset: str
    model: str
    recipe: RunRecipe
    start: RunRecipe | None = None
    pretrained: bool = False
    precision: _Precision | None = None
    targets: tuple[float, ...]
    target_kind: TargetKind = "sparsity"
    first_seed: _Seed = 0
    seeds: _Count
    validation: _Count = 5000
    methods: tuple[Entry, ...]
    purpose: Literal["results", "ablation", "search"] = "results"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = [entry.label for entry in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError("two methods have the same name, variant and stage")
        for place, entry in enumerate(self.methods):
            if entry.stage == "combined" and not entry.after:
                raise ValueError(f"{entry.label!r} is combined after nothing")
            if entry.after and entry.after not in labels[:place]:
                raise ValueError(f"after {entry.after!r} is no entry before {entry.label!r}")
        return self

    def entry(self, label: str) -> Entry:
        """The entry of that label."""
        return next(entry for entry in self.methods if entry.label == label)


class Profile(Strict):
    """How the study runs at one size."""

    time: str
    precision: _Precision = "fp32"
    threads: _Count = 1
    experiments: tuple[Experiment, ...]


class Card(Strict):
    """A paper's card, `short` its name in tables; without a citation it has experiments only."""

    id: str
    notebook: str
    title: str
    short: str = ""
    authors: str = ""
    venue: str = ""
    year: int | None = None
    arxiv: str = ""
    claims: tuple[Claim, ...] = ()
    strongest: tuple[Strongest, ...] = ()
    published: tuple[_Published, ...] = ()
    ranks: tuple[_Ranks, ...] = ()
    unknown: tuple[_Unknown, ...] = ()
    profiles: dict[ProfileName, Profile]

    @property
    def is_paper(self) -> bool:
        """Whether the card is that of a publication."""
        return bool(self.arxiv)

    def published_at(self, *place: str | float | None) -> _Published | None:
        """The published number of a method, model, data set, target and kind of target."""
        for n in (n for n in self.published if n.target is not None):
            if (n.method, n.model, n.dataset, n.target, n.target_kind) == place:
                return n
        return None


def path_of(name: str) -> Path:
    """The file of the card `name`."""
    return Path(str(files(__name__)), f"{name}.toml")


def cards() -> tuple[Card, ...]:
    """All cards: the papers in the order of their notebooks, then the overview."""
    found = map(read_card, Path(str(files(__name__))).glob("[!.]*.toml"))
    return tuple(sorted(found, key=lambda card: (not card.is_paper, card.notebook)))


def card(name: str) -> Card:
    """The card of paper `name`; raises `InputError` for an unknown one."""
    found = {each.id: each for each in cards()}
    require_one_of("paper", name, found)
    return found[name]


def read_card(path: Path) -> Card:
    """Read and check the card at `path`; raises `InputError` naming the first wrong key."""
    state = path.stat()  # tables ask for a card row by row: it is parsed again if it has changed
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache
def _read(path: Path, _changed: int, _size: int) -> Card:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        with suppress(AttributeError, KeyError, TypeError):  # not a card's form: refused below
            values = written_out(values)
        # Strict validation takes a list for a tuple only from JSON.
        made = Card.model_validate_json(json.dumps(values))
        require(made.id == path.stem, "id", made.id, f"the name of the file, {path.stem!r}")
        return made
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"card {path.name}: {where}: {first['msg'].lower()}") from None
    except InputError as error:
        raise InputError(f"card {path.name}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"card = {path.name!r}: not valid TOML ({error})") from None
