"""Insertion: exactly the plan's nodes, and without them the graph from before."""

import copy
import pickle
import warnings
from collections.abc import Callable

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule
from pege_fx.modules.fake_quant import FakeQuant, Site
from pege_fx.passes import CaptureModel, Program, complete_plan
from pege_fx.testing import Network, assert_same_function, networks, policies

ZERO = Constant(0.0)
PLAIN = {
    "conv", "conv without bias", "grouped", "depthwise", "transposed", "transposed grouped", "norm", "norm without affine",
    "relu", "sigmoid", "max pool", "mean pool",
}  # fmt: skip


def before_and_after(model: nn.Module, policy: QuantPolicy) -> tuple[GraphModule, GraphModule]:
    passes = pege_fx.prepare_passes(policy)
    graphs = []
    for last in (6, 8):
        program = Program(model=model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphs.append(pege_fx.passes.run(program, [CaptureModel(), *passes[:last], complete_plan]).root)
    return graphs[0], graphs[1]


def as_networkx(gm: GraphModule, contract: bool) -> nx.DiGraph:
    """Nodes by operation; with ``contract``, fake-quants (and the weight folds they take over) become edges."""
    graph = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_node(node.name, what=(node.op, str(node.target)))
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    for node in gm.graph.nodes:
        module = gm.get_submodule(node.target) if node.op == "call_module" else None
        spare = isinstance(module, FakeQuant) or type(module).__name__ == "WeightFold"
        if contract and spare:
            (source,) = graph.predecessors(node.name)
            graph.add_edges_from((source, reader) for reader in list(graph.successors(node.name)))
            graph.remove_node(node.name)
    return graph


@given(networks(), policies())
def test_contracting_the_fake_quants_gives_back_the_graph(
    case: tuple[Network, tuple[Tensor, ...]], policy: QuantPolicy
) -> None:
    before, after = before_and_after(case[0], policy)
    same = nx.is_isomorphic(as_networkx(before, True), as_networkx(after, True), node_match=lambda a, b: a == b)
    assert same
    plan = after.meta["plan"]
    placed = [m for m in after.modules() if isinstance(m, FakeQuant)]
    edges = {
        (op.path if edge.operand == "weight" else edge.source, edge.spec, edge.operand == "weight")
        for op, edge, _ in plan.quantized
    }
    weights = {(edge.source, edge.spec) for _, edge, _ in plan.quantized if edge.operand == "weight"}
    inputs = {(edge.source, edge.spec) for _, edge, _ in plan.quantized if edge.operand != "weight"}
    assert len(placed) == len(weights) + len(inputs) <= len(edges)


@given(networks(), policies())
@pytest.mark.filterwarnings("ignore:nothing is quantized")
def test_at_p_0_the_function_is_kept_bit_for_bit(case: tuple[Network, tuple[Tensor, ...]], policy: QuantPolicy) -> None:
    network, inputs = case
    default = QuantPolicy(tuple(Rule(role=r.role, weight=_bits(r.weight), input=_bits(r.input)) for r in policy.rules))
    gm = pege_fx.prepare(network, default, inputs)
    PEGEScheduler(gm, 1, ZERO, ZERO, ZERO)
    # torch's attention is written out: other kernels, other rounding
    assert_same_function(network, gm, inputs, tolerance=None if network.contains("attention") else 0)


def _bits(setting: object) -> str | None:
    return None if setting is None else str(setting.bits)  # type: ignore[attr-defined]


@given(networks(), policies())
@pytest.mark.filterwarnings("ignore:nothing is quantized")
def test_evaluation_deploys_copies_and_pickles_bit_for_bit(
    case: tuple[Network, tuple[Tensor, ...]], policy: QuantPolicy
) -> None:
    network, inputs = case
    state = copy.deepcopy(network.state_dict())
    gm = pege_fx.prepare(network, policy, inputs)
    gm(*inputs).sum().backward()
    gm.eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        for other in (deployed, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), pickle.loads(pickle.dumps(deployed))):
            assert_same_function(gm, other, inputs, tolerance=0)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert set(state) <= set(gm.state_dict())
    assert network.training


