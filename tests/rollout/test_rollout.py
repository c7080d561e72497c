"""The rollout: cached decoding against the full forward pass and against transformers, stops, and what is drawn."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.tiny_jax import batch_of, left_padded, questions, random_params, tiny_config

from r1vl_jax.model.answers import answer_logprobs
from r1vl_jax.model.fused import fuse
from r1vl_jax.model.qwen2_vl import prompt_logits
from r1vl_jax.rollout import generate
from r1vl_jax.rollout.generate import rollout
from r1vl_jax.rollout.sampling import answer_uniforms, check_sampling, sample
from r1vl_jax.types import Sampling

IMAGE_A, IMAGE_B = ("image", (1, 4, 6)), ("image", (1, 2, 2))
NEVER = (tiny.IMAGE,)  # a vision id is never sampled: with it as the only stop, answers have full length
STEPS = 12


@cache
def model():
    cfg = tiny_config(layers=2)
    return random_params(cfg), cfg


@cache
def weights():
    return fuse(*model())


@cache
def prompts():
    return batch_of(questions([3, IMAGE_A, 2], [4], [9, IMAGE_B, 3, IMAGE_B]))


def answers(
    prompts=None, *, temperature=1.2, stop_ids=NEVER, group=2, seed=0, step=1, rows=(7, 3, 5), limits=None, **sampling
):
    _, cfg = model()
    limits = {} if limits is None else {"limit_BG": limits}
    spec = Sampling(temperature=temperature, max_new_tokens=STEPS, **sampling)
    prompts = globals()["prompts"]() if prompts is None else prompts
    rows = np.array(rows, np.uint32)
    return rollout(
        weights(), cfg, prompts, rows, group=group, sampling=spec, stop_ids=stop_ids, seed=seed, step=step, **limits
    )


@partial(jax.jit, static_argnames=("cfg", "temperature"))
def rescored(params, cfg, prompts, tokens, temperature):
    return answer_logprobs(params, cfg, prompts, tokens, temperature=temperature, forbidden=cfg.vision_ids)[0]


# Against the full forward pass.


@pytest.mark.parametrize("temperature", [1.2, 0.0])
def test_cached_decoding_scores_as_the_full_pass(temperature):
    """Log-probabilities of what was sampled are the trained ones, at the sampling temperature (greedy: at T = 1)."""
    params, cfg = model()
    got = answers(temperature=temperature)
    expected = np.asarray(rescored(params, cfg, prompts(), got.tokens_BGT, temperature or 1.0))
    assert got.mask_BGT.all() and got.logprobs_BGT.dtype == np.float32
    assert np.abs(got.logprobs_BGT - expected).max() < 1e-5
    # Another temperature is another log-probability: the comparison above can fail.
    other = np.asarray(rescored(params, cfg, prompts(), got.tokens_BGT, 1.2 if temperature == 0 else 1.0))
    assert np.abs(got.logprobs_BGT - other).max() > 1e-2


def test_padding_side_changes_nothing():
    right, left = prompts(), left_padded(prompts())
    assert not np.asarray(right.mask_BT)[:, -1].all() and np.asarray(left.mask_BT)[:, -1].all()
    ours, theirs = answers(right), answers(left)
    np.testing.assert_array_equal(ours.tokens_BGT, theirs.tokens_BGT)
    np.testing.assert_allclose(ours.logprobs_BGT, theirs.logprobs_BGT, atol=1e-5)


def test_greedy_takes_the_most_probable():
    """The last token of a greedy answer is, of all tokens, the one that the full pass likes best there."""
    params, cfg = model()
    got = answers(temperature=0.0, group=1).tokens_BGT
    tokens = np.repeat(got, tiny.VOCAB, axis=1)
    tokens[..., -1] = np.arange(tiny.VOCAB)
    scored = np.asarray(rescored(params, cfg, prompts(), tokens, 1.0))[..., -1]
    np.testing.assert_array_equal(np.argmax(scored, axis=1), got[:, 0, -1])


def test_greedy_equals_transformers(tmp_path):
    """64 tokens of HF's own generate, with an image; vision ids suppressed there as they are here."""
    torch = pytest.importorskip("torch")
    hf = tiny.tiny_hf(tied=False)
    params, cfg = tiny.to_jax(hf, tmp_path / "model")
    row = tiny.Row.of(np.random.default_rng(0), 5, IMAGE_A, 4, IMAGE_B, 3)
    inputs = tiny.hf_inputs([row])
    with torch.no_grad():
        theirs = hf.generate(
            **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0,
            suppress_tokens=list(cfg.vision_ids),
        )  # fmt: skip
    theirs = theirs[0, len(row.tokens) :].numpy()
    ours = rollout(
        fuse(params, cfg), cfg, tiny.make_prompts(hf, [row]), np.zeros(1, np.uint32),
        group=1, sampling=Sampling(temperature=0.0, max_new_tokens=64), stop_ids=NEVER, seed=0, step=0,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(ours.tokens_BGT)[0, 0], theirs)
    assert len(theirs) == 64 and len(set(theirs.tolist())) > 8


