"""Every format, layout and method from the policy to the deployed model: what is trained is what is deployed, bit for bit."""

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pege_fx
from pege_fx import Constant, PEGEScheduler, QuantPolicy, QuantSpec, Rule, testing
from pege_fx.errors import PegeError, PolicyError, SpecError
from pege_fx.modules.dynamic_methods import NVFP4
from pege_fx.numerics.formats import E2M1, E4M3

WEIGHTS = {
    "learned groups": QuantSpec(bits=4, granularity="g8"),
    "learned groups, padded": QuantSpec(bits=3, granularity="group-5-pad"),
    "learned blocks": QuantSpec(bits=4, granularity="block-4x8"),
    "groups, scales in bfloat16": QuantSpec(bits=4, granularity="g8", scale="bfloat16"),
    "min-max groups": QuantSpec(bits=4, granularity="g8", method="minmax"),
    "dynamic groups": QuantSpec(bits=4, granularity="g8", method="dynamic"),
    "asymmetric groups": QuantSpec(bits=4, signed=False, granularity="g8", method="dynamic-asymmetric"),
    "zero points learned": QuantSpec(bits=3, method="lsq+"),
    "e2m1 learned": QuantSpec(format="e2m1"),
    "e3m2 groups": QuantSpec(format="e3m2", granularity="g8", method="dynamic"),
    "mxfp4": QuantSpec(format="e2m1", method="mx"),
    "mxfp8": QuantSpec(format="e5m2", method="mx"),
    "nvfp4": QuantSpec(format="e2m1", method="nvfp4"),
    "nf4": QuantSpec(format="nf4", method="dynamic", granularity="g16"),
    "seq2": QuantSpec(format="seq2"),
    "ternary": QuantSpec(format="ternary", method="absmean"),
    "twn": QuantSpec(format="ternary", method="twn"),
    "binary": QuantSpec(format="binary", method="absmean", granularity="channel"),
    "levels": QuantSpec(format="levels(-2,-1,0,3)", granularity="g8"),
}
INPUTS = {
    "tokens": QuantSpec(bits=8, method="dynamic-asymmetric"),
    "symmetric tokens": QuantSpec(bits=6, method="dynamic"),
    "fp8": QuantSpec(format="e4m3", method="dynamic"),
    "mxfp4": QuantSpec(format="e2m1", method="mx"),
    "nvfp4": QuantSpec(format="e2m1", method="nvfp4"),
    "zero points learned": QuantSpec(bits=4, method="lsq+"),
    "e4m3 learned": QuantSpec(format="e4m3"),
    "float": None,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False), nn.SiLU(), nn.Linear(32, 8))


