"""Stage `calibrate`: draw token sequences, and gather the Gram matrices of the dense model's activations."""

from typing import Any

from flows.paths import Setting
from flows.stage import progress, run_stage
from permllm.artifacts import need_disk, replacing_folder
from permllm.calibration.capture import dense_statistics
from permllm.calibration.samples import draw_windows, tokenize
from permllm.calibration.storage import calibration_bytes, save_calibration
from permllm.calibration.texts import read_documents
from permllm.models.loading import load_tokenizer
from permllm.models.streaming import StreamedModel
from permllm.params import Params


def calibrate(params: Params, setting: Setting) -> dict[str, Any]:
    """Draw calibration sequences and gather activation statistics of a dense model."""
    params.check_model(setting.model)
    model_params = params.model(setting.model)
    config, source = model_params.calibrate, model_params.model_source()
    tokens = tokenize(list(read_documents(config.text).values()), load_tokenizer(source))
    samples = draw_windows(tokens, config.sequences, config.length, config.seed, config.held_out)
    model = StreamedModel.open(source)
    need_disk(setting.path("calibrate"), calibration_bytes(model.adapter, model.adapter.layers(model.model)))
    statistics = dense_statistics(model, samples.tokens[samples.training_rows], config.batch_size, model_params.keep_hidden())
    with replacing_folder(setting.path("calibrate")) as folder:
        record = {"text": str(config.text), "seed": config.seed}
        save_calibration(folder, samples, progress(statistics, "calibrate layer", len(model)), model.files.fingerprint(), record)
    return {"text_tokens": tokens.numel(), "calibration_tokens": samples.tokens[samples.training_rows].numel()}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("calibrate", calibrate, ("model",), argv)


if __name__ == "__main__":
    main()