# Stops.


@pytest.mark.parametrize("swapped", [False, True])
def test_both_stop_tokens_end_an_answer(swapped):
    """With two stop ids an answer is the unstopped one up to and including the first of either."""
    full = answers()
    stops = (int(full.tokens_BGT[0, 0, 3]), int(full.tokens_BGT[1, 1, 5]))
    got = answers(stop_ids=stops[::-1] if swapped else stops)
    ended_by = set()
    for b, g in np.ndindex(*got.tokens_BGT.shape[:2]):
        tokens = full.tokens_BGT[b, g].tolist()
        ends = [t for t, token in enumerate(tokens) if token in stops]
        length = ends[0] + 1 if ends else STEPS
        ended_by |= {tokens[ends[0]]} if ends else set()
        assert got.mask_BGT[b, g].tolist() == [True] * length + [False] * (STEPS - length)
        assert got.tokens_BGT[b, g, :length].tolist() == tokens[:length]
        np.testing.assert_allclose(got.logprobs_BGT[b, g, :length], full.logprobs_BGT[b, g, :length], atol=1e-6)
        np.testing.assert_array_equal(got.logprobs_BGT[b, g, length:], 0.0)
    assert ended_by == set(stops)


def test_decoding_ends_with_the_last_answer(monkeypatch):
    """The loop runs as many steps as the longest answer has tokens."""
    calls = []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return sample(*args)

    monkeypatch.setattr(generate, "sample", counted)
    # Stops that no other test uses, so that the loop is traced anew, with the counter.
    many = tuple(token for token in range(tiny.TEXT_IDS) if token % 4)
    got = answers(stop_ids=many)
    jax.effects_barrier()
    longest = int(got.mask_BGT.sum(axis=-1).max())
    assert 1 < len(calls) == longest < STEPS


# Loops: caches that grow, rows that are dropped when they are finished.


def test_row_counts(monkeypatch):
    """At most eight sizes from all rows down, in multiples of eight where there are so many rows."""
    assert generate.row_counts(256) == [256, 208, 168, 128, 96, 64, 40, 24]
    assert generate.row_counts(64) == [64, 56, 48, 32, 24, 16, 8]
    assert generate.row_counts(4) == [4]
    monkeypatch.setattr(generate, "ROW_MULTIPLE", 1)
    assert generate.row_counts(4) == [4, 3, 2, 1]
    assert all(len(generate.row_counts(rows)) <= 8 for rows in range(1, 600))


LIMITS = np.array([[1, 3], [12, 2], [5, 9], [2, 1]])


@cache
def four():
    return batch_of(questions([3, IMAGE_A, 2], [4], [9, IMAGE_B, 3, IMAGE_B], [5, IMAGE_A]))


def test_an_answer_ends_at_its_limit():
    full, got = (answers(four(), rows=range(4), limits=limits) for limits in (None, LIMITS))
    mask = np.arange(STEPS) < LIMITS[..., None]
    np.testing.assert_array_equal(got.mask_BGT, mask)
    np.testing.assert_array_equal(got.tokens_BGT[mask], full.tokens_BGT[mask])


