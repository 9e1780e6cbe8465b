"""Dependency groups to look at: a numbered list, and a drawing."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from prunestudy.shrink.groups import CONSUMES, FOLLOWS, PRODUCES, Group, Member

_MARKS = {PRODUCES: ("o", "#0173b2"), FOLLOWS: ("s", "#949494"), CONSUMES: ("^", "#de8f05")}


def describe(groups: Sequence[Group]) -> str:
    """A numbered list of what would go together with a channel of each group, and why."""
    lines = []
    for number, group in enumerate(groups, 1):
        stays = "may all go" if group.skippable else "at least one stays"
        layers = f"{group.channels} channels in {len(group.members)} layers"
        lines.append(f"{number:3}. {group.name}: {layers}, {stays}")
        width = max(len(m.layer) for m in group.members)
        for m in group.members:
            why = _why(m, group.members[0])
            lines.append(f"     {m.layer:{width}}  ({m.kind}) {m.role}: {why}")
    return "\n".join(lines)


def draw(groups: Sequence[Group]) -> Figure:
    """One row a group, one column a layer in order of execution; a mark where they meet."""
    layers = sorted({(m.order, m.layer) for group in groups for m in group.members})
    column = {layer: x for x, (_, layer) in enumerate(layers)}
    size = (max(5.0, 2.5 + 0.22 * len(layers)), 1.6 + 0.28 * len(groups))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for y, group in enumerate(groups):
        places = [column[m.layer] for m in group.members]
        axes.plot([min(places), max(places)], [y, y], color="0.8", zorder=1)
        for role, (mark, colour) in _MARKS.items():
            x = [column[m.layer] for m in group.having(role)]
            label = role if y == 0 else None
            axes.scatter(x, [y] * len(x), 30, colour, marker=mark, zorder=2, label=label)
    axes.set_xticks(range(len(layers)), list(column), rotation=90, fontsize=7)
    names = [f"{g.name} ({g.channels})" for g in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set(xlabel="layer, in order of execution", ylabel="group (its channels)")
    axes.grid(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _why(member: Member, first: Member) -> str:
    each = len(member.indices[0])
    places = "outputs" if member.axis == "out" else "inputs"
    many = "" if each == 1 else f", {each} {places} each"
    if member.role == PRODUCES:
        return ("makes them" if member is first else f"meets those of {first.layer}") + many
    what = "one kernel each" if "Conv" in member.kind else "one value each"
    if member.role != FOLLOWS:
        how = "flatten" if member.kind == "Linear" else "grouped"
        what = "one input each" if each == 1 else f"{each} inputs each ({how})"
    begin = min(min(places) for places in member.indices)
    partly = each * len(member.indices) < member.size
    return what + (f", from {begin} of {member.size} on (concatenation)" if partly else "")
