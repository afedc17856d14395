"""Fixtures of all tests.

Nothing here imports `probdiff`: its annotations become run-time checks through an import hook
that is set after this file is read (`--jaxtyping-packages` in pyproject.toml).
"""

import collections
import gc
import math
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jaxtyping
import matplotlib
import numpyro
import pytest
from jaxtyping import PRNGKeyArray

# Most of the suite's time is compiling, and half of that goes to XLA's newer code for loops on
# CPUs. The flags are read when JAX first computes; an XLA that has lost one would end the process.
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}"

matplotlib.use("Agg")
numpyro.enable_validation()
# Tests compare with formulas; a GPU multiplies float32 matrices with ten bits unless told.
jax.config.update("jax_default_matmul_precision", "highest")


FEW_CASES = {
    "test_a_bound_says_what_it_is_taken_against": 1,
    "test_a_bound_that_is_nan_says_where": 1,
    "test_a_comparison_is_plotted_from_its_file_without_the_package": 0,
    "test_a_correlation_left_out_is_rejected_by_projections_alone": 0,
    "test_a_fit_is_plotted_from_its_file_without_the_package": 0,
    "test_a_float_may_decide_what_the_program_does": 0,
    "test_a_gaussian_likelihood_is_integrated_exactly": 0,
    "test_a_latent_site_outside_every_plate_is_refused_in_minibatches": 0,
    "test_a_latent_with_a_substituted_value_is_a_constant": 1,
    "test_a_mask_that_is_false_throughout_leaves_a_bound_of_zero": 1,
    "test_a_mesh_of_one_device_changes_nothing": 0,
    "test_a_model_comes_back_bit_for_bit": 2,
    "test_a_model_is_saved_loaded_and_sampled": 0,
    "test_a_network_of_the_log_snr_has_a_summary": 0,
    "test_a_posterior_far_from_zero_has_mean_and_sd": 0,
    "test_a_program_is_right_or_refused": 5,
    "test_a_respaced_process_jumps_from_level_to_level": 2,
    "test_a_run_far_from_zero_goes_on_and_knows_its_data": 0,
    "test_a_run_is_plotted_from_its_file_without_the_package": 0,
    "test_a_run_of_another_program_is_refused_and_its_file_left": 2,
    "test_a_saved_model_keeps_its_grid": 0,
    "test_a_site_that_the_tree_would_lose_is_refused_there": 0,
    "test_a_statistic_sees_what_no_coordinate_does": 0,
    "test_a_step_at_several_times_keeps_rows_and_contexts_together": 0,
    "test_a_step_of_gaussian_data_loses_most_of_its_variance": 1,
    "test_a_wrong_sd_is_rejected_where_it_is_wrong_and_by_the_right_sign": 0,
    "test_advice_fits_the_sampler": 1,
    "test_an_autoguide_inside_handlers_trains": 0,
    "test_an_intervention_on_x_0_leaves_its_draws_to_the_prior": 0,
    "test_arviz_draws_it_as_it_is": 1,
    "test_attention_does_not_care_where_its_places_are": 0,
    "test_best_bound_of_the_tutorials_rates": 1,
    "test_best_step_has_the_moments_that_the_score_tells": 0,
    "test_bits_are_seen_as_the_numbers_they_are": 1,
    "test_bound_is_of_a_probability_and_has_bits": 0,
    "test_bound_of_the_exact_diffusion_is_its_ceiling": 0,
    "test_bound_of_the_exact_letters_is_their_ceiling": 1,
    "test_bounds_hold_at_every_step_of_gaussian_data_of_unit_moment": 0,
    "test_bridge_given_a_law_is_the_mixture_of_bridges": 2,
    "test_built_in_networks_start_with_output_zero_of_the_needed_shape": 4,
    "test_bytes_of_the_other_order_are_read_right": 2,
    "test_canonical_gradients_are_the_stock_ones": 1,
    "test_centres_are_uniform_where_a_leaf_may_touch": 0,
    "test_closed_form_of_the_tied_step_is_the_mean_of_its_draws": 0,
    "test_combined_loss_trains_means_by_one_and_variances_by_the_other": 0,
    "test_context_is_a_shift_of_every_layer": 0,
    "test_contexts_go_with_their_examples": 0,
    "test_contexts_stay_as_they_are": 0,
    "test_covariance_of_greys_is_the_variance_times_the_probability_of_one_leaf": 0,
    "test_crop_has_the_law_of_a_smaller_picture": 0,
    "test_crops_are_blocks_of_the_images": 0,
    "test_data_are_as_often_off_the_roll_as_they_should_be": 0,
    "test_data_of_every_form_are_shifted": 1,
    "test_density_over_noise_is_that_over_levels_times_the_volume": 1,
    "test_diagnostics_do_not_depend_on_the_offset": 1,
    "test_distributions_survive_flattening_and_jit": 1,
    "test_draws_beside_the_posterior_are_rejected": 1,
    "test_draws_of_the_standard_normal_stay_so_over_any_number_of_levels": 0,
    "test_draws_of_two_plates_have_their_shapes": 0,
    "test_drift_of_an_untrained_model_shrinks_towards_zero": 0,
    "test_entries_of_plates_that_depend_on_each_other_are_refused": 2,
    "test_events_of_any_rank_are_summed_alike": 1,
    "test_every_kind_of_module_trains_at_one_site_and_is_what_it_is_alone": 1,
    "test_every_law_of_t_estimates_the_elbo_of_whole_trajectories": 0,
    "test_every_pixel_reaches_every_pixel_and_the_step_counts": 0,
    "test_evidence_under_the_standard_normal_is_exact_over_any_number_of_levels": 0,
    "test_exact_diagonal_kernels_reach_the_golden_bound": 1,
    "test_examples_do_not_see_each_other": 0,
    "test_far_out_is_by_the_variance_of_the_prior": 1,
    "test_few_draws_have_no_bias_either": 0,
    "test_fewer_levels_keep_the_law_where_a_longer_step_is_known": 1,
    "test_fewer_steps_ask_the_same_network_at_the_same_level": 0,
    "test_fit_warns_of_convolutions_that_are_slow_in_a_loop": 0,
    "test_float32_that_is_too_coarse_is_said_by_column": 1,
    "test_forward_entropy_averages_over_the_states": 0,
    "test_gathering_gradients_of_k_batches_is_one_step_on_their_sum": 1,
    "test_gaussian_elements_are_exact": 0,
    "test_gradient_by_beta_holds_the_noise_fixed": 1,
    "test_gradients_of_masses_are_the_densities_at_the_edges": 0,
    "test_hostile_calls_end_with_the_name_of_the_argument": 2,
    "test_information_of_gaussian_data_lies_between_its_bounds": 0,
    "test_joint_density_factorises_over_sites": 0,
    "test_known_entries_come_back_bit_for_bit": 2,
    "test_known_entries_far_from_zero_are_exact": 0,
    "test_known_entries_may_differ_between_systems": 0,
    "test_levels_and_noise_have_their_names": 0,
    "test_loo_of_several_looks_at_one_x_0_is_that_of_the_gaussian_oracle": 0,
    "test_log_weight_of_the_whole_is_the_log_density_for_every_draw": 1,
    "test_losses_have_the_step_they_belong_to": 0,
    "test_low_rank_expansion_is_the_integral_of_a_quadratic": 1,
    "test_masses_down_to_1e_30_have_all_their_digits": 0,
    "test_masses_of_all_symbols_sum_to_one": 1,
    "test_masses_of_all_values_sum_to_one": 1,
    "test_missing_entries_and_zeros_explain_nothing_and_break_nothing": 0,
    "test_missing_entries_do_not_count": 0,
    "test_mixture_log_density_is_the_sum_over_components": 0,
    "test_model_draws_and_observes_values_of_the_grid": 0,
    "test_model_without_data_draws_one_event": 1,
    "test_mutable_sites_of_the_model_are_kept": 0,
    "test_network_of_the_log_snr_is_saved_and_sampled": 0,
    "test_no_other_step_is_better_than_the_best": 0,
    "test_noise_gives_x_0_the_law_of_data_not_at_the_origin": 0,
    "test_noise_of_an_observation_has_its_sd": 1,
    "test_numbers_that_are_rebound_are_seen": 0,
    "test_open_cells_hold_all_that_is_outside": 0,
    "test_optimal_bound_on_correlated_data": 2,
    "test_other_latents_are_scored_as_mean_field_does": 0,
    "test_our_networks_take_each_row_by_itself": 2,
    "test_output_starts_at_zero_and_the_step_counts": 0,
    "test_outputs_lie_side_by_side_on_the_last_axis": 2,
    "test_p_values_are_uniform_whatever_the_number_of_replicates": 0,
    "test_pair_by_step_has_a_site_for_every_level": 1,
    "test_pits_of_the_right_model_are_uniform": 0,
    "test_plates_keep_their_names_across_gaps": 0,
    "test_posterior_and_evidence_are_those_of_the_gaussian_oracle": 1,
    "test_posterior_draws_with_known_entries_go_into_predictive": 1,
    "test_posterior_of_a_standard_normal_is_exact": 1,
    "test_power_counts_independent_entries_once_each_and_copies_once_together": 0,
    "test_power_is_the_regression_on_the_known_entries": 0,
    "test_radial_basis_reads_out_each_step_by_its_own_weights": 0,
    "test_radii_follow_the_power_law": 0,
    "test_sampled_steps_estimate_the_bound_of_all_steps": 1,
    "test_sites_have_their_names_and_shapes": 1,
    "test_step_loss_is_the_squared_error_of_the_noise": 3,
    "test_swiss_roll_ceilings": 1,
    "test_swiss_roll_log_density_equals_adaptive_quadrature": 1,
    "test_symbols_are_ranked_too": 0,
    "test_the_bridge_of_a_law_is_the_mixture_of_bridges": 0,
    "test_the_checkpoint_of_another_run_is_refused_and_left": 5,
    "test_the_last_integral_keeps_as_many_directions_as_the_rank_says": 1,
    "test_the_network_is_its_formula": 1,
    "test_the_only_look_keeps_the_dims_of_its_plates_and_trees_stay_out": 0,
    "test_the_result_is_read_from_its_file_without_the_package": 0,
    "test_the_rule_of_2015_has_its_own_column": 0,
    "test_the_same_code_over_other_data_compiles_nothing_and_has_their_numbers": 1,
    "test_the_summary_says_what_it_leaves_out": 0,
    "test_the_text_is_plain": 0,
    "test_three_routes_lead_to_one_bound": 0,
    "test_ties_are_broken_at_random": 0,
    "test_totals_are_those_of_the_leaves_and_of_the_call": 1,
    "test_training_does_not_depend_on_the_offset": 0,
    "test_training_moves_every_rate_but_the_first": 0,
    "test_trees_are_kept_by_netcdf": 0,
    "test_twist_stays_near_the_integral_where_r_joins_entries": 1,
    "test_two_pixels_show_one_leaf_with_the_stated_probability": 0,
    "test_upper_bound_needs_its_condition_and_the_correction_repairs_it": 0,
    "test_upward_curvature_counts_as_none": 0,
    "test_values_of_the_grid_come_back_bit_for_bit": 0,
    "test_what_does_not_fit_is_refused_by_name": 0,
    "test_what_is_far_out_is_said_in_standard_deviations": 0,
    "test_where_there_is_no_identity_the_first_losses_decide": 0,
}  # fmt: skip
"""Cases of a function that run by default, the others being long: each is compiled anew, and shows
what the first or another test shows."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as long the cases beyond a few, and what has to run an experiment first."""
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        name = item.name.split("[")[0]
        seen[name] += 1
        is_of_many = seen[name] > FEW_CASES.get(name, math.inf)
        is_run = "finished" in getattr(item, "fixturenames", ())
        if (is_of_many or is_run) and not item.get_closest_marker("slow"):
            item.add_marker("long")


COMPUTING = {
    "test_conditioning", "test_control", "test_dead_leaves", "test_discretised", "test_entropies",
    "test_ladder", "test_predictive", "test_readme", "test_smc_mixtures",
    "test_smc_oracles", "test_textures", "test_train",
}  # fmt: skip
"""Modules that compute for longer than they compile."""


@pytest.fixture(scope="module", autouse=True)
def _compilation(request: pytest.FixtureRequest) -> None:
    """All others compile without optimisations, which takes a quarter off their time."""
    is_plain = request.module.__name__ not in COMPUTING
    jax.config.update("jax_disable_most_optimizations", is_plain)


MOST_MAPS = 20_000
"""Memory maps of a process, a few for every compiled program, of which Linux allows 65,530."""


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Forget what one module compiled before the next runs out of maps and the process dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.collect()
        jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 within one test; arrays made before it stay float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key() -> PRNGKeyArray:
    """A fixed key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations unchecked within one test, as in use: what is refused then is our own doing."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