@cache
def unbroken():
    return answers(four(), rows=range(4), limits=LIMITS)


@pytest.mark.parametrize("segment, first_cache", [(1, 12), (2, 3), (3, 1), (5, 12)])
def test_growing_caches_and_dropped_rows_change_nothing(segment, first_cache, monkeypatch):
    """Short loops, that drop finished rows on the way, give what one loop over all of them gives."""
    want = unbroken()
    loops, decode = [], generate.decode

    def watched(*args):
        loops.append((len(args[4].done_R), args[4].cache[0].shape[3], int(args[4].step)))
        return decode(*args)

    for name, value in (("SEGMENT", segment), ("FIRST_CACHE", first_cache), ("ROW_MULTIPLE", 1), ("decode", watched)):
        monkeypatch.setattr(generate, name, value)
    got = answers(four(), rows=range(4), limits=LIMITS)
    np.testing.assert_array_equal(got.tokens_BGT, want.tokens_BGT)
    np.testing.assert_array_equal(got.mask_BGT, want.mask_BGT)
    np.testing.assert_allclose(got.logprobs_BGT, want.logprobs_BGT, atol=1e-5)
    counts, lengths, starts = zip(*loops, strict=True)
    assert counts[0] == 8 and counts[-1] < 4 and sorted(counts, reverse=True) == list(counts)
    assert lengths[0] == first_cache and lengths[-1] == STEPS
    dropped = [i for i in range(1, len(loops)) if counts[i] < counts[i - 1]]
    assert dropped and all(starts[i] - starts[i - 1] >= min(segment, first_cache) for i in dropped)


def test_most_of_what_is_computed_belongs_to_answers(monkeypatch):
    """Lognormal lengths as in training, a fourth of them: at least 85%, in few shapes, loops of 16 tokens or more."""
    loops, decode = [], generate.decode

    def watched(*args):
        rows, first = len(args[4].done_R), int(args[4].step)
        after = decode(*args)
        loops.append((rows, int(after.step) - first))
        return after

    for name, value in (("SEGMENT", 16), ("ROW_MULTIPLE", 1), ("decode", watched)):
        monkeypatch.setattr(generate, name, value)
    limits = np.clip(np.random.default_rng(3).lognormal(np.log(100) - 0.18, 0.6, (16, 4)), 1, 256).astype(int)
    batch = batch_of(questions(*[[3]] * 16))
    monkeypatch.setitem(globals(), "STEPS", 256)
    got = answers(batch, group=4, rows=range(16), limits=limits)
    np.testing.assert_array_equal(got.mask_BGT.sum(axis=2), limits)
    computed = sum(rows * steps for rows, steps in loops)
    assert limits.sum() / computed >= 0.85
    assert len({rows for rows, _ in loops}) <= 8 and min(steps for _, steps in loops[:-1]) >= 16


