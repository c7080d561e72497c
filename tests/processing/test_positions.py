"""M-RoPE positions: parity with transformers where it is right, by hand where it is not."""

import types

import numpy as np
import pytest

from r1vl_jax.processing.positions import mrope_positions


def hf_positions(segments, kinds):
    """transformers' rows for the same segments; kinds: 0 text, 1 image, 2 video."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    lengths = [s[0] * s[1] * s[2] // 4 if isinstance(s, tuple) else s for s in segments]
    types_T = torch.tensor([[kind for kind, length in zip(kinds, lengths, strict=True) for _ in range(length)]])
    grids = {k: [s for s, kind in zip(segments, kinds, strict=True) if kind == k] for k in (1, 2)}
    stub = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=lambda *args, **kwargs: Qwen2VLModel.get_vision_position_ids(None, *args, **kwargs),
    )
    positions, delta = Qwen2VLModel.get_rope_index(
        stub,
        torch.zeros_like(types_T),
        types_T,
        torch.tensor(grids[1]) if grids[1] else None,
        torch.tensor(grids[2]) if grids[2] else None,
    )
    return positions[:, 0].numpy(), int(delta[0, 0]) + types_T.shape[1]


CASES = {
    "text": ([7], [0]),
    "image": ([5, (1, 4, 6), 3], [0, 1, 0]),
    "tall image": ([2, (1, 40, 2), 9], [0, 1, 0]),
    "image last": ([2, (1, 4, 4)], [0, 1]),
    "image first": ([(1, 4, 4), 2], [1, 0]),
    "three images": ([1, (1, 2, 2), 2, (1, 8, 6), 2, (1, 4, 10), 6], [0, 1, 0, 1, 0, 1, 0]),
    "short video": ([4, (3, 6, 8), 5], [0, 2, 0]),
    "video as long as its side": ([4, (4, 6, 8), 5], [0, 2, 0]),
    "video and image": ([4, (2, 4, 8), 2, (1, 6, 4), 2], [0, 2, 0, 1, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    segments, kinds = CASES[case]
    expected, next_position = hf_positions(segments, kinds)
    positions_3T, next_ours = mrope_positions(segments, merge_size=2)
    assert positions_3T.dtype == np.int32
    np.testing.assert_array_equal(positions_3T, expected)
    assert next_ours == next_position == positions_3T.max() + 1


def test_by_hand():
    positions_3T, next_position = mrope_positions([2, (1, 4, 6), 2], merge_size=2)
    np.testing.assert_array_equal(
        positions_3T,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ],
    )
    assert next_position == 7


def test_long_video_by_hand():
    # t = 5 > max(h, w) / 2 = 1: text goes on at 1 + 5, not at 1 + 1 as in transformers 5.
    positions_3T, next_position = mrope_positions([1, (5, 2, 2), 2], merge_size=2)
    np.testing.assert_array_equal(
        positions_3T, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 1, 1, 1, 6, 7], [0, 1, 1, 1, 1, 1, 6, 7]]
    )
    assert next_position == 8


def test_long_video_in_transformers():
    """The trap that the test above is about."""
    assert hf_positions([1, (5, 2, 2), 2], [0, 2, 0])[0][0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3]


def test_empty():
    empty_3T, next_position = mrope_positions([0], merge_size=2)
    assert empty_3T.shape == (3, 0) and next_position == 0


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 5), (0, 4, 4)])
def test_refuses_grids(grid):
    with pytest.raises(ValueError, match="multiples of 2"):
        mrope_positions([grid], merge_size=2)
