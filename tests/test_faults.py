"""Everything that goes wrong around a run, and the answer to it. `ANSWERS` is the table: a title
for each fault, and the tests that hold the answer, here or in the file named before the dot.

Faults are real where they can be: processes die, disks fill, signals arrive. A fork of this process
stands for a run started from a shell: the same code and exit codes, without seconds of importing.
Exit codes: 0 done, 2 the user can mend it (one line), 3 stopped safely, 128 + n by signal n.
"""
import ast
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata

import pytest
import torch

import clip_model
import train_clipfit
from data import class_prompts, DataError, open_dataset
from device import guard, load_checkpoint, Parser
from test_train_clipfit import assert_same_run, refusal, weights
from train_clipfit import add_gradient, get_args, main

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"

ANSWERS = {
    "killed while a checkpoint is written": [
        "test_device.test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads",
        "test_train_clipfit.test_a_killed_process_resumes_to_the_same_bits",
        "test_train_clipfit.test_stopping_at_any_step_and_resuming_changes_no_bit",
        "test_train_contrastive."
        "test_a_kill_at_any_moment_and_the_same_command_give_the_same_bits",
        "test_distributed.test_two_processes_of_which_one_was_killed_go_on_to_the_same_bits",
        "test_clip_model.test_an_interrupted_save_leaves_the_older_file"],
    "SIGTERM or Ctrl-C while training": [
        "test_train_clipfit.test_a_killed_process_resumes_to_the_same_bits",
        "test_sigterm_while_workers_read_saves_and_resumes_to_the_same_bits",
        "test_train_contrastive.test_sigterm_saves_and_the_run_goes_on_to_the_same_bits",
        "test_device.test_signals_go_back_to_whoever_had_them"],
    "SIGTERM while testing": ["test_sigterm_while_testing_says_one_line_and_resumes"],
    "a second Ctrl-C while saving": [
        "test_a_second_ctrl_c_while_saving_exits_at_once_and_keeps_the_old_checkpoint",
        "test_device.test_one_signal_saves_and_a_second_exits_at_once"],
    "the disk is full": [
        "test_a_disk_that_fills_up_stops_safely_and_the_run_goes_on_later",
        "test_device.test_a_full_disk_stops_safely_and_keeps_the_old_checkpoint",
        "test_device.test_a_write_that_reads_back_wrong_is_not_put_in_place"],
    "the output folder cannot be written or is a file": [
        "test_an_unusable_output_folder_is_refused_before_any_work",
        "test_device.test_a_folder_that_is_not_free_is_refused",
        "test_device.test_a_read_only_folder_is_refused"],
    "the output folder holds another run": [
        "test_a_held_folder_is_refused_without_resume",
        "test_device.test_a_folder_that_is_not_free_is_refused",
        "test_train_clipfit.test_a_table_and_a_run_do_not_take_each_other_s_folder"],
    "resuming with other flags": [
        "test_resuming_with_another_method_or_data_is_refused",
        "test_resuming_with_other_flags_that_change_no_result_gives_the_same_bits",
        "test_a_checkpoint_without_its_config_is_still_checked",
        "test_train_clipfit.test_a_finished_run_is_not_run_again_and_another_is_refused",
        "test_train_contrastive.test_a_finished_run_is_not_run_again_and_another_is_refused",
        "test_train_contrastive.test_a_named_checkpoint_goes_on_in_another_folder",
        "test_train_clipfit.test_a_checkpoint_of_another_run_is_refused"],
    "a damaged checkpoint": [
        "test_a_damaged_checkpoint_gives_way_to_the_one_before_to_the_same_bits",
        "test_device.test_each_kind_of_damage_is_named",
        "test_device.test_the_previous_checkpoint_is_kept_and_steps_in",
        "test_clip_model.test_a_bad_file_is_named_as_what_it_is_and_never_run",
        "test_clip_model.test_mutated_files_load_or_are_refused_in_one_line"],
    "code in a checkpoint": [
        "test_a_checkpoint_with_code_is_refused_by_every_flag_that_reads_one",
        "test_device.test_code_in_a_checkpoint_is_refused_and_does_not_run",
        "test_clip_model.test_a_bad_file_is_named_as_what_it_is_and_never_run",
        "test_clip_model.test_mutated_files_load_or_are_refused_in_one_line",
        "test_clip_model.test_the_payload_of_these_tests_would_run"],
    "names with the prefixes of wrappers": [
        "test_clip_model.test_prefixes_of_wrappers_are_taken_off_and_reported",
        "test_clip_model.test_weights_are_found_inside_a_training_checkpoint"],
    "weights of another architecture": [
        "test_clip_model.test_a_config_is_inferred_from_shapes_alone",
        "test_clip_model.test_weights_of_another_architecture_name_the_first_key",
        "test_train_clipfit.test_weights_of_another_model_are_refused"],
    "saved on one kind of device, resumed on another": [
        "test_device.test_the_random_state_survives_a_checkpoint",
        "test_devices.test_a_checkpoint_is_evaluated_there_and_on_the_cpu",
        "test_devices.test_a_contrastive_checkpoint_is_evaluated_there_and_on_the_cpu"],
    "the device asked for is absent": [
        "test_device.test_a_device_that_is_not_here_is_refused_and_what_is_here_is_said",
        "test_device.test_a_number_beyond_the_gpus_is_refused"],
    "torch_npu is missing or broken": [
        "test_device.test_a_torch_npu_that_does_not_import_is_quoted"],
    "torchvision is missing or broken": [
        "test_a_hostile_environment_changes_nothing",
        "test_data.test_downloads_go_through_torchvision_and_say_what_failed",
        "test_repo.test_torchvision_and_optional_packages_are_imported_where_they_are_used"],
    "a loss or gradient that is not finite": [
        "test_a_batch_without_a_finite_gradient_moves_no_more_than_a_zero_gradient",
        "test_three_such_batches_in_a_row_stop_with_code_3_and_a_finite_checkpoint",
        "test_device.test_what_would_not_load_again_is_not_saved"],
    "fp16 overflows at first": ["test_overflows_while_fp16_finds_its_scale_are_no_failure"],
    "out of memory": [
        "test_out_of_memory_ends_with_a_hint_and_the_last_checkpoint",
        "test_device.test_exit_codes_are_real"],
    "a damaged image": [
        "test_data.test_damaged_files_and_bombs_are_refused_with_name_and_reason",
        "test_data.test_evaluation_skips_and_preload_drops_unreadable_images",
        "test_data.test_a_few_missing_images_are_noted_and_many_refused",
        "test_train_clipfit.test_a_truncated_shot_is_left_out_and_counted",
        "test_train_clipfit."
        "test_test_images_that_cannot_be_read_are_named_and_too_many_are_refused",
        "test_train_clipfit.test_an_unreadable_image_adds_nothing_to_the_gradient",
        "test_train_contrastive.test_images_that_cannot_be_read_are_replaced_and_counted"],
    "pairs without captions": [
        "test_train_contrastive.test_pairs_without_captions_are_refused",
        "test_distributed.test_pairs_without_captions_end_all_processes_with_one_reason"],
    "pairs with equal images or captions": [
        "test_train_contrastive.test_equal_captions_do_not_count_against_each_other",
        "test_train_contrastive.test_a_batch_whose_captions_are_all_equal_has_no_negatives"],
    "a tokenizer of another text tower": [
        "test_train_contrastive.test_a_wrong_command_line_gets_one_line",
        "test_train_contrastive.test_a_wrong_model_gets_one_line",
        "test_train_contrastive.test_a_vocabulary_larger_than_the_text_tower_is_refused"],
    "an image bomb": ["test_data.test_damaged_files_and_bombs_are_refused_with_name_and_reason"],
    "odd kinds of image": [
        "test_data.test_every_colour_mode_comes_out_as_the_right_rgb",
        "test_data.test_orientation_is_applied_and_the_first_frame_of_an_animation_is_taken",
        "test_data.test_a_strip_of_one_pixel_costs_no_gigabyte"],
    "odd names of files and classes": [
        "test_odd_names_of_files_and_classes_survive_a_whole_run",
        "test_data.test_split_folders_litter_and_link_loops_are_understood",
        "test_report.test_names_no_font_can_write_become_numbers_with_a_legend"],
    "classes with too few images": [
        "test_data.test_bad_folders_are_refused_by_name",
        "test_data.test_short_classes_are_taken_whole_in_order_and_named",
        "test_data.test_tiny_classes_keep_a_training_and_then_a_test_image",
        "test_more_shots_than_images_take_all_with_a_note"],
    "odd tables": [
        "test_data.test_tables_of_every_dialect_say_the_same",
        "test_data.test_bad_tables_are_refused_with_what_was_found",
        "test_data.test_absolute_paths_are_taken_only_outside_zips",
        "test_a_table_of_one_row_or_of_a_giant_cell_is_refused",
        "test_pairs.test_bad_tables_are_refused_with_what_they_hold",
        "test_pairs.test_tables_of_every_kind_keep_words_that_look_like_nothing",
        "test_pairs.test_the_flickr30k_table_with_its_dirty_row_is_repaired"],
    "a batch larger than the data, or odd at its end": [
        "test_data."
        "test_a_set_smaller_than_the_batch_is_one_short_batch_and_larger_ones_drop_the_rest",
        "test_train_contrastive.test_batches_of_any_size_that_fits_train",
        "test_train_contrastive.test_a_wrong_command_line_gets_one_line"],
    "hostile texts": [
        "test_odd_names_of_files_and_classes_survive_a_whole_run",
        "test_tokenizer.test_awkward_strings_equal_the_twin",
        "test_tokenizer.test_a_long_text_keeps_its_end_of_text_and_is_counted",
        "test_tokenizer.test_huge_texts_take_seconds"],
    "archives that reach outside": [
        "test_data.test_zips_that_are_broken_or_reach_outside_are_refused",
        "test_pairs.test_a_hostile_tar_gives_its_sound_samples_and_writes_nothing",
        "test_pairs.test_sparse_members_are_not_read",
        "test_pairs.test_a_damaged_shard_gives_what_lies_before_the_damage"],
    "a download that fails": [
        "test_clip_model.test_a_broken_transfer_goes_on_where_it_stopped",
        "test_clip_model.test_a_damaged_partial_or_cached_file_is_fetched_again",
        "test_clip_model.test_a_redirect_away_from_https_is_refused",
        "test_clip_model.test_a_server_without_ranges_is_read_from_the_start",
        "test_clip_model.test_lasting_trouble_says_what_to_do_by_hand",
        "test_clip_model.test_offline_the_error_names_address_hash_and_place",
        "test_clip_model.test_passing_trouble_of_a_server_is_survived",
        "test_clip_model.test_processes_that_fetch_at_once_fetch_once"],
    "the data changes between runs": [
        "test_data_that_changed_is_named_on_resume",
        "test_train_clipfit.test_other_base_weights_or_other_images_are_another_run"],
    "a worker dies or hangs": [
        "test_a_worker_that_dies_or_hangs_is_named_with_what_it_was_reading",
        "test_pairs.test_a_dead_worker_is_named_with_the_image_it_was_reading"],
    "workers are spawned, not forked": [
        "test_data.test_batches_do_not_depend_on_workers_nor_on_how_they_start"],
    "one of several processes fails": [
        "test_when_one_process_fails_all_end_and_the_checkpoint_is_whole",
        "test_device.test_one_failing_process_ends_the_others_and_tells_its_own_error",
        "test_device.test_several_processes_are_exact_and_agree"],
    "a process with fewer images": [
        "test_a_process_without_images_takes_the_same_steps",
        "test_distributed.test_a_contrastive_batch_smaller_than_the_processes_is_exact",
        "test_data.test_a_rank_without_images_gets_an_empty_batch"],
    "WORLD_SIZE set by hand, or a busy port": [
        "test_a_busy_port_is_named",
        "test_train_contrastive.test_a_port_of_zero_is_refused",
        "test_device.test_half_of_torchruns_environment_is_explained"],
    "numbers out of range": [
        "test_numbers_out_of_range_are_refused_at_once",
        "test_a_stored_command_line_is_checked_like_a_typed_one",
        "test_train_clipfit.test_a_wrong_command_line_gets_one_line",
        "test_train_clipfit.test_seed_zero_is_a_seed",
        "test_data.test_zero_shots_are_an_empty_set_and_nonsense_is_refused"],
    "a flag given twice": ["test_a_list_given_twice_is_joined_and_a_number_is_refused"],
    "the clock jumps": ["test_a_clock_that_jumps_changes_nothing"],
    "no terminal, a closed pipe, a poor locale": [
        "test_a_hostile_environment_changes_nothing",
        "test_names_that_a_locale_cannot_read_are_refused",
        "test_device.test_a_closed_pipe_and_a_c_locale_do_not_end_a_run",
        "test_device.test_progress_is_for_terminals_only"],
    "loops of links, closed folders": [
        "test_a_closed_folder_is_named", "test_links_that_lead_nowhere_are_missing_images",
        "test_data.test_split_folders_litter_and_link_loops_are_understood"],
    "~, variables and backslashes in paths": [
        "test_home_and_variables_are_expanded_in_every_path_flag",
        "test_a_windows_path_elsewhere_is_refused_in_one_line",
        "test_clip_model.test_home_and_environment_variables_in_a_path_are_expanded",
        "test_data.test_tables_of_every_dialect_say_the_same"],
    "no home, no cache, no TMPDIR": [
        "test_without_a_home_the_cache_is_explained",
        "test_a_hostile_environment_changes_nothing",
        "test_clip_model.test_a_folder_that_cannot_be_written_is_reported"],
    "a tower without what is tuned": [
        "test_train_clipfit.test_a_resnet_tower_tunes_the_text_biases_and_keeps_its_statistics"],
    "fields of a template": [
        "test_both_styles_of_template_mean_the_same_and_others_are_refused",
        "test_data.test_templates_cover_every_known_set_and_bad_ones_are_refused"],
    "a checkpoint of an earlier version": ["test_a_checkpoint_of_the_first_format_goes_on"],
}


