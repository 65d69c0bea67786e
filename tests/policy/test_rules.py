"""Policies: the cascade, what a rule selects, the short form, files, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import PegeError, PolicyError, QuantPolicy, QuantSpec, Rule, SpecError
from pege_fx.policy.rules import EDGES, ROLES, UNSET, Op, class_names

# --- strategies --------------------------------------------------------------------------------------------------

PATHS = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer2.0.conv1", "head.fc"]
FUNCTIONS = ["conv2d", "linear", "matmul"]
CLASSES = ["Conv2d", "torch.nn.modules.conv.Conv2d", "Linear", "Block"]
PATTERNS = ["*", "layer1.*", "*.conv1", "conv?", "head.fc", "[hl]*", "re:layer[12].*", r"re:.*\.conv\d", "re:head|conv1"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def specs(draw: st.DrawFn, granularities: tuple[str | None, ...] = (None, "tensor")) -> QuantSpec:
    signed = draw(st.sampled_from([None, True, False]))
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        signed=signed,
        granularity=draw(st.sampled_from(granularities)),  # type: ignore[arg-type]
        narrow=signed is not False and draw(st.booleans()),
        method=draw(st.sampled_from(["lsq", "pact", "dorefa", "interval", "minmax"])),
        estimator=draw(st.sampled_from(["pege", "ste", "ewgs", "pege-relative", "pege-share"])),
    )


def settings_of(edge: str) -> st.SearchStrategy[Any]:
    spec = specs((None, "tensor", "channel") if edge == "weight" else (None, "tensor"))
    short = st.sampled_from([None, "float", "4", " 8 ", 2])
    return st.one_of(st.just(UNSET), short, spec)


@st.composite
def rules(draw: st.DrawFn, match: st.SearchStrategy[str | None] | None = None) -> Rule:
    fields: dict[str, Any] = {edge: draw(settings_of(edge)) for edge in EDGES}
    fields["schedule"] = draw(st.one_of(st.just(UNSET), texts.filter(bool)))
    fields["shared_scale"] = draw(st.sampled_from([UNSET, False, *([] if fields["input"] in (None, "float") else [True])]))
    fields["recompute"] = draw(st.sampled_from([UNSET, False, True]))
    if all(value is UNSET for value in fields.values()):
        fields["weight"] = None
    anything = st.none() | st.sampled_from(PATTERNS) | texts.filter(lambda text: not text.startswith("re:"))
    return Rule(
        match=draw(anything if match is None else match),
        module=draw(st.none() | st.sampled_from([nn.Conv2d, nn.Linear, *CLASSES])),
        function=draw(st.none() | st.sampled_from([F.relu, torch.matmul, *FUNCTIONS])),
        role=draw(st.none() | st.sampled_from(ROLES)),
        **fields,
    )


policies = st.lists(rules(), max_size=4).map(lambda found: QuantPolicy(tuple(found)))

ops = st.builds(
    Op,
    path=st.sampled_from(PATHS),
    function=st.sampled_from(FUNCTIONS),
    classes=st.frozensets(st.sampled_from(CLASSES)),
    roles=st.frozensets(st.sampled_from(ROLES)),
    on_request=st.booleans(),
)

# --- the cascade -------------------------------------------------------------------------------------------------


@given(st.lists(rules(st.none() | st.sampled_from(PATTERNS)), max_size=5), ops)
def test_the_last_rule_that_selects_and_sets_a_field_wins(found: list[Rule], op: Op) -> None:
    choice = QuantPolicy(tuple(found)).choose(op)
    for edge in EDGES:
        setters = [(i, rule) for i, rule in enumerate(found) if rule.selects(op) and getattr(rule, edge) is not UNSET]
        if setters:
            number, winner = setters[-1]
            assert choice.specs[edge] == getattr(winner, edge)
            assert choice.rules[edge] == f"rule {number}: {winner!r}"
        else:
            assert choice.specs[edge] is None
            assert choice.rules[edge] == "no rule sets it"
    again = [rule.recompute for rule in found if rule.selects(op) and rule.recompute is not UNSET]
    assert choice.recompute == (again[-1] if again else False)
    groups = [rule.schedule for rule in found if rule.selects(op) and rule.schedule is not UNSET]
    assert choice.schedule == (groups[-1] if groups else "default")
    asking = [(i, rule) for i, rule in enumerate(found) if rule.selects(op) and rule.shared_scale is not UNSET]
    assert choice.shared_scale == (f"rule {asking[-1][0]}: {asking[-1][1]!r}" if asking and asking[-1][1].shared_scale else "")


def test_fields_cascade_one_by_one() -> None:
    policy = QuantPolicy(
        (
            Rule(weight="4", input="4"),
            Rule(match="layer1.*", weight="2"),
            Rule(role="first", weight="8", input="8"),
            Rule(match="fc", weight=None, input="float"),
        )
    )

    def bits(path: str, *roles: str) -> tuple[int | None, int | None]:
        found = policy.choose(Op(path, "conv2d", roles=frozenset(roles))).specs
        weight, x = found["weight"], found["input"]
        return (None if weight is None else weight.bits, None if x is None else x.bits)

    assert bits("layer2.conv") == (4, 4)
    assert bits("layer1.conv") == (2, 4)
    assert bits("layer1.conv", "first") == (8, 8)
    assert bits("fc") == (None, None)


# --- selection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "selected"),
    [
        ("layer1.*", "layer1.0.conv1", True),  # a star crosses dots
        ("layer1.*", "layer10.conv", False),
        ("layer1", "layer1.conv", False),  # the whole path
        ("*.conv?", "layer1.conv1", True),
        ("*.conv[12]", "layer1.conv3", False),
        ("conv.", "convx", False),  # a dot is a dot
        ("CONV", "conv", False),
        ("re:conv.", "convx", True),
        (r"re:layer\d+\.conv", "layer12.conv", True),
        (r"re:layer\d", "layer12", False),  # the whole path again
        ("re:", "", True),
        ("*", "", True),
    ],
)
def test_a_match_is_a_glob_or_a_regular_expression_for_the_whole_path(pattern: str, path: str, selected: bool) -> None:
    assert Rule(match=pattern, weight="4").selects(Op(path, "linear")) is selected


@given(rules(st.none() | st.sampled_from(PATTERNS)), ops)
def test_a_rule_selects_where_each_of_its_conditions_does(rule: Rule, op: Op) -> None:
    conditions = {name: getattr(rule, name) for name in ("match", "module", "function", "role")}
    alone = [Rule(**{name: value}, weight="4") for name, value in conditions.items() if value is not None]
    plain = dataclasses.replace(op, on_request=False)
    named = rule.function is not None or not op.on_request
    assert rule.selects(op) is (named and all(single.selects(plain) for single in alone))


def test_a_module_is_named_by_its_class_its_bases_or_their_names() -> None:
    class Mine(nn.Conv2d):
        pass

    names = class_names(Mine(1, 1, 1))
    op = Op("conv", "conv2d", names)
    for given_as in (Mine, nn.Conv2d, "Mine", "Conv2d", "torch.nn.modules.conv.Conv2d"):
        assert Rule(module=given_as, weight="4").selects(op)
    for other in (nn.Linear, nn.Conv1d, "conv2d", nn.Module):
        assert not Rule(module=other, weight="4").selects(op)


def test_a_function_is_named_by_itself_or_its_name() -> None:
    for given_as in (F.relu, "relu"):
        assert Rule(function=given_as, input="4").selects(Op("f", "relu"))
    assert Rule(function=torch.matmul, input="4").function == "matmul"


class Block(nn.Module):
    """A block whose class a rule names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(F.relu(self.conv1(x))) + x
        return out


