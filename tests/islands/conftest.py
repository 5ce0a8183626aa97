"""These tests shard models, which older torch cannot (docs/islands.md): there none of them is collected."""

from __future__ import annotations

import torch.distributed.fsdp

collect_ignore_glob = [] if hasattr(torch.distributed.fsdp, "fully_shard") else ["test_*.py"]