def test_every_answer_of_the_table_is_a_test():
    names = {path.stem: {node.name for node in ast.parse(path.read_text("utf-8")).body
                         if isinstance(node, ast.FunctionDef)}
             for path in pathlib.Path(__file__).parent.glob("test_*.py")}
    listed = set()
    for fault, tests in ANSWERS.items():
        assert tests, fault
        for test in tests:
            file, _, name = test.rpartition(".")
            assert name in names[file or "test_faults"], f"{fault}: there is no {test}"
            listed |= set() if file else {name}
    here = {name for name in names["test_faults"] if name.startswith("test_")}
    assert here - listed == {"test_every_answer_of_the_table_is_a_test"}


# -----------------------------------------------------------------------------
# What the tests share: runs of nine steps on a model of 0.1 M numbers beside its embedding

def begin(work, *arguments):
    """Fork; the child ends with the code that work(*arguments) gives -> (process id, files)."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    process = os.fork()
    if process:
        return process, out, err
    code = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
        code = work(*arguments)
    except SystemExit as error:  # argparse
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(child, seconds=60):
    """Wait for what `begin` gave -> (exit code, 128 + n after signal n; stdout; stderr)."""
    process, out, err = child
    deadline, done = time.monotonic() + seconds, 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
    texts = []
    for file in (out, err):
        with file:
            file.seek(0)
            texts.append(file.read().decode())
    assert done, f"still running after {seconds} s: {texts}"
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code, *texts)


def in_child(work, *arguments):
    return end(begin(work, *arguments))


def script(*flags):
    return guard(main, get_args, [str(flag) for flag in flags])


def at_step(number, fault):
    """From now on step `number` of training, counted from 1, begins with fault(). For a child."""
    taken = []

    def counted(*arguments):
        taken.append(1)
        if len(taken) == number:
            fault()
        return add_gradient(*arguments)
    train_clipfit.add_gradient = counted


def stop_at(number, sign=signal.SIGTERM):
    at_step(number, lambda: os.kill(os.getpid(), sign))


def one_line(text, *words):
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert all(word in text for word in words), text


def until(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def make_pictures(folder, classes=("red", "green", "blue"), counts=(("train", 6), ("test", 3))):
    """Noise with one bright channel, as PPM: the same bytes whichever Pillow is installed."""
    for number, name in enumerate(classes):
        for part, count in counts:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = bytearray(random.Random(f"{number} {part} {i}").randbytes(32 * 32 * 3))
                pixels[number % 3::3] = bytes([255]) * 1024
                (folder / part / name / f"{i}.ppm").write_bytes(b"P6 32 32 255\n" + pixels)
    return folder


TINY = {"model": "tiny-vit", "weights": "none", "batch_size": 4, "epochs": 3, "log_every": 1,
        "save_every": 1, "workers": 0}


def flags(data, out, *more, **changed):
    options = {"data": data, "output_dir": out, **TINY, **changed}
    return [f"--{name}={value}" for name, value in options.items()] + list(more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of a run that nothing disturbed: three epochs of three steps."""
    folder = tmp_path_factory.mktemp("whole")
    main(get_args([str(flag) for flag in flags(pictures, folder)]))
    return folder


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory):
    """The folder of the same run, stopped after its fifth step."""
    folder = tmp_path_factory.mktemp("stopped")

    def work():
        stop_at(5)
        return script(*flags(pictures, folder))
    assert in_child(work)[0] == 143
    assert load_checkpoint(folder / "checkpoint_last.pt")["step"] == 5
    return folder


