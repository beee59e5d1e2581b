import itertools
import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.errors import UserError
from openpi_opt.space.dimensions import Dimension
from openpi_opt.space.space import Space, text_of

WORDS = st.text("abcxyz_", min_size=1, max_size=5)
STRINGS = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Z"]), max_size=8)
NUMBERS = st.integers(-50, 50)


def options(group: str) -> list[str]:
    return ["aiter", "eager", "sdpa"] if group == "attention" else []


def parse(*overrides: str) -> Space:
    return Space.parse(overrides, options)


def texts(*overrides: str) -> list[tuple[str, ...]]:
    return [tuple(point.values()) for point in parse(*overrides).all()]


def values_of(text: str) -> object:
    return OverridesParser.create().parse_override(f"x={text}").value()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=b,c", ["b", "c"]),
        ("a=choice(c,b)", ["c", "b"]),
        ("a=choice(b)", ["b"]),
        ("a=b,b,c", ["b", "c"]),
        ("a=true,null", ["true", "null"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='x,y',b", ["'x,y'", "b"]),
        ("a=x y,z", ["'x y'", "z"]),
        ("a=str(1,2)", ["'1'", "'2'"]),
        ("a=sort(3,1,2)", ["1", "2", "3"]),
        ("a=sort(range(1,4),reverse=true)", ["3", "2", "1"]),
        ("a=range(3)", ["0", "1", "2"]),
        ("a=range(1,9,3)", ["1", "4", "7"]),
        ("a=range(9,1,-3)", ["9", "6", "3"]),
        ("a=int(interval(2,4))", ["2", "3", "4"]),
        ("a=range(0.1,0.5,0.1)", ["0.1", "0.2", "0.3", "0.4"]),
        ("a=range(0,0.8,0.1)", ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]),
        ("a=float(range(1,3))", ["1.0", "2.0"]),
        ("attention=glob(*)", ["aiter", "eager", "sdpa"]),
        ("attention=glob(*,exclude=e*)", ["aiter", "sdpa"]),
    ],
)
def test_values_in_the_order_written(override, expected):
    key = override.partition("=")[0]
    assert [point[key] for point in parse(override).all()] == expected
    assert parse(override).combinations() == len(expected)


def test_combinations_are_the_product_with_the_last_key_fastest():
    space = parse("b=1,2", "fixed=7", "a=x,y,z")
    assert space.combinations() == 6
    assert list(space.all())[:4] == [
        {"b": "1", "a": "x"},
        {"b": "1", "a": "y"},
        {"b": "1", "a": "z"},
        {"b": "2", "a": "x"},
    ]
    assert space.overrides({"b": "1", "a": "x"}) == ["fixed=7", "b=1", "a=x"]


def test_without_a_sweep_there_is_one_point():
    assert list(parse("a=1", "~b", "+c=2").all()) == [{}]
    assert parse("a=1", "~b", "+c=2").overrides({}) == ["a=1", "~b", "+c=2"]


def test_an_addition_keeps_its_sign():
    assert parse("+a=1,2").overrides({"+a": "2"}) == ["+a=2"]


def test_a_shuffle_is_the_same_at_every_start_and_changes_no_distribution():
    shuffled = parse("a=shuffle(range(0,20))")
    order = [point["a"] for point in shuffled.all()]
    assert order == [point["a"] for point in parse("a=shuffle(range(0,20))").all()]
    assert order != sorted(order, key=int)
    assert sorted(order, key=int) == [str(i) for i in range(20)]
    assert shuffled.hash() == parse("a=range(0,20)").hash()


def test_distributions():
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space = parse(
        "a=y,x",
        "b=range(9,1,-3)",
        "c=range(0.1,0.5,0.1)",
        "d=interval(0,1)",
        "e=tag(log,interval(1e-4,1))",
        "f=int(interval(1,8))",
        "g=tag(log,int(interval(1,8)))",
    )
    assert space.distributions() == {
        "a": CategoricalDistribution(("x", "y")),
        "b": IntDistribution(3, 9, step=3),
        "c": CategoricalDistribution(("0.1", "0.2", "0.3", "0.4")),
        "d": FloatDistribution(0.0, 1.0),
        "e": FloatDistribution(1e-4, 1.0, log=True),
        "f": IntDistribution(1, 8),
        "g": IntDistribution(1, 8, log=True),
    }
    assert space.combinations() is None


def test_an_interval_has_no_end_of_points():
    with pytest.raises(ValueError, match="no end"):
        next(parse("a=interval(0,1)").all())
    assert parse("a=interval(2,2)").combinations() == 1