class Net(nn.Module):
    """A stem, two blocks, a product of activations, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layer1 = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x)).mean((2, 3))
        out: Tensor = self.fc(x) + torch.matmul(x, x.t()).sum()
        return out


def weight_bits(policy: QuantPolicy) -> dict[str, int]:
    """Bits of every weight that the policy quantizes in ``Net``, by the path of its operation."""
    found = pege_fx.explain(Net(), policy).plan.quantized
    return {op.path: spec.bits for op, edge, spec in found if edge.operand == "weight"}


BLOCKS = [f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]


def test_a_rule_for_a_class_reaches_what_modules_of_that_class_contain() -> None:
    assert weight_bits(QuantPolicy((Rule(module=Block, weight="3"),))) == dict.fromkeys(BLOCKS, 3)
    assert weight_bits(QuantPolicy((Rule(module="Linear", weight="3"),))) == {"fc": 3}
    everything = weight_bits(QuantPolicy((Rule(module=Net, weight="3"),)))
    assert everything == dict.fromkeys(["stem", *BLOCKS, "fc"], 3)


def test_functions_and_roles_select_in_a_graph() -> None:
    policy = QuantPolicy((Rule(function=F.conv2d, weight="4"), Rule(role="first", weight="8"), Rule(role="last", weight="7")))
    assert weight_bits(policy) == {"stem": 8, **dict.fromkeys(BLOCKS, 4), "fc": 7}
    quantized = pege_fx.explain(Net(), QuantPolicy((Rule(function="matmul", input="4"),))).plan.quantized
    assert {(op.function, edge.operand) for op, edge, _ in quantized} == {("matmul", "input"), ("matmul", "other")}


# --- rules that decide nothing -----------------------------------------------------------------------------------


def refusal(rule: Rule) -> str:
    with pytest.raises(PolicyError) as error:
        pege_fx.prepare(Net(), QuantPolicy((Rule(weight="4"), rule)))
    message = str(error.value)
    assert message.startswith(f"{rule!r} decides for none of 7 operations.")
    assert message.endswith("fix the rule, or drop it.")
    return message


def test_a_pattern_that_matches_nothing_raises_with_the_closest_paths() -> None:
    message = refusal(Rule(match="layr1.0.conv*", weight="2"))
    assert "closest paths: " in message
    (named,) = [line for line in message.splitlines() if "closest paths" in line]
    assert {"layer1.0.conv1", "layer1.0.conv2"} <= set(named.split(": ")[1].split(", "))


def test_a_class_that_is_nowhere_raises_with_the_closest_classes() -> None:
    message = refusal(Rule(module=nn.Conv1d, weight="2"))
    assert "closest module classes: torch.nn.modules.conv.Conv2d" in message


def test_a_function_that_is_nowhere_raises_with_the_closest_functions() -> None:
    assert "closest functions: matmul" in refusal(Rule(function="matmul2", input="2"))


def test_conditions_that_hold_only_apart_raise() -> None:
    assert "closest" in refusal(Rule(match="stem", role="last", weight="2"))


@given(policies, st.lists(ops, max_size=6))
def test_a_policy_raises_exactly_if_a_rule_selects_nothing(policy: QuantPolicy, found: list[Op]) -> None:
    idle = [rule for rule in policy.rules if not any(rule.selects(op) for op in found)]
    if idle:
        with pytest.raises(PolicyError) as error:
            policy.check_all_decide(found)
        assert str(error.value).startswith(repr(idle[0]))
    else:
        policy.check_all_decide(found)


# --- the short form ----------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(2, 8), st.booleans())
def test_the_short_form_is_a_default_with_exceptions_for_first_and_last(weight: int, x: int, lower: bool) -> None:
    text = f"W{weight}A{x}"
    policy = QuantPolicy.parse(f" {text.lower() if lower else text} ")
    assert policy == QuantPolicy(
        (
            Rule(weight=QuantSpec(bits=weight), input=QuantSpec(bits=x)),
            Rule(role="first", weight="8", input="8"),
            Rule(role="last", weight="8", input="8"),
        )
    )


def test_half_a_short_form_sets_one_edge_alone() -> None:
    assert QuantPolicy.parse("W4") == QuantPolicy(
        (Rule(weight="4"), Rule(role="first", weight="8"), Rule(role="last", weight="8"))
    )
    assert QuantPolicy.parse("A4", first=None, last="5") == QuantPolicy(
        (Rule(input="4"), Rule(role="first", input=None), Rule(role="last", input="5"))
    )


def test_thirty_two_bits_are_float() -> None:
    assert QuantPolicy.parse("W32A4").rules[0] == Rule(weight=None, input="4")
    assert QuantPolicy.parse("W4A32").rules[0] == Rule(weight="4", input=None)


def test_further_fields_hold_for_every_edge_but_a_given_spec() -> None:
    own = QuantSpec(bits=6, method="minmax")
    policy = QuantPolicy.parse("W2A2", first="float", last=own, method="pact", estimator="ste")
    both = QuantSpec(bits=2, method="pact", estimator="ste")
    assert policy.rules == (
        Rule(weight=both, input=both),
        Rule(role="first", weight=None, input=None),
        Rule(role="last", weight=own, input=own),
    )
    assert QuantPolicy.parse("W2A2", method="pact").rules[1].weight == QuantSpec(bits=8, method="pact")


@pytest.mark.parametrize("text", ["W2W4", "W4A4A2", "A4W4", "", " ", "4", "W", "WA", "W4A", "int8", "W4-A4", "W-4A4", None, 4])
def test_a_conflicting_or_unreadable_short_form_is_refused(text: Any) -> None:
    with pytest.raises(PolicyError, match=r"is not a policy in short: write weight bits, then input bits, each once") as error:
        QuantPolicy.parse(text)
    assert repr(text) in str(error.value)
    assert '"W4A4"' in str(error.value)
    assert "QuantPolicy((Rule(...), ...))" in str(error.value)


@pytest.mark.parametrize("text", ["W1A4", "W4A9", "W0", "W4A15", "A64"])
def test_bits_out_of_range_are_refused_in_the_short_form_too(text: str) -> None:
    with pytest.raises(SpecError, match="whole number from 2 to 8"):
        QuantPolicy.parse(text)


def test_unknown_names_are_refused_in_the_short_form_too() -> None:
    with pytest.raises(SpecError, match="unknown forward method 'nope'"):
        QuantPolicy.parse("W4A4", method="nope")
    with pytest.raises(SpecError, match="unknown estimator 'nope'"):
        QuantPolicy.parse("W4A4", estimator="nope")
    with pytest.raises(PolicyError, match=r"sined.*; known fields are those of QuantSpec"):
        QuantPolicy.parse("W4A4", sined=True)
    with pytest.raises(PolicyError, match="first='W8' is not a number format"):
        QuantPolicy.parse("W4A4", first="W8")


# --- rules that are refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, r"Rule\(\) sets nothing: give weight, input, output, schedule, shared_scale or recompute"),
        ({"recompute": 1}, r"recompute=1: give True or False"),
        ({"match": "conv1", "role": "first"}, r"Rule\(match='conv1', role='first'\) sets nothing"),
        ({"weight": "W4A4"}, r"weight='W4A4' is not a number format(.|\n)*\"W4A4\" is for QuantPolicy.parse"),
        ({"input": 4.0}, r"input=4.0 is not a number format"),
        ({"output": True}, r"output=True is not a number format"),
        ({"weight": "-4"}, r"weight='-4' is not a number format"),
        ({"weight": "9"}, r"bits=9 is not a whole number from 2 to 8"),
        ({"weight": 1}, r"bits=1 is not a whole number from 2 to 8"),
        ({"weight": "4", "role": "middle"}, r'role=\'middle\': give "first" or "last"'),
        ({"weight": "4", "match": "re:("}, r"match='re:\(' is not a regular expression: "),
        ({"weight": "4", "match": 3}, r"match=3 is not text: give a glob, or 're:'"),
        ({"weight": "4", "module": F.relu}, r"is not a class of modules: give nn.Conv2d, or its name"),
        ({"weight": "4", "module": nn.Linear(1, 1)}, r"is not a class of modules"),
        ({"weight": "4", "function": object()}, r"has no name: give the function, or its name"),
        ({"schedule": ""}, r"schedule='': give the name of a schedule group"),
        ({"input": "4", "shared_scale": "yes"}, r"shared_scale='yes': give True or False"),
        ({"input": None, "shared_scale": True}, r"inputs in float have no scale to share: drop shared_scale, or give input"),
        ({"schedule": 3}, r"schedule=3: give the name of a schedule group"),
        ({"input": QuantSpec(bits=4, granularity="channel")}, r"input granularity=\"channel\": activations have one scale"),
        ({"output": QuantSpec(bits=4, granularity="channel")}, r"output granularity=\"channel\": activations have one"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PegeError, match=words):
        Rule(**fields)


def test_rules_take_no_positional_arguments_and_policies_only_rules() -> None:
    with pytest.raises(TypeError):
        Rule("conv1", weight="4")  # type: ignore[misc]
    with pytest.raises(PolicyError, match=r"'W4A4' is not a Rule: QuantPolicy takes a sequence of rules"):
        QuantPolicy(("W4A4",))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"4 is not a policy: give a QuantPolicy, or a short form"):
        pege_fx.prepare(Net(), 4)  # type: ignore[arg-type]


def test_policies_and_rules_are_values() -> None:
    one, other = QuantPolicy((Rule(weight="4"),)), QuantPolicy([Rule(weight=4)])  # type: ignore[arg-type]
    assert one == other
    assert hash(one) == hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rules = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rules[0].weight = None  # type: ignore[misc]


@given(rules())
def test_a_rule_prints_as_the_code_that_makes_it(rule: Rule) -> None:
    assert eval(repr(rule), {"Rule": Rule, "QuantSpec": QuantSpec}) == rule


# --- files -------------------------------------------------------------------------------------------------------


@given(policies)
def test_json_round_trips(policy: QuantPolicy) -> None:
    assert QuantPolicy.from_json(policy.to_json()) == policy


def test_toml_round_trips(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"

    @given(policies)
    def round_trip(policy: QuantPolicy) -> None:
        text = policy.to_toml(path)
        assert QuantPolicy.from_toml(path) == policy
        path.write_text(text, encoding="utf-8")
        assert QuantPolicy.from_toml(str(path)) == policy

    round_trip()


@given(policies)
def test_data_round_trips_and_is_plain(policy: QuantPolicy) -> None:
    data = policy.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert QuantPolicy.from_dict(data) == policy


def test_a_file_reads_as_a_person_would_write_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        """
        [[rules]]
        weight = "4"
        input = 4

        [[rules]]
        match = "layer1.*"
        weight = { bits = 2, method = "pact" }
        schedule = "blocks"

        [[rules]]
        role = "last"
        module = "Linear"
        weight = "float"
        """
    )
    assert QuantPolicy.from_toml(path) == QuantPolicy(
        (
            Rule(weight="4", input="4"),
            Rule(match="layer1.*", weight=QuantSpec(bits=2, method="pact"), schedule="blocks"),
            Rule(role="last", module=nn.Linear.__name__, weight=None),
        )
    )


def test_to_toml_writes_what_it_returns(tmp_path: Path) -> None:
    policy = QuantPolicy((Rule(match="größe.λ", weight="4"),))
    text = policy.to_toml(tmp_path / "policy.toml")
    assert text == policy.to_toml()
    assert (tmp_path / "policy.toml").read_bytes().decode("utf-8") == text  # TOML is UTF-8, whatever the locale


FIELDS = [
    ("[]", "a policy file holds a list of rules under the one key 'rules'"),
    ("{}", "a policy file holds a list of rules"),
    ('{"rules": {}}', "a policy file holds a list of rules"),
    ('{"rules": [], "version": 1}', "a policy file holds a list of rules"),
    ('{"rules": ["W4A4"]}', r"rule 0 is 'W4A4': a rule is a table of function, input, match"),
    ('{"rules": [{"weight": "4"}, {"wieght": "4"}]}', r"rule 1 has unknown fields: 'wieght' \(closest: weight\)"),
    ('{"rules": [{"_pattern": "x", "weight": "4"}]}', r"rule 0 has unknown fields: '_pattern'"),
    ('{"rules": [{"weight": {"bits": 4, "sined": true}}]}', r"rule 0: .*sined"),
    ('{"rules": [{"weight": {}}]}', r"rule 0: .*bits"),
    ('{"rules": [{"weight": "nine"}]}', r"rule 0: weight='nine' is not a number format"),
    ('{"rules": [{"weight": []}]}', r"rule 0: weight=\[\] is not a number format"),
    ('{"rules": [{"weight": "4", "match": 1}]}', r"rule 0: match=1 is not text"),
    ('{"rules": [{"weight": "4", "module": null}]}', r"rule 0: module=None is not text"),
    ('{"rules": [{"weight": "12"}]}', r"rule 0: bits=12 is not a whole number"),
    ('{"rules": [{"weight": {"bits": 4, "method": "nope"}}]}', r"rule 0: unknown forward method 'nope'"),
    ('{"rules": [{"weight": {"bits": 4, "estimator": "nope"}}]}', r"rule 0: unknown estimator 'nope'"),
    ('{"rules": [{"match": "conv"}]}', r"rule 0: Rule\(match='conv'\) sets nothing"),
]


@pytest.mark.parametrize(("text", "words"), FIELDS)
def test_a_file_with_wrong_fields_says_which_rule_and_field(text: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        QuantPolicy.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "rules: 4", "[" * 100_000])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="not JSON: "):
        QuantPolicy.from_json(text)


@pytest.mark.parametrize("content", [b"rules = [", b"= 4", b'[[rules]]\nweight = "4'])
def test_what_is_not_toml_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"broken\.toml is not TOML: "):
        QuantPolicy.from_toml(path)


def test_a_toml_file_that_can_not_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"can not read the policy .*missing\.toml"):
        QuantPolicy.from_toml(tmp_path / "missing.toml")
    with pytest.raises(PolicyError, match="is a folder, a pipe or a device: give a file"):
        QuantPolicy.from_toml(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[[rules]]\nmatch = "gr\xf6\xdfe"\nweight = "4"')
    with pytest.raises(PolicyError, match=r"can not read the policy .*latin\.toml"):
        QuantPolicy.from_toml(tmp_path / "latin.toml")


def test_wrong_fields_in_toml_name_the_file_as_well(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('[[rules]]\nwieght = "4"')
    with pytest.raises(PolicyError, match=r"policy\.toml: rule 0 has unknown fields: 'wieght' \(closest: weight\)"):
        QuantPolicy.from_toml(tmp_path / "policy.toml")