def batch(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def trained(weight: QuantSpec | None, given: QuantSpec | None, rate: float = 1.0) -> torch.fx.GraphModule:
    gm = pege_fx.prepare(network(), QuantPolicy((Rule(weight=weight, input=given),)), (batch(),), check=False)
    scheduler = PEGEScheduler(gm, 2, replacement=Constant(rate), weight_lambda=Constant(1e-3))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    gm(batch(2)).square().mean().backward()
    for name, parameter in gm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    optimizer.step()
    scheduler.step()
    return gm


@pytest.mark.parametrize("weight", WEIGHTS)
def test_convert_is_evaluation_for_every_format_of_weights(weight: str, tmp_path: Path) -> None:
    gm = trained(WEIGHTS[weight], INPUTS["tokens"])
    deployed, x = pege_fx.convert(gm), batch(3)
    with torch.no_grad():
        wanted = gm.eval()(x)
        assert torch.equal(deployed(x), wanted)
        pege_fx.save_deployed(deployed, tmp_path / "model.safetensors")
        again = pege_fx.load_deployed(tmp_path / "model.safetensors")
        assert torch.equal(again(x), wanted)


@pytest.mark.parametrize("given_", INPUTS)
def test_convert_is_evaluation_for_every_format_of_activations(given_: str) -> None:
    gm = trained(WEIGHTS["learned groups"], INPUTS[given_])
    deployed, x = pege_fx.convert(gm), batch(3)
    with torch.no_grad():
        assert torch.equal(deployed(x), gm.eval()(x))


@settings(max_examples=15)
@given(st.sampled_from([*WEIGHTS]), st.sampled_from([*INPUTS]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_training_fully_replaced_gives_the_levels_of_evaluation(weight: str, given_: str, dtype: torch.dtype) -> None:
    policy = QuantPolicy((Rule(weight=WEIGHTS[weight], input=INPUTS[given_]),))
    gm = pege_fx.prepare(network().to(dtype), policy, (batch().to(dtype),), check=False)
    for site in pege_fx.fake_quants(gm).values():
        if site.site.kind != "weight":
            continue
        x = gm.get_parameter(site.site.name.removesuffix("_fq"))
        with torch.no_grad():
            torch.testing.assert_close(
                site.train()(x), site.deployed(x), rtol=2**-6 if dtype is torch.bfloat16 else 1e-5, atol=1e-6
            )


@given(testing.networks(max_layers=4), testing.policies(every_format=True))
def test_on_random_networks_too(case: tuple[nn.Module, tuple[Tensor, ...]], policy: QuantPolicy) -> None:
    model, inputs = case
    try:
        gm = pege_fx.prepare(model, policy, inputs, check=False)
    except SpecError as error:  # groups need output channels on one axis
        assert "needs a weight with output channels on one axis" in str(error)  # noqa: PT017 (Hypothesis draws it sometimes)
        return
    sum(y.square().mean() for y in tree_leaves(gm(*inputs))).backward()
    assert all(bool(p.grad.isfinite().all()) for p in gm.parameters() if p.grad is not None)
    with torch.no_grad():
        found, wanted = tree_leaves(pege_fx.convert(gm)(*inputs)), tree_leaves(gm.eval()(*inputs))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("weight", ["learned groups, padded", "mxfp4", "nvfp4", "seq2", "learned blocks"])
def test_masks_replace_elements_at_the_rate_and_leave_the_others(weight: str) -> None:
    gm = pege_fx.prepare(network(), QuantPolicy((Rule(weight=WEIGHTS[weight]),)), (batch(),), check=False)
    PEGEScheduler(gm, 2, replacement=Constant(0.4))
    site = pege_fx.fake_quants(gm)["2.weight_fq"].train()
    w = gm.get_parameter("2.weight")
    with torch.no_grad():
        y, q = site(w), site.deployed(w)
    kept, replaced = y == w, (y - q).abs() <= 1e-6
    assert bool((kept | replaced).all())
    assert abs(float((~kept).float().mean()) - 0.4) < 0.06


@pytest.mark.parametrize(
    "text", ["8da4w-g32", "w4a16-g32", "mxfp4", "nvfp4", "fp8", "mxfp8", "ternary", "binary", "seq2", "nf4-g32", "int4-g16"]
)
def test_the_fields_names_are_policies_that_files_keep(text: str, tmp_path: Path) -> None:
    policy = QuantPolicy.parse(text)
    assert QuantPolicy.from_json(policy.to_json()) == policy
    policy.to_toml(tmp_path / "policy.toml")
    assert QuantPolicy.from_toml(tmp_path / "policy.toml") == policy
    gm = pege_fx.prepare(network(), policy, (batch(),), check=False).eval()
    assert len(pege_fx.fake_quants(gm)) >= 3
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(batch(4)), gm(batch(4)))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("int4-g32", QuantSpec(bits=4, signed=True, granularity="group-32", method="dynamic")),
        ("int8-token", QuantSpec(bits=8, signed=True, granularity="token", method="dynamic-asymmetric")),
        ("uint4-g128", QuantSpec(bits=4, signed=False, granularity="group-128", method="dynamic-asymmetric")),
        ("4-g32", QuantSpec(bits=4, granularity="group-32")),
        ("nvfp4", QuantSpec(format="e2m1", method="nvfp4", scale="e4m3")),
        ("mxfp8", QuantSpec(format="e4m3", method="mx", scale="e8m0")),
        ("nf4", QuantSpec(format="nf4", granularity="group-64", method="dynamic")),
        ("e2m1-g16", QuantSpec(format="e2m1", granularity="group-16", method="dynamic")),
    ],
)
def test_a_rule_takes_the_same_words_for_one_edge(name: str, spec: QuantSpec) -> None:
    assert Rule(weight=name if "token" not in name else "4", input=name if "token" in name else None) == Rule(
        weight=spec if "token" not in name else "4", input=spec if "token" in name else None
    )


