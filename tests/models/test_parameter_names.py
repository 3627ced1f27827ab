import pytest

from permllm.models.parameter_names import parameters_filled


def test_every_tensor_fills_its_parameter_with_and_without_prefix(tiny_model, family):
    model = tiny_model(family)
    names = list(model.state_dict())
    assert parameters_filled(model, names) == {name: name for name in names}
    assert parameters_filled(model, [name.removeprefix("model.") for name in names]) == {name.removeprefix("model."): name for name in names}


def test_of_tied_parameters_one_is_enough_and_both_are_allowed(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=True)
    names = set(model.state_dict())
    assert "lm_head.weight" in parameters_filled(model, names)
    assert "lm_head.weight" not in parameters_filled(model, names - {"lm_head.weight"})


def test_buffers_of_old_versions_fill_nothing(tiny_model):
    model = tiny_model("llama")
    names = [*model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert parameters_filled(model, names)[names[-1]] is None


def test_all_misfits_are_named(tiny_model):
    model = tiny_model("opt", tie_word_embeddings=False)
    names = set(model.state_dict()) - {"lm_head.weight", "model.decoder.final_layer_norm.bias"} | {"extra", "decoder.layers.0.fc1.bias"}
    with pytest.raises(ValueError) as refused:
        parameters_filled(model, sorted(names))
    for problem in (
        "extra has no place",
        "fills model.decoder.layers.0.fc1.bias, as another",
        "lm_head.weight is missing",
        "final_layer_norm.bias is missing",
    ):
        assert problem in str(refused.value)
