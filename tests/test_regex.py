"""Regexes of strangers: what `re` says of those that are taken, in bounded time; the others refused with the reason."""

import random
import re
import time

import pytest

import jpeft
from jpeft.regex import RegexError, matches
from jpeft.targets import layer_number, matches_pattern, names_module, pattern_value, saves_module

ATOMS = ["a", "b", "c", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "ab", "1", "_", r"\b", "^", "$", r"\B", r"\Z", r"\A"]
ATOMS += ["x{", "[]a]", "[^]a]", "(?:)", "[a-c_]"]
TIMES = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{1,}", "{0}", "{,}"]
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "visual.blocks.3.attn.qkv"]


def drawn(draw, depth):
    kind = draw.random()
    if depth == 0 or kind < 0.35:
        return draw.choice(ATOMS)
    inner = lambda: drawn(draw, depth - 1)
    if kind < 0.6:
        return inner() + inner()
    if kind < 0.75:
        return f"({draw.choice(('', '?:'))}{inner()}|{inner()})"
    return f"({inner()}){draw.choice(TIMES)}" if kind < 0.92 else f"({draw.choice(('?=', '?!'))}{inner()})"


def test_what_is_taken_means_what_it_means_to_re():
    draw, compared, refused = random.Random(3), 0, 0
    for _ in range(2_000):
        regex = drawn(draw, draw.randint(1, 4))
        for _ in range(5):
            text = "".join(draw.choice("abc.1_\n") for _ in range(draw.randint(0, 7)))
            try:
                found = matches(regex, text)
            except RegexError:
                refused += 1
                break
            assert found == (re.fullmatch(regex, text) is not None), (regex, text)
            compared += 1
    assert compared > 7_000 and refused < 500


@pytest.mark.parametrize(
    "regex",
    [
        r".*\.(q_proj|v_proj)",
        r"model\.layers\.(0|1|1\d)\..*(?:q|v|down)_proj",
        r"(?:.*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        r"^(?!.*visual).*(?:q_proj|qkv|down_proj)$",
        r"^model(?=\.).*\.q_proj$",
        r"(?P<one>lm_head)|visual\.blocks\.[0-3]\.attn\.\w+",
    ],
)
def test_regexes_as_people_write_them(regex):
    assert [names_module(regex, name) for name in NAMES] == [re.fullmatch(regex, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    ("regex", "word"),
    [
        (r"(a)\1", "backreference"),
        (r"(?i)a", "flag"),
        (r"(?<=a)b", "look behind"),
        (r"(?>a)b", "another group"),
        (r"a++", "repeated"),
        (r"(a", "not closed"),
        (r"a)", "unbalanced"),
        (r"[a", "not closed"),
        (r"*a", "repeat"),
        (r"{2}a", "repeat"),
        (r"a|{,}", "repeat"),
        (r"(?P<x>a)(?P<x>b)", "second group 'x'"),
        (r"a{2,1}", "order"),
        (r"a{9999}", "count"),
        (r"[z-a]", "range"),
        ("(" * 100 + ")" * 100, "deep"),
        (r"(a|\d)" * 1_000, "parts"),
        ("a" * 200_000, "characters"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_reason(regex, word):
    with pytest.raises(RegexError, match=word):
        matches(regex, "abc")


@pytest.mark.parametrize(
    "regex",
    [
        r"(a+)+$",
        r"(a|a)*$",
        r"(a|aa)+$",
        r"(.*a){25}",
        r"(.*)*(.*)*(.*)*b",
        r"((a*)*)*b",
        r"(((((a+)+)+)+)+)+b",
        "a?" * 60 + "a" * 60 + "b",
        r"(?=(a+)+b)(a+)+",
        r"(a{0,1000}){0,1000}b",
    ],
)
def test_catastrophes_end_at_once(regex):
    start = time.process_time()
    for n in range(10):
        try:
            assert not matches(regex, "a" * 60 + f"{n}!")
        except RegexError as error:
            assert "steps" in str(error)
    assert time.process_time() - start < 10.0  # it takes milliseconds, and years where it backtracks


@pytest.mark.parametrize("regex", ["{", "a{", "{}", "a{2}{}", "{a}", "a{,2}", "a{2,}{", "(?P<x>a)(?P<y>b)"])
def test_braces_and_names_as_in_re(regex):
    for text in ("", "a", "aa", "ab", "a{", "aa{}", "{}", "{a}", "aa{"):
        assert matches(regex, text) == (re.fullmatch(regex, text) is not None), text


def test_a_name_that_is_too_long():
    with pytest.raises(RegexError, match="a name of 200000 characters"):
        matches("(.?){0,9}x", "a" * 200_000)


def test_a_spec_with_a_regex_that_is_none():
    with pytest.raises(jpeft.SpecError, match="backreference"):
        jpeft.LoRA(targets=r"(a)\1")
    with pytest.raises(jpeft.SpecError, match="at most 50"):
        jpeft.LoRA(rank_pattern={f"a{n}+": 1 for n in range(51)})


def reference(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", "self_attn.q_proj", r"self_attn\.q_proj", "elf_attn.q_proj", "lm_head", "q|lm_head", r".*\.q_proj"),
        *("", ".", r"layers\.\d+\.mlp\.down_proj", "down.proj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_patterns_match_as_in_peft(pattern):
    for name in NAMES:
        assert matches_pattern(pattern, name) == reference(pattern, name), name
        assert pattern_value({pattern: 1}, [name], 0) == reference(pattern, name), name


def test_the_first_pattern_that_matches_counts():
    patterns = {"x": 0, "down.proj": 1, r".*q_proj": 2, "self_attn.q_proj": 3, "mlp.down_proj": 4}
    assert [pattern_value(patterns, [name], 9) for name in NAMES] == [2, 1, 9, 9]


class Counting(str):
    """A name that counts how often it is looked at, to be hashed, compared or changed."""

    looks = 0

    def __hash__(self):
        Counting.looks += 1
        return super().__hash__()

    def __eq__(self, other):
        Counting.looks += 1
        return super().__eq__(other)

    def replace(self, *args):
        Counting.looks += 1
        return super().replace(*args)


def test_thirty_thousand_names_are_looked_at_once():
    names = tuple(Counting(f"layers.{n}.q_proj") for n in range(30_000))
    pairs = tuple((name, n) for n, name in enumerate(names))
    Counting.looks = 0
    for n in range(500):
        assert names_module(names, f"model.layers.{n}.q_proj")
        assert saves_module(names, f"model.layers.{n}.q_proj.inner")
        assert pattern_value(pairs, [f"model.layers.{n}.q_proj"], -1) == n
    assert Counting.looks <= 3 * len(names)


def test_layer_numbers_behind_patterns():
    assert layer_number("visual.blocks.3.layers.5.attn") == 3
    assert layer_number("visual.blocks.3.layers.5.attn", ("layers",)) == 5
    assert layer_number("visual.blocks.3.layers.5.attn", ("h", "layers|none")) == 5
    assert layer_number("visual.blocks.3.layers.5.attn", ("h",)) is None