def finish(pictures, folder, whole):
    """Go on with the run in `folder`; in the end it equals the one that nothing disturbed."""
    code, _, err = in_child(script, *flags(pictures, folder))
    assert code == 0, err
    assert_same_run(whole, folder)


# -----------------------------------------------------------------------------
# Signals

def test_sigterm_while_workers_read_saves_and_resumes_to_the_same_bits(pictures, whole, tmp_path):
    def work(stop):
        train_clipfit.IN_MEMORY = 0  # so that workers read the training images too
        if stop:
            stop_at(4)
        return script(*flags(pictures, tmp_path, workers=2))
    code, _, err = in_child(work, True)
    assert code == 143 and load_checkpoint(tmp_path / "checkpoint_last.pt")["step"] == 4
    one_line(err, "SIGTERM after saving", "--resume auto")
    assert in_child(work, False)[0] == 0
    assert_same_run(whole, tmp_path)


def test_sigterm_while_testing_says_one_line_and_resumes(pictures, whole, tmp_path):
    def work():
        def stuck(*arguments):
            if load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 9:
                (tmp_path / "testing").touch()
                time.sleep(60)
        evaluate = train_clipfit.evaluate
        train_clipfit.evaluate = lambda *arguments: (
            (tmp_path / "run" / "checkpoint_last.pt").exists() and stuck(), evaluate(*arguments))[1]
        return script(*flags(pictures, tmp_path / "run"))
    child = begin(work)
    until(tmp_path / "testing")
    os.kill(child[0], signal.SIGTERM)
    code, _, err = end(child, 10)
    assert code == 143
    one_line(err, "interrupted by SIGTERM", "--resume auto")
    finish(pictures, tmp_path / "run", whole)


