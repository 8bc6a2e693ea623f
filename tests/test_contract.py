"""Every cache of the table meets the laws, and random programs of operations agree with the oracle.

`JAXKV_PROGRAMS=1000 pytest tests/test_contract.py -k programs` looks longer.
"""

from __future__ import annotations

import collections
import os

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract import CASES, CHOSEN, LAWS, OF_PROGRAMS, OPTIMIZED, TABLE
from jaxkv import Cross
from jaxkv.testing import Begin, Remove, Rewind, run_program

PROGRAMS = int(os.environ.get("JAXKV_PROGRAMS", "16"))  # random programs per row of the table


def random_programs_agree_with_the_oracle(case):
    counts = collections.Counter()
    for seed in range(PROGRAMS):
        counts += run_program(case.empty(), seed, num_operations=36)
    kinds = ["Begin", "Remove", "Rewind", "CopyPrefix", "Take", "Reset", "Retry", "did not fit"]
    if any(isinstance(layer.reach, Cross) for layer in case.layers):
        kinds.append("BeginCross")
    assert min(counts[kind] for kind in kinds) > PROGRAMS / 5, counts


EVERY = {random_programs_agree_with_the_oracle.__name__: random_programs_agree_with_the_oracle, **LAWS}


def marked(case, law):
    optimized = case in OPTIMIZED or law in OF_PROGRAMS
    return pytest.param(case, law, marks=[pytest.mark.optimized] if optimized else [])


# All laws of a case, then the next case: they share programs, which a worker that has other cases need not compile.
@pytest.mark.parametrize(
    ("case", "law"), [marked(case, law) for case in TABLE for law in EVERY if case in CASES.get(law, CHOSEN)]
)
def test_law(case, law):
    EVERY[law](TABLE[case])


# Strict promotion is what all tests run under. What is compiled in a mode is compiled for that mode alone, so laws are
# chosen by what they run through; test_attend.py has the other functions, test_cross.py an encoder's output.
def test_a_law_under_x64_on_pages():
    with jax.enable_x64(True):
        LAWS["copies_go_on_independently"](TABLE["mixture-pages"])


def test_a_law_under_debug_nans():
    with jax.debug_nans(True):
        LAWS["remove_closes_the_gap"](TABLE["window-slack"])


def test_a_random_program_agrees_with_the_oracle_under_x64():
    with jax.enable_x64(True):
        run_program(TABLE["encoder-decoder-stacked-float16"].empty(), 1, num_operations=40)


@given(st.data())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_programs_drawn_by_hypothesis_agree_with_the_oracle(data):
    cache = TABLE["mixture"].empty()
    run_program(cache, lambda least, most: data.draw(st.integers(least, most)), num_operations=12)


def test_a_lost_interval_inside_removed_positions_is_forgotten():
    tokens = [
        Begin(tuple((p, *[-1] * 3) if row else (p, p + 1, p + 2, p + 3) for row in range(4))) for p in (0, 4, 8, 12)
    ]
    more = [Begin(((p, p + 1, p + 2, p + 3), *[(-1,) * 4] * 3)) for p in (16, 8, 12)]
    program = [*tokens, more[0], Remove(0, 1, 13), *more[1:], Rewind((11, 99, 99, 99))]
    run_program(TABLE["mixture"].empty(), program)


LOST_2_AND_3 = [  # of a Window(5, sinks=2): 2 and 3 are overwritten, then what lies above them is removed
    *(Begin(((p, p + 1, p + 2, p + 3), *[(-1,) * 4] * 3)) for p in (0, 4, 8)),
    Begin(((12, 13, 14, -1), *[(-1,) * 4] * 3)),
    Remove(0, 4, 15),
]


def _run_on_sinks(*more):
    counts = run_program(TABLE["window-sinks-float16"].empty(), [*LOST_2_AND_3, *more])
    return counts["did not fit"]


def _block(*positions):
    return Begin(((*positions, *[-1] * (4 - len(positions))), *[(-1,) * 4] * 3))


def test_what_was_lost_can_be_written_again_token_by_token():
    assert _run_on_sinks(*(_block(p) for p in (2, 3, 4, 5))) == 0


def test_a_query_over_a_lost_position_is_refused():
    assert _run_on_sinks(_block(2), _block(4)) == 1  # 3 is still lost
    assert _run_on_sinks(_block(2, 4)) == 1


def test_a_lost_position_is_there_again_only_when_it_was_written():
    assert _run_on_sinks(_block(2), _block(4, 5, 6, 7)) == 1
    assert _run_on_sinks(_block(2, 3), _block(4, 5, 6, 7)) == 0


def test_a_span_is_seen_in_both_directions_within_reach():
    case = TABLE["mixture"]
    seen = _masks(case, positions=[[0, 1, 2, 3], [-1] * 4, [-1] * 4, [-1] * 4], spans=[[0, 5, 5, 0]] + [[0] * 4] * 3)
    assert seen["Full()"] == ["1000", "1110", "1110", "1111"]


def _masks(case, positions, spans):
    """What the first row's queries see, as pictures over positions."""
    from contract import HEADS, tokens
    from jaxkv.testing.programs import forward

    positions = np.array(positions, np.int32)
    sides = [[x[:, : positions.shape[1]] for x in side] for side in tokens(case)]
    *_, seen = forward(case.cache(), positions, None, np.array(spans, np.int32), *sides, num_heads=HEADS)
    return {
        repr(layer.reach): ["".join(str(int(x)) for x in row[: positions.shape[1]]) for row in np.asarray(mask)[0, 0]]
        for layer, (_, _, _, mask, _) in zip(case.layers, seen, strict=True)
    }
