"""Moves of a weight through random programs of transposes and reshapes, against the arrays themselves."""

import math

import numpy as np
import pytest

from jpeft.view import View, from_original, to_original


def factors(n, rng):
    """A random shape of `n` elements, ones among it."""
    shape = []
    while n > 1:
        size = int(rng.choice([k for k in range(2, n + 1) if n % k == 0]))
        shape.append(size)
        n //= size
    for _ in range(rng.integers(0, 3)):
        shape.insert(rng.integers(0, len(shape) + 1), 1)
    return tuple(shape) or (1,)


@pytest.mark.parametrize("seed", range(60))
def test_a_view_says_where_every_element_is(seed):
    """Numbers that hold their own original index, moved; the view has to predict what is where, or say None."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6], 3))
    array, view = np.arange(math.prod(shape)).reshape(shape), View.whole(shape)
    moves = 0
    for _ in range(6):
        if rng.random() < 0.5:
            order = tuple(int(i) for i in rng.permutation(array.ndim))
            array, view = array.transpose(order), view.transpose(order)
        else:
            new = factors(array.size, rng)
            moved = view.reshape(new)
            if moved is None:
                continue
            array, view = array.reshape(new), moved
        moves += 1
        assert view.shape == array.shape
        np.testing.assert_array_equal(predicted(view, shape), array)
    assert moves


def predicted(view, shape):
    """The original index at each place of the moved array, from the view alone."""
    index = np.zeros(tuple(atom.size for atom in view.all_atoms), int)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for position, atom in enumerate(view.all_atoms):
        steps = np.arange(atom.size) * atom.stride * strides[atom.axis]
        index = index + steps.reshape([-1 if i == position else 1 for i in range(index.ndim)])
    return index.reshape(view.shape)


@pytest.mark.parametrize("seed", range(20))
def test_reshapes_that_exist_are_found(seed):
    """Splitting axes and joining them again is never given up on."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.choice([1, 2, 4, 6], 3))
    fine = tuple(size for n in shape for size in factors(n, rng))
    view = View.whole(shape).reshape(fine)
    assert view is not None and view.reshape((math.prod(shape),)) is not None
    assert view.reshape(shape) is not None and view.reshape(shape).shape == shape


def test_a_reshape_across_axes_has_no_answer():
    assert View.whole((4, 6)).transpose((1, 0)).reshape((8, 3)) is None
    assert View.whole((3, 2)).reshape((2, 3)) is None


def test_axes_of_one_keep_their_place():
    view = View.whole((1, 3, 1, 4))
    assert view.reshape((1, 3, 1, 4)) == view
    assert [[atom.axis for atom in dim] for dim in view.reshape((3, 4)).dims] == [[0, 1], [2, 3]]
    assert [[atom.axis for atom in dim] for dim in View.whole((3, 1)).reshape((3,)).dims] == [[0, 1]]


@pytest.mark.parametrize("seed", range(10))
def test_matrix_axes_and_back(seed):
    rng = np.random.default_rng(seed)
    view = View.whole((2, 6)).reshape((2, 3, 2)).transpose(tuple(int(i) for i in rng.permutation(3)))
    matrix = np.arange(5 * 12).reshape(5, 12)
    split = from_original(matrix, 1, view.all_atoms)
    assert split.shape == (5, *view.shape)
    np.testing.assert_array_equal(to_original(split, 1, view.all_atoms), matrix)