def test_a_second_ctrl_c_while_saving_exits_at_once_and_keeps_the_old_checkpoint(
        pictures, whole, tmp_path):
    def work():
        def stuck(state, file):
            file.write(b"half of it")
            file.flush()
            (tmp_path / "saving").touch()
            time.sleep(60)

        def fault():
            torch.save = stuck
            os.kill(os.getpid(), signal.SIGINT)
        at_step(5, fault)
        return script(*flags(pictures, tmp_path / "run"))
    child = begin(work)
    until(tmp_path / "saving")
    os.kill(child[0], signal.SIGINT)
    code, _, err = end(child, 10)
    assert code == 130 and "Traceback" not in err
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 4
    assert (tmp_path / "run" / "checkpoint_last.pt.tmp").exists()
    finish(pictures, tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob("*.tmp"))


# -----------------------------------------------------------------------------
# The output folder and the disk

def test_a_disk_that_fills_up_stops_safely_and_the_run_goes_on_later(pictures, whole, tmp_path):
    def work():
        at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
        return script(*flags(pictures, tmp_path))
    code, _, err = in_child(work)
    assert code == 3 and load_checkpoint(tmp_path / "checkpoint_last.pt")["step"] == 4
    one_line(err, "could not be written", "bytes", "are free", "intact")
    finish(pictures, tmp_path, whole)


def test_an_unusable_output_folder_is_refused_before_any_work(pictures, capsys, tmp_path):
    """The weights are not there either: which of the two is named tells what came first."""
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        text = refusal(capsys, *flags(pictures, tmp_path / place, weights="nowhere.pt"))
        assert "cannot be used" in text and "--output-dir" in text


def test_a_held_folder_is_refused_without_resume(pictures, capsys, whole):
    before = (whole / "checkpoint_last.pt").read_bytes()
    text = refusal(capsys, *flags(pictures, whole, resume="none"))
    assert "already holds a run" in text and "--overwrite" in text
    assert (whole / "checkpoint_last.pt").read_bytes() == before


