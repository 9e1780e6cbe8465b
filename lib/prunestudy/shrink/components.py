"""Components, the named parts of a net, and the dependency groups seen with them.

A group whose layers all lie in one component is *internal* to it. One that spans several is a
*coupling* group: its channels are the interface (a latent vector), and removing one changes what
every component on it outputs or reads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from prunestudy.errors import InputError, require
from prunestudy.shrink.groups import Group
from prunestudy.shrink.proof import groups

INTERNAL, COUPLING = "internal", "coupling"
Components = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ComponentGroup:
    """A dependency group, the components that it touches in order of execution, and whether it
    is protected.
    """

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
    components: Components | None = None,
    protect: Collection[str] = (),
    found: Sequence[Group] | None = None,
) -> list[ComponentGroup]:
    """The dependency groups of `model` on inputs as `example`, with their components.

    `components` maps names to the modules of each; by default the model's own `components`, else
    its direct children. `protect` names groups, layers, components (their internal groups) or
    "coupling": those groups are never touched. `found` are the net's groups, if they are known.
    Raises `InputError` for a module or a name that is not there, for components that overlap, and
    for a layer outside all of them.
    """
    owners, made = _owners(model, components), []
    for group in groups(model, example) if found is None else found:
        touched = tuple(dict.fromkeys(_owner(owners, m.layer) for m in group.members))
        made.append(ComponentGroup(group, touched))
    known = set().union(*(each.names for each in made))
    for name in protect:
        require(name in known, "protect", name, f"protectable are {', '.join(sorted(known))}")
    return [replace(each, protected=not each.names.isdisjoint(protect)) for each in made]


def _owners(model: nn.Module, components: Components | None) -> dict[str, str]:
    """Component by module name; each module in one component."""
    if components is None:
        names = getattr(model, "components", None) or [name for name, _ in model.named_children()]
        components = {name: (name,) for name in names}
    modules, owners = dict(model.named_modules()), {}
    for component, parts in components.items():
        for part in (parts,) if isinstance(parts, str) else parts:
            allowed = f"a module of the model, as {', '.join(list(modules)[1:6])}"
            require(part in modules and part, f"component {component}", part, allowed)
            clash = next((o for o in owners if _inside(o, part) or _inside(part, o)), None)
            why = f"overlaps {clash} of component {owners.get(clash)}"
            require(clash is None, f"component {component}", part, why)
            owners[part] = component
    return owners


def _owner(owners: Mapping[str, str], layer: str) -> str:
    for part, component in owners.items():
        if _inside(layer, part):
            return component
    raise InputError(f"components = {sorted(set(owners.values()))}: layer {layer} is in none")


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")
