"""Calibration on disk: the token sequences, and one file of Gram matrices per decoder layer, read one at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from permllm.artifacts import checked_file, fingerprint, read_manifest, read_tensors, sha256, write_manifest, write_tensors
from permllm.calibration.samples import CalibrationSet
from permllm.calibration.statistics import ActivationStats, LayerStats
from permllm.models.adapter import ModelAdapter
from permllm.scratch import Scratch, layer_name

KIND = "calibrate"
SAMPLES = "samples.safetensors"


@dataclass(frozen=True)
class SavedStatistics(Sequence[LayerStats]):
    """Statistics of every decoder layer; each access reads one layer's file, and the first refuses one that is not as it was written."""

    folder: Path
    manifest: Mapping[str, Any]
    device: torch.device | str
    _checked: set[int] = field(default_factory=set, init=False, repr=False, compare=False)  # learning reads every layer in every epoch

    def __len__(self) -> int:
        return self.manifest["layers"]

    def __getitem__(self, index: int) -> LayerStats:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._checked:
            checked_file(self.folder, self.manifest, layer_name(index))
            self._checked.add(index)
        grams = read_tensors(self.folder / layer_name(index), self.device)
        return {name: ActivationStats(gram, self.manifest["tokens"]) for name, gram in grams.items()}

    def __iter__(self) -> Iterator[LayerStats]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Calibration:
    """What the calibrate stage leaves for the others.

    Attributes:
        fingerprint: of the model and the samples; statistics of another calibration are refused by it.
        checksum: of the manifest, and with it of every file.
    """

    samples: CalibrationSet
    statistics: SavedStatistics
    model_fingerprint: str
    fingerprint: str
    checksum: str


def save_calibration(
    folder: Path,
    samples: CalibrationSet,
    statistics: Iterable[LayerStats],
    model_fingerprint: str,
    record: Mapping[str, Any],
    scratch: Scratch | None = None,
) -> None:
    """Write a calibration while its statistics are computed; the manifest comes last.

    Args:
        scratch: where finished layers are kept until all are; `statistics` go on behind those that are there.
    """
    write_tensors(folder / SAMPLES, {"tokens": samples.tokens})
    files = {SAMPLES: sha256(folder / SAMPLES)}
    done = 0 if scratch is None else len(scratch)
    tokens = scratch.record(0)["tokens"] if done else 0
    layers = done
    for index, stats in enumerate(statistics, start=done):
        grams, tokens = {name: group.gram for name, group in stats.items()}, next(iter(stats.values())).tokens
        if scratch is None:
            write_tensors(folder / layer_name(index), grams)
            files[layer_name(index)] = sha256(folder / layer_name(index))
        else:
            scratch.keep(index, grams, {"tokens": tokens})
        layers = index + 1
    if scratch is not None:
        files |= scratch.deliver(folder)
    manifest = {"layers": layers, "tokens": tokens, "held_out": samples.held_out, "model_fingerprint": model_fingerprint}
    write_manifest(folder, KIND, {**manifest, "fingerprint": fingerprint([model_fingerprint, samples.tokens]), **record}, files)


def calibration_bytes(adapter: ModelAdapter, layers: Iterable[nn.Module]) -> int:
    """Return what the Gram matrices of a model will take on disk."""
    widths = (layer.get_submodule(group.readers[0]).in_features for layer in layers for group in adapter.linear_groups.values())
    return sum(width * width * torch.float32.itemsize for width in widths)


def load_calibration(folder: Path, device: torch.device | str = "cpu") -> Calibration:
    """Open a calibration; Gram matrices are read to the device when they are asked for.

    Raises:
        StaleArtifactError: if it is missing, not complete, damaged, or written by another version.
    """
    manifest = read_manifest(folder, KIND)
    samples = CalibrationSet(read_tensors(checked_file(folder, manifest, SAMPLES))["tokens"], manifest["held_out"])
    statistics = SavedStatistics(folder, manifest, device)
    return Calibration(samples, statistics, manifest["model_fingerprint"], manifest["fingerprint"], manifest["checksum"])
