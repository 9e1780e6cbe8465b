"""Faults that the other tests must find: each is put into a copy of the library by itself.

What tests are worth shows in the faults that they find, not in how many assertions they have. To
add a fault, add two lines to `FAULTS`: the file below lib/prunestudy and the test that must fail,
then a text that the file has exactly once, `=>`, and what takes its place. Where that test still
passes, it lacks an assertion: add it there. Choose tests that take a fraction of a second.
"""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

FAULTS = """
methods/sparse_gates.py test_sparse_gates.py test_equation_with_bernoulli_draws
    -2 * lambda1 => 2 * lambda1
methods/sparse_gates.py test_sparse_gates.py test_eval_keeps_the_gates_of_at_least_half
    detach() >= 0.5 => detach() > 0.5
methods/sparse_gates.py test_sparse_gates.py test_ramp_of_lambda1
    (share - ramp) / (1 - ramp) => (share - ramp) / ramp
methods/masks.py test_sparse_gates.py test_equation_with_the_deterministic_draw
    gradient * weight => gradient.clone()
methods/masks.py test_weights.py test_top_masks_are_those_of_a_stable_sort
    kept_count(len(flat), sparsity) => kept_count(len(flat), sparsity) + 1
methods/masks.py test_weights.py test_top_masks_are_those_of_a_stable_sort
    [-spare:] => [:spare]
methods/masks.py test_weights.py test_kept_count
    round(total * (1 - target)) => round(total * target)
methods/masks.py test_weights.py test_cubic_sparsity
    1.0)) ** 3 => 1.0)) ** 2
methods/masks.py test_weights.py test_dpf_updates_cut_weights_and_takes_them_back
    None if self.feedback else self.mask => self.mask
methods/magnitude_attention.py test_magnitude_attention.py test_forward_and_backward
    "backward" else attention => "backward" else attention * attention
methods/magnitude_attention.py test_magnitude_attention.py test_forward_and_backward
    pow_(self.alpha) => pow_(2 * self.alpha)
methods/magnitude_attention.py test_magnitude_attention.py test_norms_by_hand
    1 if mean else torch.inf => torch.inf
methods/magnitude_attention.py test_magnitude_attention.py test_nothing_of_a_cut_weight
    torch.where(each.mask == 1, weight, held) => weight
methods/magnitude_attention.py test_magnitude_attention.py test_while_exploring
    self._set_scale(self.weights) => pass
methods/gdp.py test_gdp.py test_gate_and_its_slope_by_hand
    square = t.square() => square = t
methods/gdp.py test_gdp.py test_soft_threshold_by_hand
    t.abs() - threshold => t.abs() + threshold
methods/gdp.py test_gdp.py test_paces
    falls = self.gate_lr * self.rate => falls = self.gate_lr
methods/gdp.py test_gdp.py test_at_the_floor_of_eps_what_is_missing_is_closed
    if late: => if False:
methods/gdp.py test_gdp.py test_once_gates_below_a_quarter
    (g < 0.25) => (g < 0.5)
methods/channels.py test_channels.py test_bilinear_cost_by_hand
    outside = t.factor * (t.fixed_out + t.outside @ g) => outside = t.factor
methods/channels.py test_channels.py test_closing_stops_at_the_channel
    >= target - 1e-12 => >= target + 0.01
methods/hard_concrete.py test_gdp.py test_hard_concrete_by_hand
    2 / 3, -0.1, 1.1 => 2 / 3, -0.1, 1.2
methods/hard_concrete.py test_gdp.py test_hard_concrete_pull
    to(p) * p * (1 - p) => to(p) * p
methods/force.py test_force.py test_force_is_orthogonal_to_each_filter
    (pull - along * unit) => pull
methods/force.py test_force.py test_force_is_orthogonal_to_each_filter
    length, 0.0) * ( => 1.0, 0.0) * (
methods/force.py test_force.py test_a_step_is_gradient_decay_force_momentum
    return pull.mul_(-strength) => return pull.mul_(strength)
methods/force.py test_force.py test_adaptive_strength
    weight.grad.add(weight, alpha=self.weight_decay) => weight.grad.clone()
shrink/ranks.py test_factors.py test_rank_by_energy_on_known_singular_values
    svdvals(matrix).square() => svdvals(matrix)
shrink/ranks.py test_factors.py test_rank_by_energy_on_known_singular_values
    (shares < least).sum()) + 1 => (shares < least).sum())
shrink/factors.py test_factors.py test_the_theory_column_of_the_alexnet_table
    (rank * (size + filters)) => (rank * size)
shrink/factors.py test_factors.py test_at_full_rank_a_linear_layer_equals_its_factors
    size[..., :kept, None] * right[:, :kept] => right[:, :kept]
shrink/factors.py test_factors.py test_narrowing_a_pair_keeps_what_its_basis_keeps
    (mixture).double() @ weight_matrix(inner[1]) => (inner[1]).double() @ weight_matrix(mixture)
shrink/factors.py test_factors.py test_groups_share_a_rank_and_never_mix
    getattr(layer, "groups", 1) => 1
methods/search.py test_component_aware.py test_positions_are_even_ranks
    rank.double() + 0.5 => rank.double()
methods/component_aware.py test_component_aware.py test_a_step_of_the_descent
    downhill - normal * (downhill @ normal) / length => downhill
methods/component_aware.py test_component_aware.py test_both_solvers
    (p - number.to(p)) / => (number.to(p) - p) /
methods/steering.py test_weights.py test_steering_by_hand
    0.1 * error + 1.5 => 0.1 * error - 1.5
methods/steering.py test_weights.py test_steering_by_hand
    self.error.fill_(error) => pass
methods/weights.py test_weights.py test_l1_steps_by_hand
    threshold = self.steering.strength * at.lr => threshold = self.steering.strength
methods/weights.py test_weights.py test_snip_keeps_the_most_sensitive
    (w * s).abs() => (w * s)
methods/weights.py test_weights.py test_gradual_magnitude_prefers_a_kept_zero
    == 1, size, -1.0 => == 1, size, 0.0
methods/channel_controls.py test_channels.py test_the_lowest_of_the_ranking_goes
    scores.argsort(stable=True) => (-scores).argsort(stable=True)
methods/channel_controls.py test_channels.py test_slimming_adds_the_sign
    scale.detach().sign() => scale.detach()
shrink/narrow.py test_channels.py test_the_finished_net and batch_norm-dtype0 and l1_filter
    if cut.dim() and not ( => if cut.dim() and "running" not in name and not (
shrink/narrow.py test_channels.py test_the_finished_net and batch_norm-dtype0 and l1_filter
    mask[stay] = 1 => mask[group.channels - 1 - stay] = 1
shrink/narrow.py test_channels.py test_the_finished_net and batch_norm-dtype0 and l1_filter
    (axis == "in" and name != "weight") => False
shrink/slots.py test_groups.py test_the_channels_of_one_group_of_a_group_norm
    channels - channels % => channels %
shrink/narrow.py test_remove.py test_a_branch_without_inputs_leaves_its_bias
    new.bias = bias => pass
shrink/layers.py test_remove.py test_places_behind_a_layer_that_is_gone
    2 * pad - reach - 1) => 2 * pad - reach)
shrink/csr.py test_shrink.py test_csr_equals_dense and lenet300
    pointers[1:] = => pointers[:-1] =
shrink/files.py test_files.py test_dense_or_rows_is_decided_by_bytes
    torch.zeros(shape, dtype=values.dtype) => torch.ones(shape, dtype=values.dtype)
measure/cost.py test_measure.py test_counts_by_hand
    None if place == _BIAS.get(op) else value => value
measure/forward.py test_measure.py test_interleave_calls_each_once_a_round
    range(warmup + rounds) => range(rounds)
measure/metrics.py test_metrics.py test_psnr_is_of_the_mean_error
    (images - task.pixels(x)).square() => (images - task.pixels(x)).abs()
train/recipe.py test_train.py test_schedules
    done = step / steps => done = (step + 1) / steps
train/recipe.py test_train.py test_learning_rates_of_phases
    for i in range(index + 1) if phases[i].restart => for i in range(1)
train/recipe.py test_train.py test_steps_of_sgd_by_hand
    "weight_decay": self.weight_decay => "weight_decay": 0.0
train/loop.py test_train.py test_a_batch_in_pieces_is_the_same_step
    (loss * share).backward() => loss.backward()
train/loop.py test_train.py test_a_run_interrupted_at_every_step
    self.context.generator.set_state(generator.cpu()) => pass
train/loop.py test_train.py test_steps_end_a_training_within_an_epoch
    self.state.history.append(row) => pass
train/loop.py test_train.py test_order_of_the_hooks_and_where_they_are
    at.step % self.context.period => (at.step + 1) % self.context.period
train/loop.py test_train.py test_an_interrupted_run_ends_like
    start=first => start=0
datasets/batches.py test_datasets.py test_every_batch_is_a_shifted_and_flipped_image
    [first, 1 - 2 * mirrored, order] => [first, torch.ones_like(mirrored), order]
datasets/batches.py test_datasets.py test_every_batch_is_a_shifted_and_flipped_image
    2 * self.shift + 1, (2 => 2 * self.shift, (2
datasets/batches.py test_datasets.py test_normalisation_and_memory_format
    (-mean / std) => (-mean)
datasets/sources.py test_datasets.py test_split_is_fixed_and_complete
    (order[:-validation]) => (order[: 1 - validation])
"""
_LINES = [line for line in FAULTS.splitlines() if line]
_EACH = [
    (*where.split(maxsplit=2), *(text.strip() for text in what.split("=>")))
    for where, what in zip(_LINES[::2], _LINES[1::2], strict=True)
]
# Each run is forked from a process that has imported these: it takes longer than the tests.
_SLOW = """filelock pandas PIL.Image ptflops pydantic pytest safetensors.torch
    scipy.stats torch torch._dynamo torch.export torch.onnx torch_pruning torchvision"""
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(_SLOW.split())


