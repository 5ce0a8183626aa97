"""What takes seconds and is the same for every rank, done once: in the process that the ranks are forked from."""

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor.parallel
import trainee

import diloco_client.island.entry
import diloco_client.joining
from diloco_proto.codec import Format, warm_up

__all__ = ["diloco_client", "torch", "trainee"]

warm_up(Format)
