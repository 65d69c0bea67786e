"""Patterns mean what Python's ``re`` means by them, and take no more time than path and pattern are long."""

import fnmatch
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pege_fx
from pege_fx import PolicyError, QuantPolicy, Rule
from pege_fx.policy.patterns import PathPattern

LETTERS = st.sampled_from(
    [
        "a",
        "b",
        "1",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\W",
        "[ab]",
        "[^a]",
        "[a-z1]",
        "[]b]",
        r"[\d.]",
        "{",
        "}",
        r"\x61",
        r"\141",
        "-",
    ]
)
PLACES = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z", ""])
TIMES = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{0}", "{0,3}?"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.sampled_from(["(%s)", "(?:%s)", "(?=%s)", "(?!%s)", "(?P<n>%s)", "(?#note)%s"])
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: f"{a}|{b}", inner, inner),
        st.builds(lambda form, a: form % a, groups, inner),
        st.builds(lambda a, times: f"(?:{a}){times}", inner, TIMES),
        st.builds(lambda a: f"(?<={a})|(?<!{a})", LETTERS),
    )


EXPRESSIONS = st.recursive(LETTERS | PLACES, larger, max_leaves=8)


@settings(max_examples=300)
@given(st.sampled_from(["", "(?i)", "(?s)"]), EXPRESSIONS, st.text("aAb1.{-", max_size=7))
def test_an_expression_means_what_pythons_re_means(flags: str, text: str, path: str) -> None:
    try:
        expected = re.compile(flags + text).fullmatch(path) is not None
    except re.error:
        with pytest.raises(PolicyError, match="is not a regular expression"):
            PathPattern(f"re:{flags}{text}")
    else:
        assert PathPattern(f"re:{flags}{text}").fullmatch(path) == expected


@given(st.text("ab*?[]!.", max_size=8), st.text("ab.!", max_size=6))
def test_a_glob_means_what_fnmatch_means(text: str, path: str) -> None:
    assert PathPattern(text).fullmatch(path) == fnmatch.fnmatchcase(path, text)


@pytest.mark.parametrize(
    "text",
    [
        r"re:(\w+\w?)+!",
        "re:(a+)+b",
        "re:(a|a)*b",
        "re:(a|aa)+b",
        "re:(.*a){30}b",
        "re:" + "a?" * 99 + "a" * 99 + "b",
        "re:(?=(a+)+b).*",
        "re:((a{0,99}){0,99}){0,99}b",
        "re:" + "(" * 30 + "a*" + ")*" * 30 + "b",
        "re:" + ".*" * 200 + "b",
        "re:(?<!b)(a*)*(?:a*a*)*b",
        "*a" * 200 + "b",
    ],
)
def test_no_expression_takes_for_ever(text: str) -> None:
    start = time.process_time()
    assert not PathPattern(text).fullmatch("a" * 60)
    assert not PathPattern(text).fullmatch("a" * 600)
    assert time.process_time() - start < 20  # it is some hundredths; by trying, more than the age of the universe


def test_a_match_has_so_many_steps_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pege_fx.policy.patterns.MOST_STEPS", 100)
    with pytest.raises(PolicyError, match=r"takes too long on a path of 1234 characters: simplify it"):
        PathPattern("re:(a*b?)*c").fullmatch("a" * 1234)


@pytest.mark.parametrize("text", [r"(a)\1", "(?>a)", "a*+", "(a)?(?(1)b|c)", "(?x) a", "(?i:a)", r"(?P<n>a)(?P=n)", "a" * 3000])
def test_what_needs_trying_is_refused_by_name(text: str) -> None:
    with pytest.raises(PolicyError, match=r"is not a regular expression: it has "):
        PathPattern(f"re:{text}")


def test_a_pattern_is_copied_and_pickled_by_its_text() -> None:
    rule = Rule(match=r"re:layer\d", weight="4")
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert PathPattern("a*") == PathPattern("a*")


def test_a_policy_of_a_stranger_ends(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('rules = [{weight = "4"}, {match = "re:((a?){9}){9}([^z]+[^z])*!", weight = "2"}]')
    policy = QuantPolicy.from_toml(tmp_path / "policy.toml")
    name = "a" * 200
    with pytest.raises(PolicyError, match="decides for none of 1"):
        pege_fx.prepare(Named(name), policy, torch.randn(2, 4))


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.get_submodule(self.name)(x)
        return y