def outcome(lib, files, chosen):
    """Exit status and output of a run of the tests `chosen` of `files` on the library in `lib`."""
    said = lib.with_name("said")
    run = _FORK.Process(target=_run, args=(lib, files, chosen, said))
    run.start()
    run.join(timeout=900)
    run.kill()
    return run.exitcode, said.read_text()


def _run(lib: Path, files: list[str], chosen: str, said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.insert(0, str(lib))
    # Without plugins, explained assertions and a search for garbage: half of a short run's time.
    options = "-qx -p no:cacheprovider -p no:unraisableexception --disable-plugin-autoload".split()
    options += ["--assert=plain"]
    options += [f"--basetemp={lib.with_name('temporary')}", "-k", chosen]
    sys.exit(pytest.main([*options, *(str(Path(__file__).with_name(name)) for name in files)]))


def test_the_tests_pass_on_the_code_as_it_is(library):
    files, chosen = ({each[place] for each in _EACH} for place in (1, 2))
    every = " or ".join(f"({name})" for name in sorted(chosen))
    code, said = outcome(library, sorted(files), every)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "test", "chosen", "old", "new"), _EACH, ids=[each[0] for each in _EACH]
)
def test_a_fault_is_found(file, test, chosen, old, new, library, tmp_path):
    lib = shutil.copytree(library, tmp_path / "lib")
    path = lib / "prunestudy" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))
    code, said = outcome(lib, [test], chosen)
    assert code == pytest.ExitCode.TESTS_FAILED, f"{old} => {new} was not found:\n{said}"
