"""What a card claims, and what its claims are tested by."""

import json
import tomllib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunestudy.errors import InputError
from prunestudy.papers.shorthand import written_out

# P: the paper, its poster, abstract or the authors' code; S: quoted by another paper or project;
# N: the number of a similar method; D: derived or checked numerically; O: our reading.
Mark = Literal["P", "S", "N", "D", "O"]
TargetKind = Literal["sparsity", "macs", "parameters", "rank", "energy"]
PRIMARY = ("superiority", "non_inferiority")
ProfileName = Literal["quick", "cpu", "cpu-long", "gpu", "paper"]


class Strict(BaseModel):
    """A part of a card: no other keys, no other types, never changed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Rule(Strict):
    """What a claim is tested by: the paired difference `method - against` (labels) of `metric`.

    "superiority": it is above 0; "non_inferiority": above minus the data set's margin; of these a
    claim has one at most. "by_construction": algebra says so, and `why` names what shows it;
    "description": an interval, no verdict. A metric with "-" is better the lower. `against` is
    empty where the metric itself is compared with `at_least`, "strongest" for the one of the
    `controls` that the searches chose. `where` restricts the rule, for the reason `why`, as does
    `target_kind`; `within`: only where ours removed at most that share less than the other.
    """

    kind: Literal["superiority", "non_inferiority", "by_construction", "description"]
    method: str
    against: str = ""
    controls: tuple[str, ...] = ()
    metric: str = "metric"
    at_least: float = 0.0
    within: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_kind: TargetKind | None = None
    where: dict[Literal["models", "datasets", "targets"], tuple[str | float, ...]] = {}
    why: str = ""

    @property
    def primary(self) -> bool:
        """Whether it may end in a verdict."""
        return self.kind in PRIMARY

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.where or self.kind == "by_construction") != bool(self.why):
            raise ValueError("why belongs to where, and to what holds by construction")
        if bool(self.controls) != (self.against == "strongest"):
            raise ValueError("controls belong to against = 'strongest'")
        own = self.method.partition(",")[0]
        if own in {label.partition(",")[0] for label in self.controls}:
            raise ValueError("a reading of the method is no control")
        if self.at_least and self.against:
            raise ValueError("at_least is for the metric itself, without against")
        if self.kind == "non_inferiority" and (not self.against or self.metric != "metric"):
            raise ValueError("non_inferiority is of the metric, against something")
        return self


class Claim(Strict):
    """A claim of the paper, read at `place`: `tests`, or the reason why it is `not_testable`."""

    id: str
    text: str
    mark: Mark
    place: str
    tests: tuple[Rule, ...] = ()
    not_testable: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.tests) == bool(self.not_testable):
            raise ValueError("a claim has either tests or a reason in not_testable")
        if sum(rule.primary for rule in self.tests) > 1:
            raise ValueError("a claim has at most one test that ends in a verdict")
        return self


class Strongest(Strict):
    """The `control` with the best mean validation score over the seeds of the searches."""

    profile: ProfileName
    model: str
    dataset: str
    target_kind: TargetKind
    control: str


def rules_of(text: str, profile: str, model: str, dataset: str, searched: bool = True) -> str:
    """JSON of the tests by which the card `text` judges a net; "" if it is none.

    With the control that was `searched` for; a test against what the claim names does not have it.
    """
    usual = {name: field.default for name, field in Rule.model_fields.items()}
    try:
        values = written_out(tomllib.loads(text))
        tests = [
            {"claim": claim["id"]}
            | {key: v for key, v in rule.items() if key != "why" and v != usual.get(key)}
            for claim in values["claims"]
            for rule in claim["tests"]
            if rule.get("kind") in PRIMARY
        ]
        here = {"profile": profile, "model": model, "dataset": dataset}
        rows = values.get("strongest", []) if searched else []
        controls = [row for row in rows if here.items() <= row.items()]
        return json.dumps([sorted(tests, key=lambda t: t["claim"]), controls], sort_keys=True)
    except (tomllib.TOMLDecodeError, InputError, AttributeError, KeyError, TypeError):
        return ""