# -----------------------------------------------------------------------------
# Resuming

@pytest.mark.parametrize("changed, words", [
    ({"batch_size": 6}, "batch_size was 4, now 6"), ({"epochs": 4}, "epochs was 3, now 4"),
    ({"lr": 0.1}, "lr was 0.002, now 0.1"), ({"shots": 3}, "shots was 4, now 3"),
    ({"template": "{}"}, "template was None, now '{}'"), ({"seed": 5}, "seed was 1, now 5"),
    ({"model": "tiny-rn"}, "model was 'tiny-vit', now 'tiny-rn'")])
def test_resuming_with_another_method_or_data_is_refused(pictures, stopped, capsys, changed, words):
    before = (stopped / "checkpoint_last.pt").read_bytes()
    assert words in refusal(capsys, *flags(pictures, stopped, **changed))
    assert (stopped / "checkpoint_last.pt").read_bytes() == before


def test_resuming_with_other_flags_that_change_no_result_gives_the_same_bits(
        pictures, stopped, whole, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    code, _, err = in_child(script, *flags(pictures, folder, workers=1, log_every=4, save_every=0,
                                           eval_batch_size=2, device="cpu"))
    assert code == 0, err
    for ours, theirs in zip(weights(folder), weights(whole)):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_without_its_config_is_still_checked(pictures, stopped, capsys, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "config.json").unlink()
    assert "shots 4 there and 2 here" in refusal(capsys, *flags(pictures, folder, shots=2))


def test_data_that_changed_is_named_on_resume(stopped, capsys, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    pictures = make_pictures(tmp_path / "pictures")
    (pictures / "test/red/new.ppm").write_bytes((pictures / "test/red/0.ppm").read_bytes())
    text = refusal(capsys, *flags(pictures, folder))
    assert "split_sha256 was" in text and "shots_sha256" not in text


# -----------------------------------------------------------------------------
# Damaged, hostile and old checkpoints

def test_a_damaged_checkpoint_gives_way_to_the_one_before_to_the_same_bits(
        pictures, stopped, whole, capsys, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    last, previous = folder / "checkpoint_last.pt", folder / "checkpoint_prev.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    finish(pictures, folder, whole)
    assert "continuing from checkpoint_prev.pt" in (folder / "log.txt").read_text()
    for path in (last, previous):
        path.write_bytes(b"<html>")
    (folder / "results.json").unlink()
    assert "is a web page" in refusal(capsys, *flags(pictures, folder))
    assert previous.read_bytes() == b"<html>"  # and nothing started over by itself


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_checkpoint_with_code_is_refused_by_every_flag_that_reads_one(pictures, capsys, tmp_path):
    folder, canary = tmp_path / "run", tmp_path / "canary"
    folder.mkdir()
    path = folder / "checkpoint_last.pt"
    torch.save({"format": "clipfit/1", "weights": Payload(canary)}, path)
    (folder / "evil.json").write_bytes(path.read_bytes())
    for given in (flags(pictures, folder), flags(pictures, tmp_path / "other", "--resume", path),
                  flags(pictures, folder, "--eval-only"),
                  ["--data", pictures, "--weights", path, "--output-dir", tmp_path / "other"],
                  flags(folder / "evil.json", tmp_path / "other"),
                  ["--config", folder / "evil.json"]):
        refusal(capsys, *given)
        assert not canary.exists(), given


def test_a_checkpoint_of_the_first_format_goes_on(pictures, whole, tmp_path):
    """clipfit-1.pt is `stopped` as the first version of this repository wrote it."""
    path = GOLDEN / "clipfit-1.pt"
    assert path.stat().st_size < 200_000 and load_checkpoint(path)["step"] == 5
    code, _, err = in_child(script, *flags(pictures, tmp_path / "new", "--resume", path))
    assert code == 0, err
    code, out, err = in_child(script, *flags(pictures, tmp_path / "x", "--resume", path,
                                             "--eval-only"))
    assert code == 0 and "gain" in out, err
    for ours, theirs in zip(weights(tmp_path / "new"), weights(whole)):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in theirs)


# -----------------------------------------------------------------------------
# Memory and numbers

def test_out_of_memory_ends_with_a_hint_and_the_last_checkpoint(pictures, whole, tmp_path):
    def work():
        at_step(5, lambda: torch.empty(2 ** 50))
        return script(*flags(pictures, tmp_path))
    code, _, err = in_child(work)
    assert code == 3 and load_checkpoint(tmp_path / "checkpoint_last.pt")["step"] == 4
    one_line(err, "out of memory", "--micro-batch", "--precision bf16", "checkpoint is intact")
    finish(pictures, tmp_path, whole)


def bad_batches(numbers, kind):
    """From now on those steps meet an infinite image, a gradient that is nan, or one of zeros."""
    taken = []

    def faulty(run, model, images, *rest):
        taken.append(1)
        bad = len(taken) in numbers
        losses = add_gradient(run, model, images * math.inf if bad and kind == "image" else images,
                              *rest)
        for p in model.parameters() if bad else ():
            if p.grad is not None and kind != "image":
                p.grad.mul_(math.nan).nan_to_num_(nan=0.0 if kind == "zero" else math.nan)
        return losses
    train_clipfit.add_gradient = faulty


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_batch_without_a_finite_gradient_moves_no_more_than_a_zero_gradient(
        pictures, tmp_path, log_every):
    def work(kind):
        bad_batches((2, 5, 6, 8), kind)
        return script(*flags(pictures, tmp_path / kind, log_every=log_every, save_every=0))
    for kind in ("zero", "image", "gradient"):
        code, _, err = in_child(work, kind)
        assert code == 0 and err == "", err
    for kind in ("image", "gradient"):
        for ours, theirs in zip(weights(tmp_path / kind), weights(tmp_path / "zero")):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        lines = [line for line in (tmp_path / kind / "log.txt").read_text().splitlines()
                 if "step skipped" in line]
        assert len(lines) == 4 and all(line.count(".ppm") == 4 for line in lines)
    assert "skipped" not in (tmp_path / "zero" / "log.txt").read_text()


@pytest.mark.parametrize("kind", ["image", "gradient"])
def test_three_such_batches_in_a_row_stop_with_code_3_and_a_finite_checkpoint(
        pictures, tmp_path, kind):
    def work():
        bad_batches((4, 5, 6, 7), kind)
        return script(*flags(pictures, tmp_path))
    code, out, err = in_child(work)
    assert code == 3 and out.count("step skipped") == 2
    one_line(err, "3 steps in a row", ".ppm", "checkpoint is intact", "--lr")
    stored = load_checkpoint(tmp_path / "checkpoint_last.pt")
    assert stored["step"] == 5
    assert all(x.isfinite().all() for part in weights(tmp_path) for x in part.values())


def test_overflows_while_fp16_finds_its_scale_are_no_failure(pictures, tmp_path):
    """A scale so large that more steps overflow in a row than a run without a scale survives."""
    def work():
        scaler = torch.amp.GradScaler
        torch.amp.GradScaler = lambda *given, **named: scaler(*given, init_scale=2.0 ** 24, **named)
        return script(*flags(pictures, tmp_path, precision="fp16"))
    code, _, err = in_child(work)
    assert code == 0 and err == ""
    stored = load_checkpoint(tmp_path / "checkpoint_last.pt")
    skipped = 24 - torch.tensor(stored["scaler"]["scale"]).log2().item()
    assert 4 <= skipped < 9 and stored["step"] == 9
    assert stored["optimizer"]["state"]  # and the other steps were taken


# -----------------------------------------------------------------------------
# Data

def test_odd_names_of_files_and_classes_survive_a_whole_run(pictures, tmp_path):
    names = ["猫 🐱", 'a "quoted", it\'s/slashed_\\name', "x\ny", "very " * 20_000, "-1",
             unicodedata.normalize("NFD", "Crème brûlée"), "&lt;b&gt; &amp;amp; \x07\x1b[31m",
             "<|endoftext|>"]
    images = [path.read_bytes() for path in sorted(pictures.rglob("*.ppm"))]
    rows = [{"path": "", "label": "no path"}, {"path": "a.ppm", "label": " "}]
    for number, name in enumerate(names):
        folder = tmp_path / "set" / unicodedata.normalize("NFD", f"é {number} ") / ("n" * 200)
        folder.mkdir(parents=True)
        for i, split in enumerate(("train", "test")):
            path = folder / f"{'😀 ' * 30}{i}.ppm"
            path.write_bytes(images[2 * number + i])
            rows.append({"path": str(path.relative_to(tmp_path / "set")), "label": name,
                         "split": split})
    table = tmp_path / "set" / "a table.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    out = tmp_path / "out 猫" / "a b"
    code, said, err = in_child(script, *flags(table, out, shots=1, export="safetensors"))
    assert code == 0, err
    assert "2 rows without path or label left out" in said
    assert "1 class prompts are cut to 77 tokens" in said
    assert json.loads((out / "confusion_test.json").read_text("utf-8"))["classes"] == sorted(
        name.strip() for name in names)
    assert len(json.loads((out / "shots.json").read_text("utf-8"))["train"]) == len(names)
    assert clip_model.load(out / "export" / "clip.safetensors").config


def test_more_shots_than_images_take_all_with_a_note(pictures, tmp_path):
    code, out, err = in_child(script, *flags(pictures, tmp_path, "--dry-run", shots=100))
    assert code == 0, err
    assert "fewer than 100 train images, taken whole: blue (6), green (6), red (6)" in out


def test_a_table_of_one_row_or_of_a_giant_cell_is_refused(capsys, tmp_path):
    table = tmp_path / "t.csv"
    for text, words in (("path,label\na.ppm,x\n", "two or more"),
                        ("path,label\na.ppm," + "x" * 1_000_000, "two or more")):
        table.write_text(text)
        assert words in refusal(capsys, *flags(table, tmp_path / "out"))


def test_a_closed_folder_is_named():
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, which only we may enter
        folder = pathlib.Path(folder)
        make_pictures(folder / "set")
        folder.chmod(0o777)
        (folder / "set/train/red").chmod(0)

        def work():
            if os.geteuid() == 0:  # who may read everything
                os.setuid(65534)
            return script(*flags(folder / "set", folder / "out"))
        code, _, err = in_child(work)
        (folder / "set/train/red").chmod(0o755)
    assert code == 2
    one_line(err, "cannot", "train/red", "Permission denied")


def test_links_that_lead_nowhere_are_missing_images(tmp_path):
    pictures = make_pictures(tmp_path / "set")
    (pictures / "train/red/loop.ppm").symlink_to("loop.ppm")
    train = open_dataset(pictures, "train")
    train.check_files()
    assert any("1 of 19 train images are missing" in note and "loop.ppm" in note
               for note in train.notes)
    (pictures / "train/red/gone.ppm").symlink_to("nowhere.ppm")
    with pytest.raises(DataError, match="2 of 20 train images"):
        open_dataset(pictures, "train").check_files()


def test_both_styles_of_template_mean_the_same_and_others_are_refused(pictures, capsys, tmp_path):
    assert class_prompts(["a_b"], "{}, {}") == class_prompts(["a_b"], "{c}, {c}") == ["a b, a b"]
    for field in ("{d}", "{0}", "{c!r}", "{c.__class__}", "{}}{name}"):
        text = refusal(capsys, *flags(pictures, tmp_path, template=f"a photo of {field}"))
        assert "unknown field" in text and "write {} where" in text


# -----------------------------------------------------------------------------
# Workers

FAULTY = """
import os, sys, time
import torch.utils.data
import data, train_clipfit
from device import guard

fault, train_clipfit.IN_MEMORY = sys.argv[1], 0
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
read = data.ImageSet.__getitem__

def faulty(self, key):
    item = read(self, key)
    if key[0] == 1 and self.paths[key[1]] == "train/green/1.ppm":  # of the second epoch
        time.sleep(1)  # the loop waits by now
        os._exit(7) if fault == "exit" else time.sleep(60)
    return item

data.ImageSet.__getitem__ = faulty
sys.exit(guard(train_clipfit.main, train_clipfit.get_args, sys.argv[2:]))
"""


def test_a_worker_that_dies_or_hangs_is_named_with_what_it_was_reading(pictures, tmp_path):
    runs = {}
    for fault in ("exit", "hang"):
        given = flags(pictures, tmp_path / fault, workers=2, shots=6, batch_size=6,
                      worker_timeout=3)
        runs[fault] = subprocess.Popen(
            [sys.executable, "-c", FAULTY, fault, *map(str, given)], text=True, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    for fault, words in (("exit", "DataLoader worker"), ("hang", "timed out after 3 seconds")):
        err = runs[fault].communicate(timeout=60)[1]
        assert runs[fault].returncode == 3, (fault, err)
        one_line(err, words, "train/green/1.ppm", "--workers 0", "worker 0", "worker 1")
        assert load_checkpoint(tmp_path / fault / "checkpoint_last.pt")["epoch"] == 1
        with pytest.raises(ProcessLookupError):  # none of its processes is left
            os.killpg(runs[fault].pid, 0)


# -----------------------------------------------------------------------------
# Processes

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank, port, given, fault=None):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")
    if fault:
        fault()
    return script(*given)


def test_when_one_process_fails_all_end_and_the_checkpoint_is_whole(pictures, whole, tmp_path):
    port, given = free_port(), flags(pictures, tmp_path)
    first = begin(as_rank, 0, port, given)
    second = begin(as_rank, 1, port, given, lambda: at_step(5, lambda: torch.empty(2 ** 50)))
    code, _, err = end(second)
    assert code == 3 and err.startswith("process 1: error: out of memory") and err.count("\n") == 1
    code, _, err = end(first, 20)
    assert code == 3
    one_line(err, "a process that this one works with has ended", "checkpoint is intact")
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["step"] == 4
    code, _, err = in_child(script, *given)  # alone
    assert code == 0, err
    for name, ours in weights(tmp_path)[0].items():
        assert torch.allclose(ours, weights(whole)[0][name], atol=1e-6)


def test_a_process_without_images_takes_the_same_steps(pictures, tmp_path):
    """A batch of one image over two processes."""
    port, outs = free_port(), [tmp_path / "two", tmp_path / "one"]
    given = [flags(pictures, out, shots=1, batch_size=1) for out in outs]
    for child in [begin(as_rank, rank, port, given[0]) for rank in (0, 1)]:
        code, _, err = end(child)
        assert code == 0, err
    assert in_child(script, *given[1])[0] == 0
    two, one = (weights(out)[0] for out in outs)
    assert all(torch.allclose(two[name], one[name], atol=1e-6) for name in one)
    assert load_checkpoint(outs[0] / "checkpoint_last.pt")["step"] == 9


def test_a_busy_port_is_named(pictures, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = in_child(as_rank, 0, port, flags(pictures, tmp_path))
    assert code == 2
    one_line(err, f"cannot meet at 127.0.0.1:{port}", "free port", "torchrun --standalone")


# -----------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("words", [
    "--seed -1", "--seed 4294967296", "--seed 1.5", "--seed one", "--lr -1", "--lr 1e9", "--lr inf",
    "--epochs 0", "--epochs -3", "--epochs 2.5", "--shots -1", "--shots 1.5", "--batch-size 0",
    "--micro-batch -1", "--accum-steps 0", "--eval-batch-size 0", "--workers -2", "--wd nan",
    "--momentum -0.1", "--grad-clip -1", "--grad-clip nan", "--reg-weight inf", "--warmup -1",
    "--log-every 0", "--save-every -1"])
def test_numbers_out_of_range_are_refused_at_once(words, capsys, tmp_path):
    flag, value = words.split()
    assert flag in refusal(capsys, flag, value, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, value", [
    ("lr", "fast"), ("lr", [0.1]), ("lr", True), ("epochs", 1.5), ("epochs", {}), ("seed", 1),
    ("seed", ["x"]), ("classes", "red"), ("precision", "fp8"), ("debug_", 1), ("dry_run", "yes"),
    ("epochs", 0), ("device", ["cpu"])])