def test_twenty_batches_compile_once(monkeypatch):
    """Questions and answers of any length, in one shape: a program for each shape of a loop, and none after that."""
    monkeypatch.setattr(generate, "SEGMENT", 3)
    monkeypatch.setattr(generate, "FIRST_CACHE", 6)
    monkeypatch.setattr(generate, "ROW_MULTIPLE", 1)
    built, calls, decode = [], [], generate.decode

    def hear(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            built.append(about.get("fun_name"))

    def counted(*args):
        calls.append((len(args[4].done_R), args[4].cache[0].shape[3]))
        return decode(*args)

    def run(step):
        rng = np.random.default_rng(step)
        batch = questions(*[[int(length), IMAGE_A] for length in rng.integers(1, 20, 4)], seed=step)
        answers(batch_of(batch, pad_multiple=32), rows=range(4), step=step, limits=rng.integers(1, STEPS + 1, (4, 2)))

    monkeypatch.setattr(generate, "decode", counted)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        for step in range(20):
            run(step)
        assert built.count("jit(prefill)") == 1 and len(calls) > 50
        assert built.count("jit(compact)") <= 6 + 6  # from each size to the next, with a cache of either length
        assert built.count("jit(decode)") == len(set(calls)) <= 2 * 7  # caches of 6, 12; 8, 7, 6, 4, 3, 2, 1 rows
        del built[:]
        for step in range(20):
            run(step)
        assert built == []
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


# What is drawn.


def test_vision_ids_are_never_drawn():
    """A head that prefers vision ids to everything: the full pass says so, the rollout never emits one."""
    cfg = tiny_config(tied=False)
    params = random_params(cfg)
    head = np.array(params["text"]["head"])
    head[list(cfg.vision_ids)] *= 40
    params["text"]["head"] = jnp.asarray(head)
    logits = np.asarray(jax.jit(partial(prompt_logits, cfg=cfg))(params, prompts=prompts()))
    assert np.isin(logits[np.asarray(prompts().mask_BT)].argmax(-1), cfg.vision_ids).mean() > 0.9
    for temperature in (0.0, 1.0):
        got = rollout(
            fuse(params, cfg), cfg, prompts(), np.arange(3, dtype=np.uint32),
            group=4, sampling=Sampling(temperature=temperature, max_new_tokens=STEPS), stop_ids=(1,), seed=0, step=0,
        )  # fmt: skip
        assert not np.isin(got.tokens_BGT, cfg.vision_ids).any()
        assert np.isfinite(got.logprobs_BGT).all()


LOGITS = np.array([2.0, 1.5, -1.0, 0.3, 1.9, -0.5, 0.9, 3.0])
FORBIDDEN = (7,)  # the largest


def draw(uniforms, **sampling):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (len(uniforms), len(LOGITS)))
    tokens, logprobs = sample(logits, jnp.asarray(uniforms, jnp.float32), Sampling(**sampling), FORBIDDEN)
    return np.asarray(tokens), np.asarray(logprobs)


def allowed(temperature, top_k, top_p):
    """{token: probability} left by top-k, then top-p, by plain loops."""
    p = {v: np.exp(z / temperature) for v, z in enumerate(LOGITS) if v not in FORBIDDEN}
    ranked = sorted(p, key=p.get, reverse=True)[: top_k or None]
    total, kept, mass = sum(p[v] for v in ranked), [], 0.0
    for v in ranked:
        kept.append(v)
        mass += p[v] / total
        if mass >= top_p:
            break
    return {v: p[v] / sum(p[v] for v in kept) for v in kept}


@pytest.mark.parametrize(
    "temperature, top_k, top_p, count",
    [(1.0, 0, 1.0, 7), (1.2, 3, 1.0, 3), (0.7, 1, 1.0, 1), (1.0, 0, 0.5, 2), (1.5, 0, 0.9, 5), (1.0, 4, 0.7, 3),
     (1.0, 0, 1e-6, 1), (1.0, 20, 1.0, 7)],
)  # fmt: skip
def test_top_k_and_top_p(temperature, top_k, top_p, count):
    """An even grid of uniforms hits each allowed token as often as its renormalised probability says, others never."""
    expected = allowed(temperature, top_k, top_p)
    assert len(expected) == count
    N = 4000
    tokens, logprobs = draw((np.arange(N) + 0.5) / N, temperature=temperature, top_k=top_k, top_p=top_p)
    share = np.bincount(tokens, minlength=len(LOGITS)) / N
    np.testing.assert_allclose(share, [expected.get(v, 0.0) for v in range(len(LOGITS))], atol=1.5 / N)
    # Log-probabilities are those of the trained distribution: before top-k and top-p, at the same temperature.
    everything = allowed(temperature, 0, 1.0)
    np.testing.assert_allclose(logprobs, [np.log(everything[v]) for v in tokens], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.2, 0.5])
