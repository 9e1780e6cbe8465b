"""One card per paper: citation, claims, published numbers with their marks, experiments.

A card is a TOML file beside this one; every key is checked, an unknown one is refused. The
overview's card has no citation: it compares the papers and has runs of its own only.

What a card says once for several places is in `shorthand`.
"""

import json
import tomllib
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunestudy.errors import InputError, require_one_of
from prunestudy.papers.shorthand import written_out
from prunestudy.train import Recipe

# P: read in the paper, its poster, its abstract or its authors' code; S: quoted by another paper or
# project; N: a near method's number, read there; D: derived or checked numerically; O: our reading.
Mark = Literal["P", "S", "N", "D", "O"]
TargetKind = Literal["sparsity", "macs", "parameters", "rank", "energy"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Where(_Strict):
    """The only nets, data sets or targets that a rule is on; empty: all."""

    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    targets: tuple[float, ...] = ()


class Rule(_Strict):
    """A claim as a rule: the paired difference `method - against` of `metric` is >= `at_least`.

    It holds against each of `against`, for every net, data set and target of a profile where both
    have runs; `where` narrows that and `why` says for what reason. Sides are labels ("method" or
    "method, variant"); `metric` is a key of the records' metrics, which without `against` is
    compared itself. `at_least` may differ by data set, with one for all "other". Only targets of
    `target_kind` count, and with `within` only pairs where `method` removed as much as `against`,
    or at most that share less.
    """

    method: str
    against: tuple[str, ...] = ()
    metric: str = "metric"
    at_least: float | dict[str, float] = 0.0
    within: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_kind: TargetKind | None = None
    where: Where = Where()
    why: str = ""

    @model_validator(mode="after")
    def _narrowed_for_a_reason(self) -> Self:
        if (self.where == Where()) != (not self.why):
            raise ValueError("where and why come together")
        if isinstance(self.at_least, dict) and "other" not in self.at_least:
            raise ValueError("at_least by data set needs one for all other")
        return self

    def margin(self, dataset: str) -> float:
        """The least difference on `dataset`."""
        if isinstance(self.at_least, float):
            return self.at_least
        return self.at_least.get(dataset, self.at_least["other"])

    def covers(self, model: str, dataset: str, target: float | None, kind: str) -> bool:
        """Whether the rule is on this net, data set and target of `kind`."""
        where = self.where
        return (
            model in (where.models or (model,))
            and dataset in (where.datasets or (dataset,))
            and target in (where.targets or (target,))
            and kind == (self.target_kind or kind)
        )


class Claim(_Strict):
    """What the paper claims; tested by `tests`, or `not_testable` says why not."""

    id: str
    text: str
    mark: Mark
    place: str
    tests: tuple[Rule, ...] = ()
    not_testable: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.tests) == bool(self.not_testable):
            raise ValueError("a claim has either tests or a reason in not_testable")
        return self


class _Read(_Strict):
    text: str
    method: str
    model: str
    dataset: str
    mark: Mark
    source: str


class Published(_Read):
    """A published number: `dense` and `value` of `metric`, at the share `kept` of the weights.

    `target` names our setting it stands beside (share removed), `source` where it was read,
    `speed_up` the measured one of the whole net.
    """

    metric: Literal["top1", "top5", "psnr", "miou"]
    value: float
    speed_up: float | None = None
    dense: float | None = None
    kept: float | None = None
    nonzeros: int | None = None
    target: float | None = None
    target_kind: TargetKind = "sparsity"


class PublishedRanks(_Read):
    """Ranks of a net's layers: `ranks` of `full`, layer by layer, with the net's top-1 accuracy.

    `gpu`, `cpu` and `theory` are the speed-ups of these layers, where they were published.
    """

    layers: tuple[str, ...]
    full: tuple[int, ...]
    ranks: tuple[int, ...]
    top1: float | None = None
    gpu: tuple[float, ...] = ()
    cpu: tuple[float, ...] = ()
    theory: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        sizes = {len(self.layers), len(self.full), len(self.ranks)}
        sizes |= {len(column) for column in (self.gpu, self.cpu, self.theory) if column}
        if len(sizes) > 1:
            raise ValueError("layers, full, ranks and speed-ups differ in length")
        if not all(0 < rank <= full for rank, full in zip(self.ranks, self.full, strict=True)):
            raise ValueError("a rank is above the full one, or below 1")
        return self


class Unknown(_Strict):
    """What the paper does not say, how it is read here and where the reading is ablated."""

    text: str
    reading: str
    ablation: str = ""


