"""The sample of `make test`: every function, the values of its parameters as far as they go, and always the same cases."""

from __future__ import annotations

import random
from itertools import product

import pytest
import sample

KINDS = {(f"backend-{b}-{n}"): frozenset({("backend", b), ("number", n)}) for b, n in product(range(4), range(20))}


def test_one_case_at_least_and_otherwise_the_share() -> None:
    assert sample.chosen({"alone": frozenset()}) == {"alone"}
    assert len(sample.chosen(KINDS)) == round(sample.SHARE * len(KINDS))


def test_as_many_values_as_possible_are_shown() -> None:
    shown = frozenset().union(*[KINDS[name] for name in sample.chosen(KINDS)])
    assert {index for name, index in shown if name == "backend"} == set(range(4))
    assert len(shown) == 4 + round(sample.SHARE * len(KINDS))


def test_the_order_of_the_cases_does_not_matter() -> None:
    cases = list(KINDS.items())
    random.Random(0).shuffle(cases)
    assert sample.chosen(dict(cases)) == sample.chosen(KINDS)


PARAMETRIZED = """
import pytest

def test_alone():
    pass

@pytest.mark.parametrize("number", range({count}))
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_many(backend, number):
    pass
"""


def names_run(pytester: pytest.Pytester, *options: str) -> list[str]:
    run = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", *options)
    assert run.ret == 0
    return sorted(line.split()[0] for line in run.outlines if "PASSED" in line)


def test_the_parts_are_the_whole(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PARAMETRIZED.format(count=10))
    pytester.makeconftest(
        "import sample\n"
        "def pytest_addoption(parser): parser.addoption('--part')\n"
        "def pytest_collection_modifyitems(config, items):\n"
        "    if part := config.getoption('part'): sample.keep_part(config, items, part)\n"
    )
    everything, chosen, rest = names_run(pytester), names_run(pytester, "--part", "sample"), names_run(pytester, "--part", "rest")
    assert len(everything) == 21
    assert sorted([*chosen, *rest]) == everything
    assert {name.partition("[")[0] for name in chosen} == {name.partition("[")[0] for name in everything}
    assert len(chosen) == 1 + round(sample.SHARE * 20)


def test_this_run_has_every_function_and_every_kind_of_kernel(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("part") != "sample":
        pytest.skip("this run is no sample")
    collected, run = request.config.stash[sample.COLLECTED], request.session.items
    assert {sample.function_of(item) for item in run} == {sample.function_of(item) for item in collected}
    kinds = {kind for item in collected for kind in sample.kinds_of(item)}
    assert {kind for item in run for kind in sample.kinds_of(item)} == kinds
