"""Number of dimensions of a node's value where no example shows it: what the operation itself demands."""

from torch.fx import GraphModule, Node

from pege_fx.passes.graph import call_of, first_argument, rank_of, traits_of


def infer_ranks(gm: GraphModule) -> None:
    """Note the number of dimensions that an operation's own contract proves, where no example says it."""
    for node in gm.graph.nodes:
        if "rank" in node.meta:
            continue
        if (rank := _inferred(gm, node)) is not None:
            node.meta["rank"] = rank


def _inferred(gm: GraphModule, node: Node) -> int | None:
    traits = traits_of(gm, node)
    stated = traits.rank(call_of(gm, node)) if callable(traits.rank) else traits.rank
    return rank_of(first_argument(node)) if stated is None and traits.keeps_rank else stated
