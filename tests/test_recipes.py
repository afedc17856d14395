"""Recipes: ordinary objects that train, score, draw and condition, on a table with a known law."""

import jax
import numpy as np
import pytest

import known_tables
from probdiff import Diffusion, Fit, Table, datasets, diagnostics, infer, recipes, sample

KEY = jax.random.key(0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
def test_a_table_is_trained_drawn_and_conditioned():
    """Three steps: the figures are the mixture's; below the truth, above independent columns."""
    data, test = known_tables.draw(0, 1500), known_tables.draw(1, 200)
    table = Table({k: np.concatenate([data[k], test[k]]) for k in data})
    diffusion, params, fitted = recipes.table(KEY, table, data, num_steps=3, progress=False)
    assert isinstance(diffusion, Diffusion) and isinstance(fitted, Fit) and fitted.num_steps == 3
    rows = table.encode(test)
    k = diagnostics.sampled_bound(KEY, diffusion, params, rows.x_0, num_times=8)["bound"]
    gap = k["bound"].values + rows.log_jacobian - known_tables.log_p(test)
    assert -2.5 < gap.mean() < 3 * gap.std() / 200**0.5
    draws = table.decode(sample.ancestral(KEY, diffusion, params, 100))
    assert set(draws["colour"]) <= set(known_tables.COLOURS) and draws["count"].min() >= 0
    seen = table.encode({"sold": ["yes"], "half": [1.0], "u": [1.5]})
    prior = diffusion.prior(params)
    smc = infer.SMC(
        lambda: prior(known=np.nan_to_num(seen.x_0[0]), mask=seen.mask[0]), num_particles=100,
        steps=20,
    )  # fmt: skip
    smc.run(KEY)
    posterior = table.decode(smc.get_samples()["x_0"])
    assert set(posterior["sold"]) == {"yes"} and (posterior["half"] == 1.0).all()


def test_few_rows_are_refused():
    data = known_tables.draw(0, 40)
    with pytest.raises(ValueError, match="data must have at least 50 rows; got 40"):
        recipes.table(KEY, Table(data), data)


@pytest.mark.long
def test_images_are_trained_drawn_and_scored():
    """Ten steps on digits: draws are levels, and K is above that of even levels."""
    images = datasets.digits().train[:300]
    diffusion, params, fitted = recipes.image(KEY, images, levels=17, num_steps=10, progress=False)
    assert fitted.num_steps == 10 and diffusion.event_shape == (8, 8)
    draws = sample.ancestral(KEY, diffusion, params, 20, steps=20)
    assert set(np.unique(draws)) <= set(range(17))
    k = diagnostics.bound(KEY, diffusion, params, datasets.digits().test[:50])["bound"]
    assert k.attrs["mean"] > -64 * np.log(17) + 3 * k.attrs["se"]


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"images must be at least 50, of shape \(N, H, W\)"):
        recipes.image(KEY, np.zeros((100, 64)), levels=17)
    with pytest.raises(ValueError, match="grid"):
        recipes.image(KEY, datasets.digits().train + 0.5, levels=17, progress=False)