@pytest.mark.parametrize(
    "override",
    [
        "a=",
        "a=''",
        "a=choice()",
        "a=range(5,5)",
        "a=range(5,1)",
        "a=range(1,5,0)",
        "a=range(0.5,0.5,0.1)",
        "a=range(0.0,0.5,0.0)",
        "a=interval(2,1)",
        "a=interval(0,inf)",
        "a=tag(log,interval(0,1))",
        "a=tag(log,range(0,5))",
        "a=tag(log,range(0.1,0.5,0.1))",
        "a=tag(lgo,interval(1,2))",
        "a=tag(log,choice(1,2))",
        "a=range(0,1000000,0.5)",
        "a=glob(*)",
        "attention=glob(z*)",
        "a=[1",
        "a",
        "a=1,",
        "=1",
    ],
)
def test_what_is_no_space_is_the_users_to_mend(override):
    with pytest.raises(UserError) as caught:
        parse(override)
    lines = str(caught.value).splitlines()
    assert 1 <= len(lines) <= 3
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize("others", [["a=3"], ["a=3,4"], ["+a=1", "+a=2,3"]])
def test_a_key_that_is_swept_and_given_twice(others):
    with pytest.raises(UserError, match="more than once"):
        parse("a=1,2", *others)


def test_the_hash_ignores_order_and_sees_everything_else():
    base = parse("a=x,y", "b=range(1,5)", "c=1")
    assert base.hash() == parse("c=1", "b=range(4,0,-1)", "a=y,x").hash()
    changed = [
        parse("a=x,y,z", "b=range(1,5)", "c=1"),
        parse("a=x,y", "b=range(1,6)", "c=1"),
        parse("a=x,y", "b=tag(log,range(1,5))", "c=1"),
        parse("a=x,y", "b=range(1,5)", "c=2"),
        parse("a=x,y", "b=interval(1,5)", "c=1"),
    ]
    assert len({space.hash() for space in [base, *changed]}) == 6


def test_a_range_of_millions_is_not_written_out():
    space = parse("a=range(0,100000000)")
    assert space.combinations() == 100_000_000
    assert space.dimensions["a"].values[50_000_000] == "50000000"


@given(st.lists(STRINGS, min_size=1, max_size=5, unique=True))
def test_any_string_survives_the_way_through_the_grammar(strings):
    assert [values_of(text_of(string)) for string in strings] == strings


@given(start=NUMBERS, stop=NUMBERS, step=NUMBERS.filter(bool))
def test_integer_ranges_are_pythons(start, stop, step):
    override = f"a=range({start},{stop},{step})"
    expected = [str(i) for i in range(start, stop, step)]
    if not expected:
        with pytest.raises(UserError):
            parse(override)
        return
    space = parse(override)
    assert [point["a"] for point in space.all()] == expected
    distribution = space.distributions()["a"]
    assert {str(distribution.to_external_repr(space.values(p)["a"])) for p in space.all()} == set(
        expected
    )


@given(
    start=st.integers(-1000, 1000),
    count=st.integers(1, 40),
    step=st.integers(1, 50),
    scale=st.sampled_from([10, 100, 1000, 8, 3]),
    falling=st.booleans(),
)
def test_float_ranges_keep_every_value(start, count, step, scale, falling):
    sign = -1 if falling else 1
    low, width = start / scale, sign * step / scale
    stop = low + width * (count - 0.5)
    space = parse(f"a=range({low!r},{stop!r},{width!r})")
    written = [float(point["a"]) for point in space.all()]
    assert len(written) == count
    assert all(
        math.isclose(a, low + i * width, rel_tol=1e-9, abs_tol=1e-9) for i, a in enumerate(written)
    )


@given(low=st.floats(1e-6, 1e3), width=st.floats(1e-6, 1e3), log=st.booleans())
def test_intervals_reach_optuna_and_back_with_every_digit(low, width, log):
    high = low + width
    text = f"interval({low!r},{high!r})"
    dimension = parse(f"a=tag(log,{text})" if log else f"a={text}").dimensions["a"]
    assert dimension == Dimension.of_interval(low, high, log)
    for written in dimension.values:
        assert low <= dimension.value(written) <= high
        assert dimension.text(dimension.value(written)) == written


@given(st.dictionaries(WORDS, st.lists(NUMBERS, min_size=2, max_size=4, unique=True), max_size=4))
def test_all_is_the_product(columns):
    space = parse(*(f"{key}={','.join(map(str, column))}" for key, column in columns.items()))
    expected = [tuple(map(str, values)) for values in itertools.product(*columns.values())]
    assert [tuple(point.values()) for point in space.all()] == expected
    assert space.combinations() == len(expected)
    for point in space.all():
        assert space.texts(space.values(point)) == point
