"""Bad input, fault by fault: what qpipe does about it, and the tests that hold that. The table is checked, not run.

Exit codes: 2 usage, 3 bad or unsafe model, 4 bad data, 5 environment, 6 cannot write.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLI = "pipeline/cli/test_cli_faults.py"
LOAD, SAVE, EXTERNAL = (f"pipeline/test_graph_{part}.py" for part in ("load", "save", "external"))
FILES, SOURCES, FEED = "pipeline/test_files.py", "pipeline/test_data_sources.py", "pipeline/test_data_feed.py"
MODELS = "pipeline/cli/test_cli_models.py"
RANDOM = "pipeline/test_quantize_random_graphs.py"
COLLECT, RESUME = "pipeline/test_collect.py", "pipeline/test_collect_resume.py"
FAULTS, OPSETS, DECIDE = "pipeline/test_quantize_faults.py", "pipeline/test_opsets.py", "pipeline/test_decide.py"
AWKWARD, TRIP = "conformance/test_operators_awkward.py", "pipeline/test_graph_roundtrip.py"
QCAL, LIBRARY, SESSION = (
    "pipeline/test_calibration_qcal.py",
    "plugins/test_plugin_library.py",
    "pipeline/test_session.py",
)

TABLE: dict[str, dict[str, str]] = {
    "model missing, a folder, not readable: 2, with a near name": {
        CLI: "test_a_missing_model_is_usage_and_names_a_near_one",
        LOAD: "test_a_missing_file_suggests_a_near_one test_a_folder_suggests_the_model_in_it "
        "test_a_file_without_permission_is_a_usage_error",
    },
    "empty, cut off, random, HTML, zip, git-lfs pointer: 3, named": {
        CLI: "test_a_file_of_another_kind_is_named",
        LOAD: "test_what_is_no_model_is_named test_a_git_lfs_pointer_says_what_to_run "
        "test_a_cut_off_model_is_refused_wherever_it_was_cut test_damaged_bytes_end_in_a_model_or_a_clear_error",
    },
    "invalid ONNX: 3, with reason and node": {
        CLI: "test_invalid_onnx_is_refused_with_the_checkers_reason",
        LOAD: "test_an_invalid_model_is_refused_with_reason_and_node",
    },
    "external data outside the folder: 3, never opened": {
        CLI: "test_weights_outside_the_folder_are_refused",
        EXTERNAL: "test_path_attacks_are_refused_before_anything_is_opened test_path_attacks_through_the_command_line",
    },
    "external data missing, short, wrong offset: 3, with both sizes": {
        CLI: "test_external_data_that_is_cut_off_is_named",
        EXTERNAL: "test_path_attacks_are_refused_before_anything_is_opened",
    },
    "data file with a hard link: 3, with the remedy": {
        EXTERNAL: "test_hard_links_are_read_on_request_or_after_the_remedy"
    },
    "the Hugging Face cache: accepted": {
        EXTERNAL: "test_the_hugging_face_cache_layout_is_read "
        "test_the_hugging_face_cache_layout_does_not_open_other_folders"
    },
    "model beyond 2 GiB: works, data outside": {
        SAVE: "test_a_large_model_is_never_one_message",
        EXTERNAL: "test_a_weight_larger_than_memory_is_read_in_part",
    },
    "a shape bomb: 3, before memory is asked for": {
        COLLECT: "test_a_memory_bomb_is_refused_before_it_runs test_a_limit_below_the_model_is_kept"
    },
    "pickles in data: 4, never run": {
        CLI: "test_pickles_are_refused_and_not_run",
        SOURCES: "test_pickles_are_refused_and_never_run test_torch_and_pickle_files_are_refused",
    },
    "arrays that declare too much: 4, by their header": {
        CLI: "test_an_array_that_declares_too_much_is_refused_before_it_is_read",
        SOURCES: "test_a_broken_array_is_refused_before_memory_is_asked_for test_a_zip_bomb_is_read_in_small_pieces",
    },
    "a data script raises: 4, with its own line": {
        CLI: "test_a_script_that_raises_shows_its_own_line",
        SOURCES: "test_what_a_script_raises_is_reported_with_its_own_line",
    },
    "no samples: 4": {
        CLI: "test_data_that_does_not_fit_is_refused_with_both_sides",
        SOURCES: "test_data_without_samples_is_an_error",
    },
    "missing or extra input, wrong type, rank, dimension: 4, both sides; safe casts said once": {
        CLI: "test_data_that_does_not_fit_is_refused_with_both_sides test_safe_casts_and_names_are_mended_once",
        FEED: "test_what_does_not_fit_is_shown_beside_what_would test_the_remedies_work",
    },
    "batches without elements: skipped and counted": {
        COLLECT: "test_batches_without_elements_are_skipped_and_counted",
        FEED: "test_only_empty_batches_are_no_data",
    },
    "ragged batches and lengths: the same statistics": {
        COLLECT: "test_ragged_lengths_are_fine test_any_batches_in_any_order_give_the_same_histograms"
    },
    "NaN and infinities in activations: 4 unless allowed, never in a range": {
        CLI: "test_activations_that_are_not_finite_are_refused_or_left_out",
        COLLECT: "test_values_that_are_not_finite test_an_output_that_is_not_finite_is_refused_at_once "
        "test_infinities_that_the_model_brings_along_are_masks",
    },
    "ranges of zero width, constants, one-sided, tiny, huge: scales finite and normal": {
        CLI: "test_constant_data_gives_finite_positive_scales",
        FAULTS: "test_inputs_that_are_always_the_same",
        "calibrate/test_ranges.py": "test_every_method_gives_a_usable_range test_any_magnitude_is_finite",
    },
    "a weight channel of zeros: scale 1": {
        CLI: "test_a_weight_channel_of_zeros_is_no_problem",
        FAULTS: "test_a_weight_channel_of_zeros_or_less_than_floats_hold",
    },
    "weights that are not finite: 3 with name and count, or the layer stays float": {
        MODELS: "test_weights_that_are_not_finite",
        CLI: "test_weights_that_are_not_finite_are_named_or_skipped",
        FAULTS: "test_a_weight_that_is_not_finite_is_refused_by_name test_such_a_layer_can_be_left_in_float",
    },
    "constants and inputs that are outputs: names, types, values stay": {
        MODELS: "test_constants_and_inputs_that_are_outputs",
        TRIP: "test_constants_and_inputs_that_are_outputs_survive",
        AWKWARD: "test_initializers_that_are_outputs_keep_their_values",
    },
    "a weight of several layers: one copy per layout, the float user untouched": {
        MODELS: "test_one_weight_in_two_layouts_and_in_a_float_user",
        AWKWARD: "test_a_weight_is_stored_once_per_layout",
        RANDOM: "test_the_quantized_model_equals_the_float_one_where_scales_are_fine",
    },
    "duplicate, empty, strange names: kept, but a name given twice, which runtimes refuse": {
        MODELS: "test_names_of_nodes",
        AWKWARD: "test_declared_domains_without_use_and_duplicate_node_names",
        TRIP: "test_nodes_get_names_of_their_own test_drawn_models_survive",
    },
    "names that ours would collide with: fresh ones": {
        MODELS: "test_names_that_qpipe_would_give",
        "pipeline/test_passes.py": "test_names_are_fresh_everywhere_and_found_in_linear_time",
    },
    "opsets below 10: 3 with the remedy; 10 to 12 per tensor": {
        CLI: "test_old_opsets_are_refused_with_the_remedy",
        OPSETS: "test_before_opset_10_the_remedy_is_named_and_works",
        DECIDE: "test_one_scale_per_tensor_below_opset_13_and_said_so",
    },
    "opsets and IR versions above the runtime: lowered, or said": {
        MODELS: "test_an_opset_beyond_the_runtime_is_lowered test_an_opset_that_stays_beyond_the_runtime_is_said",
        OPSETS: "test_an_opset_that_the_target_has_no_kernels_for_is_lowered "
        "test_an_opset_that_cannot_be_lowered_stays_and_is_said test_the_ir_version_is_what_the_content_needs",
    },
    "float16 and bfloat16 models: quantized, types kept": {
        "pipeline/test_forms_cast.py": "test_models_that_come_in_half_precision "
        "test_bfloat16_models_are_calibrated_in_a_float32_twin",
        AWKWARD: "test_half_precision_scales_come_with_an_opset_that_has_them test_a_bfloat16_model_keeps_its_type",
    },
    "If, Loop, Scan: bodies quantized, or said": {
        MODELS: "test_branches_are_quantized_where_calibration_saw_them",
        DECIDE: "test_bodies_are_quantized_and_read_outer_tensors_by_their_names "
        "test_a_branch_that_was_not_seen_stays_in_float test_loop_bodies_are_quantized",
    },
    "model-local functions: kept, and said; or inlined": {
        MODELS: "test_functions_are_kept_unless_inlined test_statistics_of_the_inlined_model",
        DECIDE: "test_calls_of_functions_and_what_is_in_them_are_kept",
    },
    "custom domains: 5 without their library, quantized around": {
        MODELS: "test_an_operator_of_an_unknown_domain test_a_library_that_does_not_load",
        AWKWARD: "test_custom_domains_are_quantized_around",
    },
    "sparse weights: dense where small, left with a reason where large": {
        MODELS: "test_sparse_weights",
        AWKWARD: "test_a_small_sparse_weight_is_quantized test_a_large_sparse_weight_stays_sparse_and_says_so",
    },
    "strings, sequences, whole numbers: untouched; nothing quantized is said loudly, 1 on request": {
        MODELS: "test_nothing_to_quantize_is_said_loudly test_strings_sequences_and_optionals_stay",
        FAULTS: "test_int_only_models_pass_with_a_warning",
        TRIP: "test_map_types_and_text_survive",
    },
    "a quantized model: 3 unless asked for": {
        MODELS: "test_a_quantized_model_is_refused_and_never_quantized_twice",
        CLI: "test_a_quantized_model_is_not_quantized_again",
        FAULTS: "test_a_quantized_model_is_not_quantized_again test_what_is_float_in_it_can_be_quantized_on_request",
    },
    "statistics of another model: 4, with the differences": {
        CLI: "test_statistics_of_another_model_are_refused",
        QCAL: "test_statistics_of_another_model_are_refused_with_the_differences",
    },
    "damaged or newer statistics: 4": {
        QCAL: "test_every_flipped_bit_is_noticed test_every_truncation_and_any_bytes_are_refused "
        "test_a_newer_schema_says_so"
    },
    "disk full: 6, nothing left, the old file whole": {
        CLI: "test_a_full_disk_leaves_nothing_behind",
        SAVE: "test_a_file_size_limit_leaves_no_partial_file test_a_full_disk_is_seen_before_writing",
        FILES: "test_a_file_size_limit_leaves_the_old_file",
    },
    "target exists, is a link, cannot be written: 6 without --force": {
        CLI: "test_an_existing_target_needs_force_and_the_input_is_never_the_target",
        SAVE: "test_a_link_is_replaced_itself_and_only_with_force",
        FILES: "test_a_read_only_folder_is_refused",
    },
    "killed at any moment: old or new, and resuming gives the same bytes": {
        SAVE: "test_killed_at_fifty_random_moments test_killed_at_every_file_operation",
        RESUME: "test_killed_at_any_moment_it_ends_with_the_same_bytes",
    },
    "Ctrl-C and SIGTERM: saved, 130 and 143": {
        CLI: "test_a_signal_saves_and_the_run_can_go_on",
        RESUME: "test_a_signal_finishes_the_batch_and_saves test_a_second_signal_stops_at_once",
    },
    "two writers of one target: the second is told": {
        SAVE: "test_a_second_save_is_told_who_writes",
        FILES: "test_a_second_writer_is_told_who_writes test_a_reused_process_number_is_another_process",
    },
    "a closed pipe, narrow or no terminal: no traceback": {
        CLI: "test_a_closed_pipe_is_no_error",
        "pipeline/test_report.py": "test_text_fits_the_width",
    },
    "CUDA asked for and not there: 5, never the CPU": {
        SESSION: "test_cuda_that_is_not_there_is_an_error_and_never_the_cpu test_cuda_that_loads_as_cpu_is_an_error"
    },
    "plugin missing, of another architecture, for another runtime: 5; the body takes over": {
        LIBRARY: "test_a_missing_library_says_how_to_build_it test_a_library_that_does_not_load "
        "test_an_old_onnxruntime_is_refused_before_it_fails_late",
        SESSION: "test_plugin_that_does_not_load_is_said_and_does_not_stop_other_models",
    },
    "many tiny batches, one huge one: flat memory": {
        COLLECT: "test_memory_does_not_grow_with_the_number_of_batches test_a_large_batch_is_run_in_pieces"
    },
    "data that changes between runs: noticed by its fingerprint": {
        RESUME: "test_other_data_is_refused",
        FEED: "test_a_fingerprint_tells_data_apart",
    },
    "biases beyond int32, products of scales that underflow: float, or moved, and said": {
        "pipeline/test_forms_bias.py": "test_int32_holds_what_it_is_given_or_nothing "
        "test_a_bias_beyond_int32_moves_behind_and_is_told"
    },
}


@pytest.mark.parametrize("fault", TABLE)
def test_a_fault_is_held_by_tests_that_exist(fault: str) -> None:
    for file, names in TABLE[fault].items():
        tree = ast.parse((TESTS / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(names.split()) <= there, (file, set(names.split()) - there)