@pytest.mark.parametrize("text", ["8da4w-g32", "mxfp4", "4-g8"])
def test_what_is_recomputed_has_the_same_gradients_and_keeps_less(text: str) -> None:
    policy = QuantPolicy((Rule(weight=text),)) if text == "4-g8" else QuantPolicy.parse(text)
    found = []
    for recompute in (False, True):
        rules = (*policy.rules, Rule(function="linear", recompute=recompute))
        gm = pege_fx.prepare(network(), QuantPolicy(rules), (batch(),), check=False)
        PEGEScheduler(gm, 2, replacement=Constant(0.5), weight_lambda=Constant(0.1))
        kept: dict[int, int] = {}

        def keep(value: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = gm(batch(2)).square().sum()
        loss.backward()
        found.append(({name: p.grad for name, p in gm.named_parameters()}, sum(kept.values())))
    (plain, more), (again, less) = found
    assert all(torch.equal(plain[name], again[name]) for name in plain)  # type: ignore[arg-type]
    assert less < 0.8 * more


@pytest.mark.parametrize("text", ["8da4w-g32", "mxfp4"])
def test_it_is_one_graph_for_the_compiler_with_the_same_gradients(text: str) -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(32, 32), nn.GELU()), text, (batch(),), check=False)
    PEGEScheduler(gm, 2, replacement=Constant(0.5), weight_lambda=Constant(0.1))
    gradients = []
    for model in (gm, torch.compile(gm, fullgraph=True)):
        gm.zero_grad()
        model(batch(2)).square().sum().backward()
        gradients.append(gm.get_parameter("0.weight").grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_rules_without_a_function_do_not_say_what_lies_along_a_convolutions_last_dimension() -> None:
    convolution = nn.Sequential(nn.Conv2d(8, 8, 3))
    x = torch.randn(1, 8, 5, 5)
    with pytest.raises(PolicyError, match="features of conv2d are along axis 1"):
        pege_fx.explain(convolution, QuantPolicy((Rule(weight="4", input="int8-token"),)), (x,))
    with pytest.raises(SpecError, match=r"0.weight: groups of 5 do not divide its 72 inputs"):
        pege_fx.explain(convolution, QuantPolicy((Rule(weight="4-g5"),)), (x,))
    gm = pege_fx.prepare(convolution, QuantPolicy((Rule(weight="4-g8"),)), (x,), check=False).eval()
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4, "granularity": "token"},
        {"format": "e2m1", "method": "dorefa"},
        {"format": "e2m1", "method": "interval"},
        {"bits": 4, "granularity": "g8", "method": "interval"},
        {"bits": 4, "granularity": "g8", "method": "pact"},
        {"format": "nf4", "method": "mx"},
        {"bits": 4, "method": "nvfp4"},
        {"format": "e2m1", "bits": 5},
        {"format": "e2m1", "signed": False},
        {"bits": 4, "scale": "e8m0"},
        {"bits": 4, "scale": "float8"},
        {"format": "e2m1", "method": "mx", "granularity": "channel"},
        {"bits": 4, "method": "twn"},
    ],
)
def test_fields_that_do_not_go_together_are_refused_when_they_are_given(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        QuantSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["int8-token", "mxfp4", "nvfp4", "fp8"])
def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_tile_alone(name: str) -> None:
    gm = pege_fx.prepare(nn.Sequential(nn.Linear(32, 4)), QuantPolicy((Rule(input=name),)), (batch(),), check=False).eval()
    (site,) = pege_fx.fake_quants(gm).values()
    with torch.no_grad():
        assert torch.equal(site(torch.zeros(3, 32)), torch.zeros(3, 32))
        x = torch.ones(2, 32)
        x[0, 3] = torch.nan
        y = site(x)
    assert bool(y[0].isnan().any())
    assert name == "nvfp4" or bool(y[1].isfinite().all())  # NVFP4 has a scale of the whole tensor


