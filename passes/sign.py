"""Sign analysis: which values are proved to be never negative, so that no code is spent on a sign."""

from torch.fx import GraphModule, Node

from pege_fx.passes.graph import arguments, call_of, call_sites, first_argument, module_of, traits_of


def analyse_signs(gm: GraphModule) -> None:
    """Set ``meta["non_negative"]`` on every node whose value is proved to be >= 0, also through graphs inside this one."""
    proved: set[Node] = set()
    sites = call_sites(gm)
    for node in gm.graph.nodes:
        inner = module_of(gm, node, GraphModule)
        if inner is not None:
            known = _through(node, inner, proved) if sites[inner] == 1 else False
        else:
            known = node.meta.get("non_negative", False) or _is_non_negative(gm, node, proved)
        if known:
            proved.add(node)
            node.meta["non_negative"] = True


def _through(node: Node, inner: GraphModule, proved: set[Node]) -> bool:
    """Analyse a graph that is called once, with what is proved of its arguments."""
    args, kwargs = arguments(node)
    placeholders = inner.graph.find_nodes(op="placeholder")
    given = dict(zip([str(placeholder.target) for placeholder in placeholders], args, strict=False)) | kwargs
    for placeholder in placeholders:
        if given.get(str(placeholder.target)) in proved:
            placeholder.meta["non_negative"] = True
    analyse_signs(inner)
    (result,) = inner.graph.find_nodes(op="output")
    returned = first_argument(result)
    return isinstance(returned, Node) and returned.meta.get("non_negative", False)


def _is_non_negative(gm: GraphModule, node: Node, proved: set[Node]) -> bool:
    traits = traits_of(gm, node)
    if traits.keeps_sign and first_argument(node) in proved:
        return True
    return traits.non_negative(call_of(gm, node, proved)) if callable(traits.non_negative) else traits.non_negative