def test_a_stored_command_line_is_checked_like_a_typed_one(key, value, capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value, "batch_size": 0}))
    assert (key if key != "debug_" else "batch-size") in refusal(capsys, "--config", path)


def test_a_list_given_twice_is_joined_and_a_number_is_refused(capsys):
    args = get_args(["--classes", "a", "b", "--classes", "c", "--seed=1", "--seeds", "2", "3",
                     "--lr", "1", "--learning_rate", "1.0"])
    assert args.classes == ["a", "b", "c"] and args.seed == [1, 2, 3] and args.lr == 1
    assert get_args(["--classes", "a"]).classes == ["a"]  # nothing stays from the line before
    for given in (["--lr", "1", "--lr", "2"], ["--data", "dtd", "--dataset", "demo"]):
        assert "is given twice" in refusal(capsys, *given)
    parser = Parser()
    parser.add_argument_group("g").add_argument("--on", action="store_true")
    assert parser.parse_args(["--on", "--on"]).on


def test_home_and_variables_are_expanded_in_every_path_flag(pictures, whole, tmp_path, monkeypatch):
    """Also on the way back: a run that was stopped under such a name goes on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(pictures.parent))
    monkeypatch.chdir(tmp_path)
    given = flags("$PICTURES/pictures", "~/runs/$USERLESS-a")

    def work():
        stop_at(4)
        return script(*given)
    assert in_child(work)[0] == 143
    code, out, err = in_child(script, *given)
    assert code == 0 and "continuing after step 4" in out, err
    folder = tmp_path / "runs" / "$USERLESS-a"
    assert_same_run(whole, folder)
    assert "finished" in in_child(script, *given)[1]
    monkeypatch.setenv("RUN", str(folder))
    for path in ("$RUN/checkpoint_last.pt", "~/runs/$USERLESS-a/checkpoint_last.pt"):
        code, out, err = in_child(script, "--config", "$RUN/config.json", "--eval-only",
                                  "--resume", path)
        assert code == 0 and "gain" in out, err
    assert not (tmp_path / "~").exists()


def test_a_windows_path_elsewhere_is_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (r"C:\pictures\train", r"pictures\train"):
        assert "pictures" in refusal(capsys, *flags(path, "out"))
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# Surroundings

def test_a_hostile_environment_changes_nothing(whole, tmp_path):
    """`| head -1`, no terminal, a C locale with Chinese class names, no home, no TMPDIR, and a
    torchvision built for another torch, all at once."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')")
    make_pictures(tmp_path / "图片", ("红色_a", "it's \"green\"", "голубой"))
    out, environment = tmp_path / "运行", {
        "PATH": os.path.dirname(shutil.which("head")), "PYTHONPATH": str(tmp_path / "broken"),
        "LC_ALL": "C", "TERM": "dumb", "TMPDIR": "/nowhere", "OMP_NUM_THREADS": "1"}
    given = flags(tmp_path / "图片", out, "--classes", "голубой", "红色 a", "it's \"green\"",
                  workers=2)
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" <&- | head -1', "bash", sys.executable,
         ROOT / "train_clipfit.py", *map(str, given)], env=environment, cwd=tmp_path,
        text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("device ") and done.stdout.count("\n") == 1
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert results["steps"] == 9
    assert "голубой" in (out / "log.txt").read_text("utf-8")
    assert "红色" in (out / "per_class_test.csv").read_text("utf-8")
    theirs = json.loads((whole / "results.json").read_text("utf-8"))
    assert set(theirs) == set(results)