def test_frequencies_match_probabilities(temperature):
    """Pearson's statistic of 20,000 draws over 7 tokens stays below the 99.9% point of chi-square with 6 degrees."""
    N = 20_000
    uniforms = np.asarray(answer_uniforms(3, 1, jnp.arange(100, dtype=jnp.uint32), 4, 50)).reshape(-1)
    tokens, _ = draw(uniforms, temperature=temperature)
    counts = np.bincount(tokens, minlength=len(LOGITS))
    expected = N * np.array([allowed(temperature, 0, 1.0).get(v, 0.0) for v in range(len(LOGITS))])
    assert counts[7] == 0
    assert ((counts - expected)[:7] ** 2 / expected[:7]).sum() < 22.46


def test_greedy_ignores_the_uniforms():
    tokens, logprobs = draw([0.0, 0.5, 0.999], temperature=0.0)
    assert tokens.tolist() == [0, 0, 0]
    np.testing.assert_allclose(logprobs, np.log(allowed(1.0, 0, 1.0)[0]), atol=1e-6)


def test_ends_of_the_uniforms():
    """0 and the largest number that is drawn give an allowed token, even where the first and the last ids are not."""
    logits, ends = jnp.zeros((2, 4)), jnp.array([0.0, 1 - 2.0**-23])
    tokens, _ = sample(logits, ends, Sampling(temperature=1.0), (0, 3))
    assert np.asarray(tokens).tolist() == [1, 2]


def test_the_least_uniform_does_not_draw_what_is_almost_impossible():
    """Nor is a forbidden token drawn from a block whose probabilities are all below the smallest float."""
    logits = jnp.zeros(400).at[0].set(-30.0)
    assert int(sample(logits, jnp.float32(0), Sampling(temperature=1.0), ())[0]) == 1
    logits = jnp.full(400, -200.0).at[:130].set(-91.0).at[399].set(-91.0)
    for uniform in (0.0, 0.3, 0.9999):
        token, logprob = sample(logits.at[200].set(0.0), jnp.float32(uniform), Sampling(temperature=1.0), (0,))
        assert int(token) != 0 and np.isfinite(logprob)


def test_uniforms_depend_on_seed_step_row_and_sample_only():
    rows = jnp.array([4, 9, 1], jnp.uint32)
    base = np.asarray(answer_uniforms(0, 2, rows, 3, 5))
    assert base.shape == (3, 3, 5) and len(np.unique(base)) == base.size
    assert base.min() >= 0 and base.max() < 1
    order = [2, 0, 1]
    np.testing.assert_array_equal(answer_uniforms(0, 2, rows[jnp.array(order)], 3, 5), base[order])
    np.testing.assert_array_equal(answer_uniforms(0, 2, rows[1:2], 2, 5), base[1:2, :2])
    for seed, step in ((1, 2), (0, 3)):
        other = np.asarray(answer_uniforms(seed, step, rows, 3, 5))
        assert not np.isin(other, base).any()


def test_an_answer_does_not_depend_on_its_batch():
    """The same question, row and sample give the same tokens in another batch order and group size."""
    encoded = questions([3, IMAGE_A, 2], [4], [9, IMAGE_B, 3, IMAGE_B])
    base = answers()
    turned = answers(batch_of([encoded[2], encoded[0], encoded[1]]), rows=(5, 7, 3))
    np.testing.assert_array_equal(turned.tokens_BGT, base.tokens_BGT[[2, 0, 1]])
    wider = answers(group=3)
    np.testing.assert_array_equal(wider.tokens_BGT[:, :2], base.tokens_BGT)
    assert (wider.tokens_BGT[:, 2] != base.tokens_BGT[:, 0]).any(axis=-1).all()
    assert (answers(step=2).tokens_BGT != base.tokens_BGT).any(axis=-1).all()


@pytest.mark.parametrize(
    "values, named",
    [({"temperature": -0.1}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"),
     ({"top_k": -1}, "top_k"), ({"max_new_tokens": 0}, "max_new_tokens")],
)  # fmt: skip
def test_sampling_values_that_mean_nothing(values, named):
    with pytest.raises(ValueError, match=f"{named} is .*expected"):
        check_sampling(Sampling(**values))
