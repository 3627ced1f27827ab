"""Stage `calibrate`: draw token sequences, and gather the Gram matrices of the dense model's activations."""

from typing import Any

from flows.paths import Setting
from flows.stage import progress, run_stage
from permllm.artifacts import need_disk, replacing_folder, source_fingerprint
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import draw_windows, tokenize
from permllm.calibration.storage import calibration_bytes, save_calibration
from permllm.calibration.texts import read_documents
from permllm.footprint import ModelSize, calibrate_needs
from permllm.memory import need_memory
from permllm.models.loading import load_tokenizer
from permllm.models.streaming import StreamedModel
from permllm.params import Params
from permllm.scratch import Scratch


def calibrate(params: Params, setting: Setting) -> dict[str, Any]:
    """Draw calibration sequences and gather activation statistics of a dense model."""
    params.check_model(setting.model)
    model_params = params.model(setting.model)
    config, source = model_params.calibrate, model_params.model_source()
    tokens = tokenize(list(read_documents(config.text).values()), load_tokenizer(source))
    samples = draw_windows(tokens, config.sequences, config.length, config.seed, config.held_out)
    model = StreamedModel.open(source)
    device, training = model.device, samples.tokens[samples.training_rows]
    needs = calibrate_needs(ModelSize.of(model.files.shapes, model.adapter, model.dtype), config, model_params.hidden_states)
    need_memory(f"calibrate {setting.model}", device, *needs)
    home, model_fingerprint = setting.scratch("calibrate"), model.files.fingerprint()
    for folder in (setting.path("calibrate"), home):
        need_disk(folder, calibration_bytes(model.adapter, model.adapter.layers(model.model)))
    parts = [source_fingerprint("calibration", "models"), model_fingerprint, samples.tokens, config.held_out, config.batch_size]
    scratch = Scratch.open(home, [*parts, source.dtype, str(device)])
    with replacing_folder(setting.path("calibrate")) as folder:
        done, record = len(scratch), {"text": str(config.text), "seed": config.seed}
        statistics = progress(
            dense_statistics(model, training, config.batch_size, model_params.keep_hidden(), done), "calibrate layer", len(model), done
        )
        save_calibration(folder, samples, statistics, model_fingerprint, record, scratch)
    return {"text_tokens": tokens.numel(), "calibration_tokens": training.numel()}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("calibrate", calibrate, ("model",), argv)


if __name__ == "__main__":
    main()