def test_names_that_a_locale_cannot_read_are_refused():
    mangled = "红".encode().decode("ascii", "surrogateescape")  # as LC_ALL=C gives file names
    for names, template in (([mangled], "{}"), (["red"], mangled + "{}")):
        with pytest.raises(DataError, match="PYTHONUTF8=1") as caught:
            class_prompts(names, template)
        assert str(caught.value).isascii() and "\n" not in str(caught.value)


def test_a_clock_that_jumps_changes_nothing(pictures, whole, tmp_path):
    def work():
        moment = random.Random(0)
        time.time = lambda: moment.choice([-1e9, 0.0, 1.7e9, 9e9])
        return script(*flags(pictures, tmp_path))
    code, _, err = in_child(work)
    assert code == 0 and err == "", err
    assert_same_run(whole, tmp_path)
    assert 0 < json.loads((tmp_path / "results.json").read_text())["seconds"] < 60


def test_without_a_home_the_cache_is_explained(pictures, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)

    def work(out):
        os.setuid(54_321)  # as a container runs whom its system does not know
        return script("--data", pictures, "--model", "RN50", "--output-dir", out)
    if os.geteuid():
        pytest.skip("only root can become a user without a home")
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, which only we may enter
        folder = pathlib.Path(folder)
        folder.chmod(0o777)
        pictures = shutil.copytree(pictures, folder / "pictures")
        monkeypatch.chdir(folder)
        for out, words in ((folder / "run", "there is no home folder to keep RN50 in"),
                           ("~/run", "~/run has no meaning")):
            code, _, err = in_child(work, out)
            assert code == 2
            one_line(err, words, "set HOME")
        assert list(folder.iterdir()) == [pictures]
        monkeypatch.undo()
