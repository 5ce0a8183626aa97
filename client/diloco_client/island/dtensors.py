"""torch's sharded tensors, by names that every supported torch has: before 2.6 some are elsewhere or missing, and there
no tensor is one (`refuse_unknown`)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from diloco_proto.errors import UnsupportedModel

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:
    DTensor = FSDPModule = Replicate = ()  # type: ignore[assignment,misc]  # isinstance(x, ()) is never so

__all__ = ["DTensor", "FSDPModule", "Replicate", "is_slice", "refuse_unknown", "replicates"]

NEEDED = "2.6"


def refuse_unknown(model: torch.nn.Module) -> None:
    """Raises UnsupportedModel for DTensors of a torch that is too old."""
    if any(type(p).__name__ == "DTensor" and not isinstance(p, DTensor) for p in model.parameters()):
        raise UnsupportedModel(
            f"this model is sharded (DTensor), which diloco can synchronise from torch {NEEDED} on, and this is torch "
            f"{torch.__version__}: install a newer one, or train replicas (DistributedDataParallel)"
        )


def is_slice(mesh: DeviceMesh) -> bool:
    """Whether a mesh was cut out of one with more ranks, such as mesh["tp"] of ("dp", "tp")."""
    if hasattr(mesh, "_get_root_mesh"):
        root = mesh._get_root_mesh()
    else:  # torch before 2.8
        from torch.distributed.device_mesh import _mesh_resources

        root = _mesh_resources.get_root_mesh(mesh)
    return bool(root.size() > mesh.size())


def replicates(model: torch.nn.Module) -> bool:
    """Whether torch.distributed._composable.replicate keeps replicas of the model or of a part equal, which leaves no
    trace in its parameters."""
    try:
        from torch.distributed._composable.contract import _get_registry
    except ImportError:
        return False
    return any("replicate" in (_get_registry(module) or ()) for module in model.modules())
