"""Initial parameters from a safetensors file (`--init`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors

from diloco_proto.codec.formats import Floats
from diloco_proto.errors import ConfigError, ManifestMismatch
from diloco_proto.manifest import Fragment, Manifest, TensorSpec

_READ = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class InitialParameters:
    """The tensors of one file, by name; bfloat16, float16 and float32.

    Raises ConfigError when the file is not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tensors = dict(safetensors.deserialize(path.read_bytes()))
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"--init {path}: not a readable safetensors file: {error}") from error

    def check(self, manifest: Manifest) -> None:
        """Raises ManifestMismatch unless every tensor of the manifest is in the file with its shape."""
        for tensor in manifest.tensors:
            name = self._name(tensor)
            if name is None:
                raise ManifestMismatch(f"the model has {tensor.describe()}, which {self.path} does not hold")
            shape = list(self._tensors[name]["shape"])
            if shape != list(tensor.shape) or self._tensors[name]["dtype"] not in _READ:
                raise ManifestMismatch(
                    f"the model has {tensor.describe()}; in {self.path} it is {self._tensors[name]['dtype']}{shape}"
                )

    def flat(self, fragment: Fragment) -> Floats:
        """float32[fragment.length], zero-padded."""
        out = np.zeros(fragment.length, np.float32)
        for slot in fragment.slots:
            name = self._name(slot.tensor)
            assert name is not None
            entry = self._tensors[name]
            raw = np.frombuffer(entry["data"], _READ[entry["dtype"]])
            if entry["dtype"] == "BF16":
                out[slot.offset : slot.end].view(np.uint32)[:] = raw.astype(np.uint32) << 16
            else:
                out[slot.offset : slot.end] = raw
        return out

    def _name(self, tensor: TensorSpec) -> str | None:
        return next((n for n in (tensor.name, *tensor.tied) if n in self._tensors), None)
