"""Our model against transformers: logits, gradients of every parameter, and answers' log-probabilities, in fp32."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny import Row, check_gradients, hf_inputs, hf_positions, make_prompts, tiny_hf, to_jax

from r1vl_jax.model import answers, qwen2_vl

torch = pytest.importorskip("torch")

IMAGE_A, IMAGE_B, IMAGE_C = ("image", (1, 4, 6)), ("image", (1, 8, 4)), ("image", (1, 2, 2))
VIDEO = ("video", (3, 4, 6))  # t <= max(h, w) / 2: transformers 5.23 repeats positions behind longer ones

# name: (rows of pieces, padding side, images in a vision row)
CASES = {
    "text": ([[9]], "right", 1),
    "text, padded": ([[9], [5]], "left", 1),
    "one image": ([[3, IMAGE_A, 4]], "right", 1),
    "two images": ([[3, IMAGE_A, 2, IMAGE_B, 4]], "right", 1),
    "two images, packed": ([[3, IMAGE_A, 2, IMAGE_B, 4]], "right", 2),
    "video": ([[3, VIDEO, 4]], "right", 1),
    "left padding": ([[3, IMAGE_A, 4], [5], [8, IMAGE_C, 2]], "left", 1),
    "right padding": ([[3, IMAGE_A, 4], [5], [8, IMAGE_C, 2]], "right", 1),
    "mixed": ([[4, IMAGE_B, 1, IMAGE_A, 3], [7], [2, IMAGE_C, 2], [1, IMAGE_C, 2, VIDEO, 5, IMAGE_A]], "left", 2),
    "mixed, right": ([[7], [4, IMAGE_B, 1, IMAGE_A, 3], [VIDEO, IMAGE_C]], "right", 1),
}
SHAPE = (4, 40, 4, 96)  # one compiled program for all cases, as training has


def build(case):
    rng = np.random.default_rng(0)
    pieces, side, per_row = CASES[case]
    return [Row.of(rng, *row) for row in pieces], side, per_row


@cache
def model_of(**shape):
    return tiny_hf(**shape)


def padded(rows, side, per_row, model):
    images = any(row.grids for row in rows)
    return make_prompts(model, rows, side, per_row, SHAPE if images else (*SHAPE[:2], 0, 0))


@partial(jax.jit, static_argnums=1)
def loss_gradients(params, cfg, prompts, labels):
    """Cross-entropy of `labels` at every real position: (gradients, logits)."""

    def loss(params):
        logits = qwen2_vl.prompt_logits(params, cfg, prompts)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(prompts.mask_BT, picked, 0.0)) / prompts.mask_BT.sum(dtype=jnp.float32), logits

    return jax.grad(loss, has_aux=True)(params)


def check_against_hf(model, case, folder):
    params, cfg = to_jax(model, folder / "model")
    rows, side, per_row = build(case)
    prompts = padded(rows, side, per_row, model)
    inputs = hf_inputs(rows, side)
    labels = np.random.default_rng(1).integers(0, tiny.VOCAB, prompts.mask_BT.shape)
    ours_mask, mask = np.asarray(prompts.mask_BT), inputs["attention_mask"].bool()

    theirs = model(**inputs, use_cache=False).logits[mask]
    picked = torch.log_softmax(theirs, -1).gather(-1, torch.from_numpy(labels[ours_mask])[:, None])
    model.zero_grad()
    (-picked.mean()).backward()

    gradients, ours = loss_gradients(params, cfg, prompts, labels)
    assert ours.dtype == jnp.float32
    error = np.abs(np.asarray(ours)[ours_mask] - theirs.detach().numpy()).max()
    print(f"\n{case}: logits {error:.1e} of {theirs.detach().abs().max():.1f}, ", end="")
    assert error < 1e-4
    check_gradients(gradients, model, folder / "gradients", cfg)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, tied, tmp_path):
    check_against_hf(model_of(tied=tied), case, tmp_path)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (12, 2), (14, 2)])
def test_query_heads_per_kv_head(heads, kv_heads, tmp_path):
    """1, 6 (2B) and 7 (7B) query heads to a kv head; the other tests have 2."""
    shape = {"seed": 3, "tied": heads == 12, "head_dim": 8, "section": (1, 2, 1)}
    check_against_hf(model_of(heads=heads, kv_heads=kv_heads, **shape), "mixed", tmp_path)


def test_bfloat16(tmp_path):
    """In bf16 ours stays as close to the fp32 logits as transformers' own bf16 does."""
    model = tiny_hf(tied=False)
    params, cfg = to_jax(model, tmp_path / "model")
    rows, side, per_row = build("mixed")
    prompts, inputs = padded(rows, side, per_row, model), hf_inputs(rows, side)
    ours_mask, mask = np.asarray(prompts.mask_BT), inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**inputs, use_cache=False).logits[mask].numpy()
        theirs = model.to(torch.bfloat16)(**inputs, use_cache=False).logits[mask].float().numpy()
    half = qwen2_vl.cast(params, jnp.bfloat16)
    ours = np.asarray(jax.jit(partial(qwen2_vl.prompt_logits, cfg=cfg))(half, prompts=prompts))[ours_mask]
    rms = [float(np.sqrt(np.mean((a - exact) ** 2))) for a in (ours, theirs)]
    print(f"\nbf16: ours {rms[0]:.4f}, transformers {rms[1]:.4f}, logits {exact.std():.2f}")
    assert rms[0] < 1.5 * rms[1] < 0.1 * exact.std()
    assert np.abs(ours - exact).max() < 2 * np.abs(theirs - exact).max()


