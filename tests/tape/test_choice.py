"""Which products are kept: whatever was measured, what is kept is foreseen within the limit."""

from hypothesis import given
from hypothesis import strategies as st

from snn_reversible_plugin.tape.choice import choose, foreseen
from snn_reversible_plugin.tape.sizes import Layer, Moment

SIZES = st.integers(0, 20)


@st.composite
def measured_layers(draw):
    count = draw(st.integers(1, 6))
    before = st.frozensets(st.integers(0, count - 1))
    layers = []
    for at in range(count):
        moments = [
            Moment(
                draw(SIZES) + sum(size for size, _ in early),
                frozenset(one for one in draw(before) if one <= at),
                rebuilding,
                early=early,
            )
            for rebuilding in draw(st.lists(st.sampled_from([None, *range(at + 1)]), max_size=3))
            for early in [draw(st.frozensets(st.tuples(SIZES, before), max_size=2))]
        ]
        forward = [
            Moment(draw(SIZES), frozenset(one for one in draw(before) if one < at)) for _ in range(2)
        ]
        layers.append(
            Layer(
                draw(SIZES), draw(SIZES), needed=draw(st.booleans()), shared=draw(st.booleans()),
                forward=forward, backward=moments,
            )
        )  # fmt: skip
    return layers


@given(measured_layers(), SIZES)
def test_what_is_kept_is_foreseen_within_the_limit(layers, more):
    limit = foreseen(layers, [False] * len(layers)) + more
    kept = choose(layers, limit)
    assert foreseen(layers, kept) <= limit
    assert all(layer.needed for layer, keeps in zip(layers, kept, strict=True) if keeps)
    assert choose(layers, 10_000) == [layer.needed and layer.result > 0 for layer in layers]


def test_what_stands_anyway_takes_no_room_and_what_does_not_run_again_none_either():
    """Two blocks of a stream: in the second's backward the first's result, 8, was rebuilt, and before that,
    while its product ran, 6 more were alive."""
    moments = [Moment(40, frozenset({0, 1})), Moment(30, rebuilding=0)]
    layers = [
        Layer(8, 9, needed=True, shared=True, forward=[Moment(8)], backward=[Moment(16)]),
        Layer(8, 9, needed=True, shared=True, forward=[Moment(16)], backward=moments),
    ]
    assert choose(layers, 40) == [True, True]
    assert foreseen(layers, [True, True]) == 40
    layers[1].backward = [Moment(40, frozenset({1})), *moments]  # and at another moment it did not stand
    assert choose(layers, 40) == [False, True]
    assert foreseen(layers, [True, True]) == 48


def test_what_was_computed_for_a_product_makes_room_where_that_is_kept():
    """In the second layer's backward 30 are alive, 10 of them an operand of its product."""
    for_second = Moment(30, frozenset({1}), early=frozenset({(10, frozenset({1}))}))
    layers = [
        Layer(8, 9, needed=True, shared=True, forward=[Moment(8)], backward=[Moment(16)]),
        Layer(8, 9, needed=True, shared=True, forward=[Moment(16, frozenset({0}))], backward=[for_second]),
    ]
    assert foreseen(layers, [True, False]) == 38
    assert foreseen(layers, [True, True]) == 28
    assert choose(layers, 30) == [True, True]
    assert choose(layers, 27) == [False, True]
