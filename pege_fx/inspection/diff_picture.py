"""The picture of a diff: changed nodes with their neighbours, inputs above, in the colours of what happened to them."""

from pathlib import Path
from typing import Any

import networkx as nx

from pege_fx._utils.files import atomic_write, path_of
from pege_fx.errors import ModelError, OutputError
from pege_fx.inspection.changes import SIGNS

COLOURS = {"added": "#b7e4c7", "removed": "#f5b5b5", "replaced": "#ffd8a8", "changed": "#bcd7f5", "same": "#eeeeee"}
_ENDINGS = (".svg", ".png", ".pdf")
_MOST = 150
_COLUMNS = 6
_HALF = 0.2  # of a box, in rows


def draw_region(region: "nx.DiGraph[str]", path: str | Path) -> None:
    """Write a changed region (``pege_fx.inspection.diff.changed_region``) as SVG, PNG or PDF.

    Args:
        region: nodes with ``kind`` and ``label``.
        path: its ending says the format.

    Raises:
        OutputError: for another ending, or where nothing can be written.
        ModelError: if the region is too large to be read.
    """
    path = path_of(path, OutputError)
    if path.suffix not in _ENDINGS:
        raise OutputError(f"{path}: the ending {path.suffix!r} says no format; known: {', '.join(_ENDINGS)}.")
    if len(region) > _MOST:
        raise ModelError(f"{len(region)} nodes are too many for one picture: give match=, as in 'layer1_0_*'.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError("pictures need matplotlib: pip install 'pege_fx[examples]'.") from error
    places = _places(region)
    columns = max((x for x, _ in places.values()), default=0) + 1
    rows = max((y for _, y in places.values()), default=0) + 1
    figure = Figure(figsize=(2.6 * columns, 0.62 * rows + 0.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-0.6, columns - 0.4)
    axes.set_ylim(rows - 0.4, -0.9)
    axes.set_axis_off()
    _draw_edges(axes, region, places)
    for name, (x, y) in places.items():
        kind, label = region.nodes[name]["kind"], region.nodes[name]["label"]
        sign = f"{SIGNS[kind]} " if kind in SIGNS else ""
        short = label if len(label) < 30 else f"…{label[-28:]}"
        box = {"boxstyle": "round,pad=0.35", "facecolor": COLOURS[kind], "edgecolor": "#555555"}
        axes.text(x, y, f"{sign}{short}", ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    legend = "    ".join(f"{sign} {kind}" for kind, sign in SIGNS.items())
    axes.text(-0.5, -0.75, legend, fontsize=8, color="#555555")
    with atomic_write(path, OutputError) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def _draw_edges(axes: Any, region: "nx.DiGraph[str]", places: dict[str, tuple[float, float]]) -> None:
    for source, target in region.edges:
        is_gone = "removed" in (region.nodes[source]["kind"], region.nodes[target]["kind"])
        style = {"arrowstyle": "-|>", "color": "#c05050" if is_gone else "#777777", "shrinkA": 0, "shrinkB": 0}
        (x, y), (to_x, to_y) = places[source], places[target]
        if to_y - y > 1 and x == to_x:  # around what is in between
            style["connectionstyle"] = "arc3,rad=-0.3"
        axes.annotate("", (to_x, to_y - _HALF), (x, y + _HALF), arrowprops=style, zorder=1)


def _places(region: "nx.DiGraph[str]") -> dict[str, tuple[float, float]]:
    """Parts that no edge joins stand side by side; what gets wider than ``_COLUMNS`` goes on below."""
    places: dict[str, tuple[float, float]] = {}
    left = top = tallest = 0.0
    for names in nx.weakly_connected_components(region):
        part: nx.DiGraph[str] = nx.DiGraph()
        part.add_nodes_from(name for name in region if name in names)
        part.add_edges_from(edge for edge in region.edges if edge[0] in names)
        inside = _places_of_part(part)
        width, height = (max(place[axis] for place in inside.values()) + 1 for axis in (0, 1))
        if left and left + width > _COLUMNS:
            left, top, tallest = 0.0, top + tallest, 0.0
        places |= {name: (x + left, y + top) for name, (x, y) in inside.items()}
        left, tallest = left + width, max(tallest, height)
    return places


def _places_of_part(region: "nx.DiGraph[str]") -> dict[str, tuple[float, float]]:
    """Rows by distance from the inputs, a node right above its first reader; columns so that edges are short."""
    depth: dict[str, int] = {}
    order = list(nx.topological_sort(region))
    for name in order:
        depth[name] = max((depth[source] + 1 for source in region.predecessors(name)), default=0)
    row = dict(depth)
    for name in reversed(order):
        row[name] = min((row[reader] - 1 for reader in region.successors(name)), default=depth[name])
    used = {number: place for place, number in enumerate(sorted(set(row.values())))}
    places: dict[str, tuple[float, float]] = {}
    taken: set[tuple[float, float]] = set()
    for name in sorted(region, key=lambda name: (row[name], -depth[name])):
        column = min((places[source][0] for source in region.predecessors(name)), default=0.0)
        while (column, used[row[name]]) in taken:
            column += 1
        places[name] = (column, used[row[name]])
        taken.add(places[name])
    return places
