"""The experiment on codes: its losses, and a quick run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from flax import nnx

from probdiff.experiments import find
from probdiff.experiments.representation.programs import Codes, Images, Layers, Told, moved

IMAGES = Images(
    *(np.random.default_rng(i).integers(0, 17, (20, 8, 8)).astype(np.float32) for i in range(3)),
    *([np.arange(20) % 4] * 3),
    levels=17,
)


def test_views_of_one_image_are_told_from_those_of_others():
    """The factor is minus NT-Xent, summed over images, as its formula has it."""
    codes = Codes(IMAGES, Layers(64, 8, 3, rngs=nnx.Rngs(0)), 3)
    head = Layers(3, 5, rngs=nnx.Rngs(1))
    model, _ = codes.contrastive(head, lambda key, x: x + jax.random.normal(key, x.shape))
    x, key = jnp.asarray(IMAGES.train[:6]), jax.random.key(3)
    sites = numpyro.handlers.trace(numpyro.handlers.seed(model, key)).get_trace(x)
    found = sites["nt_xent"]["fn"].log_factor
    keys = jax.random.split(_key_of(model, key, x))
    views = jnp.concatenate([x + jax.random.normal(k, x.shape) for k in keys])
    units = IMAGES.units
    h = np.asarray(head(codes.encoder((views - units["loc"]) / units["scale"])), float)
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    alike = np.exp(h @ h.T / 0.2)
    terms = []
    for i in range(12):
        others = alike[i].sum() - alike[i, i]
        terms.append(np.log(alike[i, (i + 6) % 12] / others))
    np.testing.assert_allclose(found, np.sum(terms) / 2, rtol=1e-4)


def _key_of(model, key, x):
    """The key that the program drew."""
    kept = []

    class Keep(numpyro.primitives.Messenger):
        def postprocess_message(self, msg):
            if msg["type"] == "prng_key":
                kept.append(msg["value"])

    with Keep():
        numpyro.handlers.seed(model, key)(x)
    return kept[0]


def test_a_code_says_nothing_at_low_noise():
    class Echo(nnx.Module):
        def __call__(self, x_t, t, context):
            return context

    told = Told(Echo(), 2, 30, 0.5, nnx.Rngs(0))
    code = jnp.ones((4, 2))
    out = np.abs(told(code, jnp.array([1, 10, 20, 30]), code)).max(1)
    assert out[0] < 1e-5 and out[1] < 0.01 and out[2] > 0.1 and abs(out[2] / out[3] - 1) < 0.01
    always = Told(Echo(), 2, 30, 0.0, nnx.Rngs(0))
    assert np.abs(always(code, jnp.array([1, 2, 3, 30]), code)).min(1).max() > 0


def test_views_keep_the_ink_near():
    x = jnp.zeros((50, 8, 8)).at[:, 3:5, 3:5].set(16.0)
    seen = np.asarray(moved(jax.random.key(0), x))
    assert seen.shape == x.shape and np.isfinite(seen).all()
    assert abs(seen.sum() / float(x.sum()) - 1) < 0.15
    where = (seen * np.arange(8)[:, None]).sum((1, 2)) / seen.sum((1, 2))
    assert abs(where.mean() - 3.5) < 0.4 and 0.3 < where.std() < 1.2


@pytest.mark.slow
def test_a_quick_run_leaves_a_table(tmp_path):
    rows = find("representation").run(tmp_path, quick=True, progress=False)
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [line["row"] for line in table] == [row.row for row in rows]
    assert all(np.isfinite(line["value"]) for line in table)
    names = {"bits_against_kl.png", "codes_of_two.png", "accuracy_by_level.png", "accuracies.png"}
    assert names <= {file.name for file in tmp_path.iterdir()}
