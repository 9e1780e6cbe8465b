"""Components, the named parts of a net, and the dependency groups seen with them.

A group whose layers all lie in one component is *internal* to it. One that spans several is a
*coupling* group: its channels are the interface (a latent vector), and removing one changes what
every component on it outputs or reads.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from prunestudy.errors import InputError, require
from prunestudy.shrink.groups import Group
from prunestudy.shrink.proof import groups

INTERNAL, COUPLING = "internal", "coupling"


@dataclass(frozen=True)
class ComponentGroup:
    """A dependency group, the components that it touches in order, and whether it is protected."""

    group: Group
    components: tuple[str, ...]
    protected: bool = False

    @property
    def name(self) -> str:
        """The dependency group's name."""
        return self.group.name

    @property
    def kind(self) -> str:
        """ "internal" to one component, or "coupling" several."""
        return INTERNAL if len(self.components) == 1 else COUPLING

    @property
    def place(self) -> str:
        """The component, or the flow between components: "encoder > decoder"."""
        return " > ".join(self.components)

    @property
    def names(self) -> set[str]:
        """What it may be protected by."""
        layers = {m.layer for m in self.group.members}
        return layers | {self.name, self.place if self.kind == INTERNAL else COUPLING}


def component_groups(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    protect: Collection[str] = (),
    found: Sequence[Group] | None = None,
) -> list[ComponentGroup]:
    """The dependency groups of `model` on inputs as `example`, with their components.

    Components are the modules that the model's own `components` names, else its direct children.
    `protect` names groups, layers, components (their internal groups) or "coupling": those groups
    are never touched. `found` are the net's groups, if they are known. Raises `InputError` for a
    name that is not there, and for a layer outside all components.
    """
    names = getattr(model, "components", None) or [name for name, _ in model.named_children()]
    listed = isinstance(names, Iterable) and not isinstance(names, str)
    require(listed, "components", names, "a list of names of modules")
    modules, made = dict(model.named_modules()), []
    for name in names:
        known = isinstance(name, str) and name in modules
        require(
            known, "components", name, f"allowed are modules, as {', '.join(list(modules)[1:6])}"
        )
    for group in groups(model, example) if found is None else found:
        touched = dict.fromkeys(_component(names, m.layer) for m in group.members)
        made.append(ComponentGroup(group, tuple(touched)))
    known = set().union(*(each.names for each in made))
    for name in protect:
        require(name in known, "protect", name, f"protectable are {', '.join(sorted(known))}")
    return [replace(each, protected=not each.names.isdisjoint(protect)) for each in made]


def _component(names: Collection[str], layer: str) -> str:
    for name in names:
        if layer == name or layer.startswith(f"{name}."):
            return name
    raise InputError(f"components = {sorted(names)}: layer {layer} is in none")
