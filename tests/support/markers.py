"""Which tests have which marker, by folder, file or function. `conftest.py` applies this table.

Tests that start processes, a browser or the network are slow as well: importing torch alone takes
seconds.
"""

from __future__ import annotations

MARKERS: dict[str, tuple[str, ...]] = {
    "network": (
        "history/test_eras.py::test_the_table_is_what_upstreams_history_gives",
        "project/test_patches.py::test_the_patches_cover_the_history",
        "project/test_patches.py::test_the_patch_applies_to_every_commit_of_its_range",
        "project/test_patches.py::test_the_patch_equals_the_grafts_on_every_commit_of_its_range",
        "wild/test_wild.py::test_a_model_from_github_is_answered_rightly_or_refused",
    ),
    "browser": (
        "apps/explorer/test_page_in_browser.py",
        "apps/extraction/test_contact_sheet_in_browser.py",
        "apps/explorer/test_page_accessibility.py",
        "apps/explorer/test_page_views.py",
        "apps/viz/test_notebook.py::test_jupyterlab_shows_pictures_and_the_page",
    ),
    "subprocess": (
        "apps/cli/test_cli.py::test_the_sample_runs_without_other_files",
        "apps/cli/test_cli.py::test_without_weights_or_network_the_error_names_the_next_step",
        "apps/cli/test_cli.py::test_help_does_not_wait_for_torch",
        "apps/cli/test_doctor.py",
        "apps/cli/test_early.py::test_it_takes_less_than_a_second",
        "apps/cli/test_early.py::test_it_needs_no_torch",
        "apps/cli/test_early.py::test_a_reader_that_leaves_is_no_traceback",
        "apps/cli/test_early.py::test_bash_completes",
        "apps/cli/test_model_options.py::test_a_file_is_read_before_upstreams_code_is_searched",
        "apps/cli/test_model_options.py::test_a_fresh_process_draws_what_a_training_checkpoint_sees",
        "apps/cli/test_report.py::test_an_error_shows_a_name_escaped",
        "apps/cli/test_report.py::test_a_bar_in_a_terminal_counts_failures",
        "apps/cli/test_report.py::test_quiet_still_has_warnings_and_verbose_says_where_code_comes_from",
        "apps/explorer/test_explore.py::test_help_does_not_wait_for_torch",
        "apps/extraction/test_attention_dataset.py::test_workers_of_a_loader_open_their_own",
        "apps/extraction/test_attention_dataset.py::test_without_pandas_the_error_names_the_extra",
        "apps/extraction/test_extract.py::test_workers_make_the_same_bytes",
        "apps/extraction/test_extract_datasets.py::test_workers_make_the_same_bytes",
        "apps/extraction/test_extract_interrupted.py",
        "apps/extraction/test_extract_killed.py",
        "apps/extraction/test_extract_ranks.py",
        "apps/viz/test_load_image.py::test_a_library_that_is_missing_is_named",
        "apps/viz/test_pictures.py::test_pyplot_is_never_imported",
        "apps/viz/test_figure.py",
        "apps/viz/test_notebook.py::test_every_cell_of_a_notebook_shows_something",
        "apps/viz/test_pictures_as_files.py::test_an_mp4_has_the_frames",
        "apps/weights/test_checkpoints.py::test_a_shard_is_recognised_by_its_class",
        "apps/weights/test_checkpoints.py::test_safetensors_without_their_library",
        "apps/weights/test_models.py::test_without_network_the_error_names_the_other_ways",
        "apps/weights/test_not_a_checkpoint.py::test_the_distributed_format_and_its_conversion",
        "apps/weights/test_source.py",
        "apps/weights/test_wheel.py",
        "history/test_eras.py::test_a_history_is_read_without_running_it",
        "history/test_eras.py::test_drift_that_holds_works_and_is_warned_of_once",
        "history/test_eras.py::test_a_live_model_of_upstreams_is_warned_of_by_its_own_classes",
        "history/test_eras.py::test_a_method_that_is_gone_is_drift",
        "history/test_eras.py::test_behaviour_that_breaks_is_refused_and_no_drift",
        "history/test_eras.py::test_comments_docstrings_and_format_are_no_drift",
        "history/test_eras.py::test_layers_without_a_model_are_recognised_and_not_yet_judged",
        "history/test_eras.py::test_one_warning_names_all_that_changed",
        "history/test_eras.py::test_upstream_without_its_source_is_known_by_what_it_does",
        "history/test_eras.py::test_where_warnings_are_errors_drift_leaves_nothing_behind",
        "kernels/test_nested.py::test_a_nested_pass_and_its_weights_compile_into_one_graph",
        "kernels/test_xformers_flags.py::test_a_process_that_starts_with_xformers_and_no_gpu_runs",
        "maps/test_attention_maps.py::test_without_safetensors_everything_but_files_works",
        "maps/test_results.py::test_a_line_imports_no_pictures",
        "maps/test_results.py::test_without_matplotlib_there_is_a_table_and_no_picture",
        "project/test_imports.py",
        "project/test_patches.py::test_the_first_patch_equals_the_grafts_on_pypis_first_commit",
        "project/test_project_files.py::test_no_file_is_larger_than_the_hook_lets_pass",
        "project/test_project_files.py::test_commands_that_forms_name_exist",
        "project/test_site.py",
        "project/test_types_page.py",
        "project/test_typing.py::test_mypy_finds_the_types_that_are_stated",
        "project/test_typing.py::test_pyright_finds_the_types_that_are_stated",
        "project/test_typing.py::test_types_need_no_torch",
        "proof/test_conformance.py",
        "proof/test_git.py",
        "proof/test_verify.py",
        "torch_features/test_deepcopy_pickle.py",
        "torch_features/test_distributed.py",
        "torch_features/test_fresh_processes.py",
        "wild/test_wild.py::test_a_model_from_github_is_answered_rightly_or_refused",
        "wild/test_wild.py::test_a_model_from_pypi_is_answered_rightly_or_refused",
    ),
    "slow": (
        "apps/cli/",
        "apps/demo/",
        "apps/explorer/test_explore.py",
        "apps/extraction/",
        "apps/viz/test_heatmap.py",
        "apps/viz/test_image_range.py::test_every_command_warns_in_a_line_and_hears_the_range",
        "apps/viz/test_channels.py::test_every_command_shows_the_model_its_channels",
        "apps/viz/test_pictures_as_files.py",
        "apps/viz/test_pictures.py",
        "apps/weights/test_checkpoints.py::test_any_format_fills_flat_and_chunked_models",
        "apps/weights/test_checkpoints.py::test_positions_are_resized_on_request_as_upstream_does",
        "apps/weights/test_checkpoints.py::test_safetensors_are_read_too",
        "apps/weights/test_foreign_layouts.py",
        "apps/weights/test_fuzz_files.py",
        "apps/weights/test_other_checkpoints.py",
        "grafting/test_at_kernel.py::test_what_is_taken_at_the_kernel_cannot_be_asked_in_a_graph",
        "grafting/test_events.py",
        "grafting/test_threads_and_leaks.py::test_ten_thousand_calls_leave_nothing_behind",
        "grafting/test_bit_identity.py::test_intermediate_layers_are_bit_identical",
        "grafting/test_hooks_and_adapters.py::test_features_and_gradients_are_unchanged",
        "kernels/test_nested_edits.py",
        "maps/test_record.py::test_a_full_matrix_does_not_outlive_its_layer",
        "maps/test_rollout.py::test_shares_are_made_where_the_images_are",
        "math/test_buffers.py::test_a_tensor_kept_by_reduce_is_never_overwritten",
        "project/test_advice.py",
        "project/test_readme.py::test_its_python_runs_from_top_to_bottom",
        "project/test_readme.py::test_each_block_of_the_readme_runs_in_an_empty_file",
        "project/test_shell_blocks.py::test_its_commands_run_one_after_the_other",
        "proof/",
        "torch_features/",
    ),
}
ALSO_SLOW = ("network", "browser", "subprocess")


def markers_of(name: str) -> set[str]:
    """Return the markers of a test by its name below tests/, such as ``maps/test_a.py::test_b``."""
    found = {
        marker
        for marker, places in MARKERS.items()
        if any(name == place or name.startswith((f"{place}::", f"{place}[")) for place in places)
        or any(name.startswith(place) for place in places if place.endswith("/"))
    }
    return found | ({"slow"} if found & set(ALSO_SLOW) else set())