def test_the_scales_of_nvfp4_are_numbers_of_e4m3_times_one_of_the_tensor() -> None:
    rows = torch.randn(50, 16) * torch.exp2(torch.randint(-9, 9, (50, 1)).float())
    of_row, of_tensor = NVFP4.parts(rows, E2M1)
    assert set(of_row.tolist()) <= set(E4M3.levels)
    assert float(of_tensor) == float(rows.abs().max() / torch.tensor(448.0 * 6.0))


def test_a_state_and_a_pickle_go_through_every_format() -> None:
    for weight, given_ in (("learned groups", "zero points learned"), ("mxfp4", "tokens"), ("levels", "fp8")):
        gm, x = trained(WEIGHTS[weight], INPUTS[given_]), batch(5)
        with torch.no_grad():
            wanted = gm.eval()(x)
            kept = io.BytesIO()
            torch.save(gm, kept)
            kept.seek(0)
            assert torch.equal(torch.load(kept, weights_only=False).eval()(x), wanted)
            other = pege_fx.prepare(network(), gm_policy(gm), (batch(),), check=False)
            other.load_state_dict(gm.state_dict())
            assert torch.equal(other.eval()(x), wanted)


def gm_policy(gm: torch.fx.GraphModule) -> QuantPolicy:
    return pege_fx.plan_of(gm).policy


@pytest.mark.parametrize("name", ["4-g5-pad", "4-b4x8", "mxfp4", "seq2", "nvfp4"])
def test_onnx_refuses_by_name_what_it_does_not_write(name: str, tmp_path: Path) -> None:
    deployed = pege_fx.convert(trained(Rule(weight=name).weight, None))  # type: ignore[arg-type]
    with pytest.raises(PegeError, match=r"(?s)_0_weight.*(group-|block-|seq2|e2m1)"):
        pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (batch(),))
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", ["4-g8", "8-g16", "int4-g8", "uint4-g16"])
def test_groups_of_a_matrix_are_written_as_blocks_and_give_the_same_answers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    deployed = pege_fx.convert(trained(Rule(weight=name).weight, QuantSpec(bits=8)))  # type: ignore[arg-type]
    pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (batch(),))
    report = pege_fx.verify_export(deployed, tmp_path / "model.onnx", [batch(4), batch(5)])
    assert report.ok, report


def test_a_method_of_ones_own_that_is_called_step_still_works() -> None:
    with pytest.warns(DeprecationWarning, match=r"Old.step\(\) is called qparams\(x\) now"):

        class Old(pege_fx.ForwardMethod, name="old-step-test"):
            def initialize(self, statistics: pege_fx.Statistics) -> None:
                pass

            def step(self) -> tuple[Tensor, None]:
                return torch.tensor(0.25), None

    gm = pege_fx.prepare(
        network(), QuantPolicy((Rule(weight=QuantSpec(bits=4, method="old-step-test")),)), (batch(),), check=False
    )
    assert float(pege_fx.fake_quants(gm)["0.weight_fq"].method.grid_of().scale) == 0.25