@given(networks(max_layers=4, dims=[2], inputs=[1]))
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_at_p_1_it_is_plain_torch_on_values_of_the_grid(case: tuple[Network, tuple[Tensor, ...]]) -> None:
    """An independent reference: the original's own modules, with weights and inputs rounded by hooks."""
    network, inputs = case
    assume(PLAIN.issuperset(map(str, network.layers)))  # a hook sees what a module is called with, once, without chance
    gm = pege_fx.prepare(network, QuantPolicy.parse("W4A4", first="4", last="4"), inputs)
    reference = copy.deepcopy(network)
    grids = pege_fx.fake_quants(gm)
    sources = {op.path: edge.source for op in gm.meta["plan"].operations for edge in op.edges if edge.operand == "input"}
    by_name = {node.name: node for node in gm.graph.nodes}

    def rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return torch.clamp(torch.round(x / scale), low, high) * scale

    signs = {fq.site.name.removesuffix(".weight_fq"): fq.fold.sign() if fq.fold else None for fq in grids.values()}
    for path, module in reference.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            continue
        fq = grids[f"{path}.weight_fq"]
        rows = fq.method.channels.rows(module.weight.data)
        sign = torch.ones(len(rows)) if signs[path] is None else signs[path]
        step = fq.method.scale.detach().abs()[:, None]
        values = rounded(rows * sign[:, None], step, -8, 7) * sign[:, None]
        flat = fq.method.channels.rows(torch.arange(module.weight.numel()).view(module.weight.shape).float()).long()
        module.weight.data.view(-1)[flat.reshape(-1)] = values.reshape(-1)
        name = by_name[f"{sources[path]}_fq"].target
        act = grids[name]

        def hook(_: nn.Module, args: tuple[Tensor], act: FakeQuant = act) -> tuple[Tensor]:
            return (rounded(args[0], act.method.scale.detach().abs(), *act.site.spec.bounds),)

        module.register_forward_pre_hook(hook)
    torch.testing.assert_close(gm(*inputs), reference(*inputs), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """An embedding and a head that share their weight; the head is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        out: Tensor = self.head(x) + self.head(torch.relu(x))
        return out


def test_a_shared_weight_has_one_fake_quant_and_a_shared_producer_too() -> None:
    gm = pege_fx.prepare(Tied(), QuantPolicy((Rule(weight="4", input="4"),)))
    names = [name for name, fq in pege_fx.fake_quants(gm).items() if fq.site.kind == "weight"]
    assert names == ["embedding.weight_fq"]
    assert len(gm.graph.find_nodes(op="call_module", target="embedding.weight_fq")) == 1


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x) + self.c(x)
        return out


def activations(*exceptions: Rule) -> dict[str, Site]:
    gm = pege_fx.prepare(Fork(), QuantPolicy((Rule(weight="4", input="4"), *exceptions)))
    return {name: fq.site for name, fq in pege_fx.fake_quants(gm).items() if fq.site.kind == "activation"}


def test_one_fake_quant_for_each_producer_and_format() -> None:
    assert {name: site.spec.bits for name, site in activations(Rule(match="c", input="8")).items()} == {"x_fq": 4, "x_fq_1": 8}


def test_a_format_is_more_than_its_bits() -> None:
    found = activations(Rule(match="c", input=QuantSpec(bits=4, estimator="ste")))
    assert {name: site.spec.estimator for name, site in found.items()} == {"x_fq": "pege", "x_fq_1": "ste"}


def test_what_has_schedules_of_its_own_has_a_fake_quant_of_its_own() -> None:
    found = activations(Rule(match="b", schedule="slow"))
    assert {name: site.group for name, site in found.items()} == {"x_fq": "default", "x_fq_1": "slow"}


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x)


def test_the_first_of_the_inputs_on_one_scale_sees_the_others_once() -> None:
    gm = pege_fx.prepare(Sum(), QuantPolicy((Rule(function="add", input="4", shared_scale=True),)))
    calls = gm.graph.find_nodes(op="call_module", target="add_inputs_fq")
    assert [[str(value) for value in node.args] for node in calls] == [["x", "0", "relu"], ["relu", "1"]]
    assert [node.all_input_nodes for node in gm.graph.nodes if node.name == "add"] == [calls]


@pytest.mark.parametrize("recompute", [True, False])
def test_a_fake_quant_knows_whether_its_result_is_made_again(recompute: bool) -> None:
    gm = pege_fx.prepare(nn.Linear(4, 4), QuantPolicy((Rule(weight="4", input="4", recompute=recompute),)))
    assert [fq.recompute for fq in pege_fx.fake_quants(gm).values()] == [recompute, recompute]


def test_an_output_rule_quantizes_the_result_and_an_in_place_reader_leaves_it_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    gm = pege_fx.prepare(model, QuantPolicy((Rule(match="0", output="4"),)), (torch.randn(3, 4),))
    gm(torch.randn(3, 4)).sum().backward()
    assert list(pege_fx.fake_quants(gm)) == ["_0_fq"]


def test_the_result_of_a_layer_is_that_of_the_norm_that_it_takes_over() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    gm = pege_fx.prepare(model, QuantPolicy((Rule(output="4"),)), (torch.randn(3, 2, 4, 4),))
    (placed,) = [node for node in gm.graph.nodes if node.name.endswith("_fq")]
    assert [node.name for node in placed.all_input_nodes] == ["_1"]


def test_names_say_what_they_quantize() -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4")
    assert [node.name for node in gm.graph.nodes if "_fq" in node.name] == [
        "_0_weight_fq",
        "input_1_fq",
        "_2_weight_fq",
        "_1_fq",
    ]


def test_verify_catches_a_pass_that_removes_a_fake_quant() -> None:
    def remove_one(gm: GraphModule) -> None:
        (node,) = [n for n in gm.graph.nodes if n.name == "_1_fq"]
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)

    passes = pege_fx.prepare_passes("W4A4")
    passes.insert(-1, remove_one)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(pege_fx.VerifyError, match="2: input should read a fake-quant of 8"):
        pege_fx.prepare(model, "W4A4", passes=passes)


class Turned(nn.Module):
    """A product with a parameter that is transposed on the way."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


TURNED: dict[str, tuple[tuple[int, ...], int | None, Callable[[Tensor, Tensor], Tensor]]] = {
    "t": ((5, 4), 0, lambda x, w: x @ w.t()),
    "T": ((5, 4), 0, lambda x, w: x @ w.T),
    "twice": ((4, 5), 1, lambda x, w: x @ w.T.mT),
    "transpose": ((5, 4), 0, lambda x, w: torch.matmul(x, torch.transpose(w, 0, 1))),
    "linear": ((4, 5), 1, lambda x, w: F.linear(x, w.transpose(-1, -2))),
    "left": ((3, 6), 1, lambda x, w: w.T @ x),
    "experts": ((3, 5, 4), None, lambda x, w: torch.matmul(x, w.transpose(1, 2))),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_weight_that_is_transposed_on_the_way_is_a_weight(name: str) -> None:
    shape, axis, function = TURNED[name]
    model, x = Turned(shape, function), torch.randn(3, 4)
    gm = pege_fx.prepare(model, QuantPolicy((Rule(weight="4", input="8"),)), (x,))
    (operation,) = gm.meta["plan"].operations
    assert operation.format == "W4A8"
    fq = pege_fx.fake_quants(gm)["weight_fq"]
    dims = [] if axis is None else [dim for dim in range(len(shape)) if dim != axis]
    mean = model.weight.detach().abs().mean(dims) if dims else model.weight.detach().abs().mean().reshape(1)
    torch.testing.assert_close(fq.method.scale.detach(), 2 * mean / 7**0.5)
    gm(x).sum().backward()
    gm.eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        assert torch.equal(deployed(x), gm(x))
    assert not [*deployed.parameters()]
    assert pege_fx.size_report(gm) == pege_fx.size_report(deployed)
    PEGEScheduler(gm.train(), 1, ZERO, ZERO, ZERO)
    # matmul makes one product of a batch of them where the other operand has a gradient, as what was quantized has
    assert_same_function(model, gm, (x.requires_grad_(),), tolerance=0)


@pytest.mark.parametrize("turned", [True, False])
def test_experts_of_a_grouped_product_have_a_scale_each(turned: bool) -> None:
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w.transpose(-2, -1) if turned else w, offs=offsets)

    model, x = Turned((3, 8, 16) if turned else (3, 16, 8), function), torch.randn(6, 16)
    gm = pege_fx.prepare(model, QuantPolicy((Rule(weight="4", input="8"),)), (x,))
    (operation,) = gm.meta["plan"].operations
    assert (operation.function, operation.format, operation.macs) == ("grouped_mm", "W4A8", 6 * 16 * 8)
    assert pege_fx.fake_quants(gm)["weight_fq"].method.scale.shape == (3,)
    gm(x).square().sum().backward()
    gm.eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        for other in (deployed, pickle.loads(pickle.dumps(gm)), pickle.loads(pickle.dumps(deployed))):
            assert torch.equal(other(x), gm(x))
    PEGEScheduler(gm.train(), 1, ZERO, ZERO, ZERO)
    assert_same_function(model, gm, (x,), tolerance=0)


def test_a_fake_quant_is_made_where_its_model_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).to("meta")
    gm = pege_fx.prepare(model, "W4A4", (torch.empty(2, 3, 6, 6, device="meta"),))
    assert all(value.is_meta for value in [*gm.parameters(), *gm.buffers()])


def test_the_seed_is_nought_unless_it_is_given() -> None:
    assert pege_fx.passes.InsertFakeQuants() == pege_fx.passes.InsertFakeQuants(0)
    with pytest.raises(AttributeError):
        pege_fx.passes.InsertFakeQuants().seed = 3  # type: ignore[misc]
