"""Reaches as pictures, and what a LayerSpec refuses."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import EMPTY, Chunk, Dense, Full, LayerSpec, Window


def picture(visible) -> list[str]:
    return ["".join("1" if x else "0" for x in row) for row in np.asarray(visible)]


def over_itself(reach, length=6):
    p = jnp.arange(length)
    return picture(reach.visible(p[:, None], p[None]))


def test_full_sees_all_that_is_past():
    assert over_itself(Full()) == ["100000", "110000", "111000", "111100", "111110", "111111"]


def test_a_window_counts_the_query_itself():
    assert over_itself(Window(3)) == ["100000", "110000", "111000", "011100", "001110", "000111"]


def test_a_window_of_one_sees_itself_alone():
    assert over_itself(Window(1)) == ["100000", "010000", "001000", "000100", "000010", "000001"]


def test_sinks_stay_visible():
    assert over_itself(Window(2, sinks=1)) == ["100000", "110000", "111000", "101100", "100110", "100011"]


def test_chunks_have_absolute_boundaries():
    assert over_itself(Chunk(4)) == ["100000", "110000", "111000", "111100", "000010", "000011"]


def test_padding_and_empty_slots_are_seen_by_nobody_and_see_nothing():
    p = jnp.array([0, EMPTY, 1])
    assert picture(Full().visible(p[:, None], p[None])) == ["100", "000", "101"]


def test_a_span_sees_both_ways_but_not_beyond_the_reach():
    p = jnp.arange(6)
    span = jnp.array([0, 1, 1, 1, 1, 0])
    same = (span[:, None] == span[None]) & (span[:, None] != 0)
    assert picture(Full().visible(p[:, None], p[None], same)) == [
        "100000", "111110", "111110", "111110", "111110", "111111",
    ]  # fmt: skip
    assert picture(Window(2).visible(p[:, None], p[None], same)) == [
        "100000", "111110", "011110", "001110", "000110", "000011",
    ]  # fmt: skip
    assert picture(Chunk(3).visible(p[:, None], p[None], same)) == [
        "100000", "111000", "111000", "000110", "000110", "000111",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Window(0), "Window(size=0): size is a whole number of at least 1"),
        (lambda: Window(2.5), "Window(size=2.5)"),
        (lambda: Window(True), "Window(size=True)"),
        (lambda: Window(4, sinks=-1), "Window(sinks=-1): sinks is a whole number of at least 0"),
        (lambda: Chunk(0), "Chunk(size=0)"),
        (lambda: Dense("float33"), "not a dtype; give for example 'float32'"),
        (lambda: Dense(bool), "give a floating or an integer dtype"),
        (
            lambda: LayerSpec(Full, 1, 2),
            "give Full(), Window(size), Chunk(size), Cross(size) or Recurrent(state, tail)",
        ),
        (lambda: LayerSpec(Full(), 0, 2), "LayerSpec(num_kv_heads=0)"),
        (lambda: LayerSpec(Full(), 1, 2, value_dim=0), "LayerSpec(value_dim=0)"),
        (lambda: LayerSpec(Full(), 1, 2, k_storage="float32"), "give a storage such as Dense('float32')"),
        (lambda: LayerSpec(Full(), 1, 2, rotary=lambda k, d: k), "functions compare by identity"),
        (lambda: LayerSpec(Full(), 1, 2, rotary=functools.partial(max)), "frozen dataclass"),
        (lambda: LayerSpec(Full(), 1, 2, rotary="theta"), "give an object with shift(k, delta)"),
    ],
)
def test_wrong_specs_are_refused_with_the_cure(make, says):
    with pytest.raises(ValueError) as caught:
        make()
    assert says in str(caught.value)


def test_specs_are_hashable_and_equal_by_value():
    assert len({LayerSpec(Window(4), 2, 8), LayerSpec(Window(4), 2, 8, value_dim=8), LayerSpec(Window(5), 2, 8)}) == 2
    assert Dense("float16") == Dense(jnp.float16)
