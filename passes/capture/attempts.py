"""A second trace beside the first: whether the answers to questions, or what the first call left, change the graph."""

from torch.fx import Graph

from pege_fx.passes.capture.not_traceable import NotTraceableError
from pege_fx.passes.capture.tracer import PegeTracer


def ignores_modes(tracer: PegeTracer, graph: Graph, again: PegeTracer) -> bool:
    """Tell whether ``forward`` does the same whatever it is told of the modes that it asked for."""
    again.contradicts = True
    try:
        return str(again.follow(tracer.state.root)) == str(graph)
    except NotTraceableError:
        return False


def is_steady(tracer: PegeTracer, graph: Graph, again: PegeTracer) -> bool:
    """Tell whether ``forward``, from the attributes that it left, does and leaves the same: a flag or a counter tells."""
    with tracer.state.left():
        try:
            return str(again.follow(tracer.state.root)) == str(graph) and not again.state.changed
        except NotTraceableError:
            return False
