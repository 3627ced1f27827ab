"""What a stage is said to hold is held against counting by hand."""

import pytest
import torch

from permllm.calibration.samples import CalibrateConfig
from permllm.calibration.texts import TextSource
from permllm.evaluation.evaluate import EvaluateConfig, PerplexityConfig
from permllm.evaluation.zero_shot import ZeroShotConfig
from permllm.footprint import ModelSize, assemble_needs, calibrate_needs, evaluate_needs, prune_needs
from permllm.models.families import adapter_of
from permllm.pruning.methods import PruningMethod

CONFIG = CalibrateConfig(TextSource(files="x"), sequences=12, length=16, held_out=2, batch_size=4)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def size(llama):
    return ModelSize.of(shapes(llama), adapter_of(llama), torch.bfloat16)


def named(needs):
    return {need.what: need.nbytes for part in needs for need in part}


def test_the_sizes_of_a_model_are_counted(size):
    assert size.layer == 32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32 + 2 * 32
    assert size.outside == 97 * 32 + 32 and size.total == 3 * size.layer + 2 * 97 * 32 + 32
    assert size.gram_bytes == 4 * (3 * 32**2 + 48**2) and size.present_bytes == 2 * size.layer


def test_every_family_has_a_size(model, adapter):
    size = ModelSize.of(shapes(model), adapter, torch.float32)
    assert 3 * size.layer + size.outside <= size.total and len(size.groups) == 4
    assert size.channels == 32 and size.vocabulary == 97
    without_prefix = {name.removeprefix("model."): shape for name, shape in shapes(model).items()}
    assert ModelSize.of(without_prefix, adapter, torch.float32) == size


def test_calibrate_holds_hidden_states_where_they_are_to_be(size):
    nbytes = 10 * 16 * 32 * 2
    places = {
        kept: [[need.nbytes for need in part if need.what == "hidden states"] for part in calibrate_needs(size, CONFIG, kept)]
        for kept in ("memory", "disk", "device")
    }
    assert places == {"memory": [[nbytes], []], "disk": [[], []], "device": [[], [nbytes]]}
    assert named(calibrate_needs(size, CONFIG, "disk"))["the Gram matrices of one decoder layer"] == size.gram_bytes


def test_prune_holds_hidden_states_only_in_sequence_and_new_weights_only_with_an_update(size):
    wanda, sparsegpt = (named(prune_needs(size, method, False, CONFIG, "memory")) for method in (PruningMethod(), PruningMethod(update="sparsegpt")))
    assert "hidden states" not in wanda and "hidden states" in named(prune_needs(size, PruningMethod(), True, CONFIG, "memory"))
    assert sparsegpt["one pruned decoder layer"] == 5 * wanda["one pruned decoder layer"]


def test_assemble_and_perplexity_need_no_whole_model_and_zero_shot_tasks_do(size):
    perplexity = PerplexityConfig(TextSource(files="x"), length=16, batch_size=2)
    without, with_tasks = (EvaluateConfig(perplexity, ZeroShotConfig(tasks)) for tasks in ({}, {"continuation": TextSource(files="x")}))
    assert named(evaluate_needs(size, with_tasks, 1000, "memory"))["the whole model"] == 2 * size.total
    assert not {"the whole model"} & {*named(evaluate_needs(size, without, 1000, "memory")), *named(assemble_needs(size, None))}
    assert named(evaluate_needs(size, without, 1000, "memory"))["hidden states"] == 1000 * 32 * 2