class Entry(_Strict):
    """A method in an experiment; `variant` names a reading: settings other than its defaults.

    `stage`: "half" begins a combination, "combined" is put `after` another method, "fine-tuned"
    trains on after pruning; "" is an ordinary result. `after` is the label ("method, variant,
    stage", what is empty left out) of the entry whose run, of same seed and target (or
    `after_target`), is the parent. `seeds`, `targets`, `target_kind`, `lr`, `weight_decay` and
    `epochs` replace the experiment's; `fresh` starts from random weights with the epochs of the
    dense start added.
    """

    method: str
    variant: str = ""
    stage: Literal["", "half", "fine-tuned", "combined"] = ""
    params: dict[str, Any] = {}
    seeds: Annotated[int, Field(ge=1)] | None = None
    targets: tuple[float, ...] | None = None
    target_kind: TargetKind | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    epochs: Annotated[int, Field(ge=0)] | None = None
    fresh: bool = False
    after: str = ""
    after_target: float | None = None

    @property
    def label(self) -> str:
        """Name within the experiment."""
        return ", ".join(filter(None, (self.method, self.variant, self.stage)))


class Experiment(_Strict):
    """Methods side by side on one net and data set, all from the same dense start.

    `start` trains the dense parent (None: from random weights), with `pretrained` from
    torchvision's weights (0 epochs: they are the parent); `recipe` everything after it.
    `precision` replaces the profile's.
    `purpose` "search" looks at the validation split only.
    """

    name: str
    dataset: str
    model: str
    recipe: Recipe
    start: Recipe | None = None
    pretrained: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    targets: tuple[float, ...]
    target_kind: TargetKind = "sparsity"
    seeds: Annotated[int, Field(ge=1)]
    validation: Annotated[int, Field(ge=1)] = 5000
    methods: tuple[Entry, ...]
    purpose: Literal["results", "ablation", "search"] = "results"

    @model_validator(mode="after")
    def _distinct(self) -> Self:
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
        """The entry called `label`."""
        return next(entry for entry in self.methods if entry.label == label)


class Profile(_Strict):
    """How the study runs at one size."""

    time: str
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: Annotated[int, Field(ge=1)] = 1
    experiments: tuple[Experiment, ...]


class Card(_Strict):
    """A paper's card; `short` is its name in tables, the title where empty.

    Without authors, venue, year and arXiv number it is no paper's: it claims and publishes nothing.
    """

    id: str
    notebook: str
    title: str
    short: str = ""
    authors: str = ""
    venue: str = ""
    year: int | None = None
    arxiv: str = ""
    claims: tuple[Claim, ...] = ()
    published: tuple[Published, ...] = ()
    ranks: tuple[PublishedRanks, ...] = ()
    unknown: tuple[Unknown, ...] = ()
    profiles: dict[Literal["quick", "cpu", "cpu-long", "paper"], Profile]

    @property
    def is_paper(self) -> bool:
        """Whether the card is that of a publication."""
        return bool(self.arxiv)

    @model_validator(mode="after")
    def _cited_or_silent(self) -> Self:
        citation = {name: getattr(self, name) for name in ("authors", "venue", "year", "arxiv")}
        missing = [name for name, value in citation.items() if not value]
        if 0 < len(missing) < len(citation):
            raise ValueError(f"the citation lacks {', '.join(missing)}")
        if missing and (self.claims or self.published or self.ranks or self.unknown):
            raise ValueError("claims, published numbers and unknowns are a paper's: cite it")
        return self


PROFILES = ("quick", "cpu", "cpu-long", "paper")


def read_card(path: Path) -> Card:
    """Read and check the card at `path`; raises `InputError` naming a key that is wrong.

    Once, and again when its file changes: tables ask for it row by row.
    """
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache
def _read(path: Path, _changed: int, _size: int) -> Card:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        with suppress(AttributeError, KeyError, TypeError):  # of another form: refused below
            values = written_out(values)
        # Through JSON, where a list may stand for a tuple and strictness still holds.
        return Card.model_validate_json(json.dumps(values))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"card = {path.name!r}: not valid TOML ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "as a whole"
        raise InputError(f"card {path.name}: {where}: {first['msg'].lower()}") from None
    except InputError as error:
        raise InputError(f"card {path.name}: {error}") from None


def names() -> tuple[str, ...]:
    """Names of all cards, in their order."""
    return tuple(card.id for card in cards())


def cards() -> tuple[Card, ...]:
    """All cards: papers in the order of their notebooks, then what compares them."""
    found = map(read_card, Path(str(files(__name__))).glob("*.toml"))
    return tuple(sorted(found, key=lambda card: (not card.is_paper, card.notebook)))


def card(name: str) -> Card:
    """Return the card of paper `name`; raises `InputError` for an unknown one."""
    found = {each.id: each for each in cards()}
    require_one_of("paper", name, found)
    return found[name]