# Answers behind prompts.

LENGTHS = [[3, 6], [1, 4], [5, 2]]


def answer_rows():
    """Three prompts, two answers of different length behind each; padding holds an id that must not matter."""
    rng = np.random.default_rng(5)
    pieces = [[3, IMAGE_A, 2, IMAGE_C, 4], [5], [6, IMAGE_B]]
    tokens = np.full((3, 2, 6), tiny.IMAGE, np.int32)
    mask = np.arange(6) < np.array(LENGTHS)[..., None]
    tokens[mask] = rng.integers(0, tiny.TEXT_IDS, mask.sum())
    return [Row.of(rng, *row) for row in pieces], tokens, mask


def hf_answers(model, rows, tokens, mask, weights, temperature, forbidden):
    """(log-probabilities, entropies) from one forward pass of each prompt with each answer; gradients of the weighted
    sum of log-probabilities stay in the model."""
    logprobs, entropies = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, np.float32)
    model.zero_grad()
    for b, g in np.ndindex(*tokens.shape[:2]):
        answer = tokens[b, g][mask[b, g]].tolist()
        row = Row(rows[b].tokens + answer, rows[b].kinds + [0] * len(answer), rows[b].grids, rows[b].patches)
        logits = model(**hf_inputs([row]), use_cache=False).logits[0, -len(answer) - 1 : -1] / temperature
        logits[:, list(forbidden)] = -torch.inf
        log_p = torch.log_softmax(logits, -1)
        picked = log_p.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        (picked * torch.from_numpy(weights[b, g, : len(answer)])).sum().backward()
        logprobs[b, g, : len(answer)] = picked.detach()
        entropies[b, g, : len(answer)] = torch.special.entr(log_p.detach().exp()).sum(-1)
    return logprobs, entropies


@pytest.mark.parametrize(
    "tied, side, temperature, forbidden, remat, chunk",
    [
        (True, "left", 1.0, (), "none", 4096),
        (False, "right", 1.2, (tiny.IMAGE, tiny.VIDEO, tiny.START, tiny.END), "full", 13),
        (False, "left", 0.0, (tiny.IMAGE,), "matmuls", 1),
    ],
)
def test_answers(tied, side, temperature, forbidden, remat, chunk, tmp_path):
    """Answers that share a cached prompt score as in a full forward pass of prompt and answer."""
    model = model_of(tied=tied)
    params, cfg = to_jax(model, tmp_path / "model")
    rows, tokens, mask = answer_rows()
    weights = np.random.default_rng(2).normal(size=tokens.shape).astype(np.float32)
    expected, expected_entropy = hf_answers(model, rows, tokens, mask, weights, temperature or 1.0, forbidden)

    @jax.jit
    def gradients(params, prompts):
        def loss(params):
            logprobs, entropy = answers.answer_logprobs(
                params,
                replace(cfg, logit_rows=chunk),
                prompts,
                tokens,
                temperature=temperature,
                forbidden=forbidden,
                remat=remat,
            )
            return jnp.sum(jnp.where(mask, logprobs * weights, 0.0)), (logprobs, entropy)

        return jax.grad(loss, has_aux=True)(params)

    prompts = make_prompts(model, rows, side, images_per_row=2, shape=(0, 30, 0, 64))
    got, (logprobs, entropy) = gradients(params, prompts)
    error = np.abs(np.asarray(logprobs) - expected)[mask].max()
    entropy_error = np.abs(np.asarray(entropy) - expected_entropy)[mask].max()
    print(f"\nanswers: logprobs {error:.1e} of {np.abs(expected).max():.1f}, entropy {entropy_error:.1e}, ", end="")
    assert error < 1e-5
    assert entropy_error < 1e-5
    check_gradients(got, model, tmp_path / "gradients", cfg)


def test_position_after_the_prompt():
    """The helper's own claim: an answer starts where transformers counts on."""
    rows, _, _ = answer_rows()
    model = model_of(tied=True)
    longer = [Row(row.tokens + [1], row.kinds + [0], row.grids, row.patches) for row in rows]
    positions, _ = hf_positions(model, hf_inputs(longer, "left"))
    after_B = np.asarray(make_prompts(model, rows).next_position_B)
    np.testing.assert_array_equal(positions[:, :, -1], np.stack([after_B] * 3))
