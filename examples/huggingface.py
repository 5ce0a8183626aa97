"""A `transformers.Trainer`: a small Llama, which reads bytes, on the source of Python's standard library.

On each machine: `python examples/huggingface.py`, with the server's join URL in DILOCO_URL. Started again with the same
--name it goes on from its last checkpoint.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import diloco_client
from diloco_client.integrations.transformers import DilocoCallback

CONTEXT = 128


def windows() -> list[dict[str, torch.Tensor]]:
    """CONTEXT bytes each, in an order that is the same on every machine with the same Python."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows[order]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="join URL, file:PATH or HOST:PORT; else DILOCO_URL or DILOCO_URL_FILE")
    parser.add_argument("--name", default="llama", help="of this worker, another on each machine")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory of checkpoints and model")
    args = parser.parse_args()

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**shape, **tokens, max_position_embeddings=CONTEXT))
    diloco = DilocoCallback(args.server, worker_id=args.name, sigterm_seconds=30)
    held_out, data = (rows := windows())[:64], rows[64:]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / args.name),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=20,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=args.every,  # of the global parameters
            save_steps=args.every,
            save_total_limit=2,
            include_num_input_tokens_seen="all",  # contributions are weighed by tokens
            report_to="none",
        ),
        train_dataset=diloco_client.shard_stream(diloco, data),  # this worker's share of it
        eval_dataset=held_out,
    )
    diloco.attach(trainer)
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    trainer.save_model(str(folder / "theta"))  # all workers end on the same parameters
    print(f"{args.name}: loss {trainer.evaluate()['eval_loss']:.3f}, {folder / 'theta'} holds the global parameters")


if __name__ == "__main__":
    main()
