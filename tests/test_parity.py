"""Our model against transformers: logits, gradients of every parameter, and answers' log-probabilities, in fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Row, hf_inputs, make_prompts, tiny_hf, to_jax

from r1vl_jax.model import qwen2_vl

torch = pytest.importorskip("torch")

IMAGE_A, IMAGE_B, IMAGE_C = ("image", (1, 4, 6)), ("image", (1, 8, 4)), ("image", (1, 2, 2))
VIDEO = ("video", (3, 4, 6))

# name: (rows of pieces, padding side, images in a vision row)
CASES = {
    "text": ([[9]], "right", 1),
    "one image": ([[3, IMAGE_A, 4]], "right", 1),
    "two images": ([[3, IMAGE_A, 2, IMAGE_B, 4]], "right", 1),
    "two images packed": ([[3, IMAGE_A, 2, IMAGE_B, 4]], "right", 2),
    "video": ([[3, VIDEO, 4]], "right", 1),
    "left padding": ([[3, IMAGE_A, 4], [5], [8, IMAGE_C, 2]], "left", 1),
    "right padding": ([[3, IMAGE_A, 4], [5], [8, IMAGE_C, 2]], "right", 1),
    "mixed": ([[4, IMAGE_B, 1, IMAGE_A, 3], [7], [2, IMAGE_C, 2], [1, IMAGE_C, 2, VIDEO, 5, IMAGE_A]], "left", 2),
}


def build(case):
    rng = np.random.default_rng(0)
    pieces, side, per_row = CASES[case]
    return [Row.of(rng, *row) for row in pieces], side, per_row


def relative_errors(ours, theirs):
    """Per parameter: largest difference over the largest value of transformers' gradient."""
    errors = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        top = np.abs(b).max()
        difference = np.abs(np.asarray(a) - b).max()
        errors[jax.tree_util.keystr(path)] = difference / top if top else difference
    return errors


def check_against_hf(model, case, tmp_path, record_property):
    params, cfg = to_jax(model, tmp_path / "model")
    rows, side, per_row = build(case)
    inputs, prompts = hf_inputs(rows, side), make_prompts(model, rows, side, per_row)
    mask = np.asarray(prompts.mask_BT)
    labels = np.random.default_rng(1).integers(0, tiny.VOCAB, mask.shape)

    theirs = model(**inputs, use_cache=False).logits
    picked = torch.log_softmax(theirs, -1).gather(-1, torch.from_numpy(labels)[..., None])[..., 0]
    model.zero_grad()
    (-picked[torch.from_numpy(mask)].mean()).backward()

    @jax.jit
    def loss(params, prompts):
        logits = qwen2_vl.prompt_logits(params, cfg, prompts)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask) / mask.sum(), logits

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params, prompts)
    assert ours.dtype == jnp.float32
    error = np.abs(np.asarray(ours) - theirs.detach().numpy())[mask].max()
    errors = relative_errors(gradients, tiny.hf_gradients(model, tmp_path / "gradients", cfg))
    print(f"\nlogits {error:.1e} of {theirs.detach().abs().max():.1f}, gradients {max(errors.values()):.1e}")
    assert error < 1e-4
    assert not {path: e for path, e in errors.items() if not e < 1e-3}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, tmp_path, record_property):
    """Tied and untied heads take turns; `test_heads` covers the rest."""
    model = tiny_hf(tied=list(CASES).index(case) % 2 == 0)
    check_against_hf(model, case, tmp_path, record_property)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (12, 2), (14, 2)])
def test_heads(heads, kv_heads, tied, tmp_path, record_property):
    if heads == 4 and tied == (kv_heads == 4):
        pytest.skip("covered above")
    model = tiny_hf(seed=3, tied=tied, heads=heads, kv_heads=kv_heads, head_dim=8, section=(1, 2, 1))
    check_against_hf(model, "mixed", tmp_path, record_property)
