"""A convolutional net with BatchNorm: it learns to read generated digits, crooked, noisy and not in the middle.

On each machine: `python examples/convnet.py`, with the server's join URL in DILOCO_URL.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

import diloco_client

FONT = (0x7B6F, 0x2C97, 0x73E7, 0x73CF, 0x5BC9, 0x79CF, 0x79EF, 0x7249, 0x7BEF, 0x7BCF)  # 5 rows of 3 bits each
SIZE = 24


def digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, (count, 1, SIZE, SIZE) float32, and the digits on them, (count,) int64."""
    glyphs = torch.tensor([[g >> (14 - i) & 1 for i in range(15)] for g in FONT], dtype=torch.float32)
    labels = torch.randint(10, (count,), generator=generator)
    turn, size, x, y = torch.rand(4, count, generator=generator).mul(2).sub(1)
    turn, size = 0.3 * turn, 1.6 + 0.2 * size  # radians; image to glyph
    rows = [[turn.cos(), -turn.sin(), x / 4], [turn.sin(), turn.cos(), y / 4]]
    matrices = size[:, None, None] * torch.stack([torch.stack(row, 1) for row in rows], 1)
    places = functional.affine_grid(matrices, [count, 1, SIZE, SIZE], align_corners=False)
    images = functional.grid_sample(glyphs[labels].view(count, 1, 5, 3), places, align_corners=False)
    return images + 0.3 * torch.randn(images.shape, generator=generator), labels


def net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In evaluation mode: with the statistics that BatchNorm has gathered."""
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="join URL, file:PATH or HOST:PORT; else DILOCO_URL or DILOCO_URL_FILE")
    parser.add_argument("--name", help="of this worker, the same when it is started again")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = net().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    test = [t.to(device) for t in digits(1000, torch.Generator().manual_seed(0))]
    with diloco_client.join(args.server, model, optimizer, worker_id=args.name, sigterm_seconds=30) as outer:
        data = torch.Generator().manual_seed(1 + 1000 * outer.global_step + outer.shard.index)  # images of its own
        for step in range(args.steps):
            if outer.should_stop:
                break
            images, labels = (t.to(device) for t in digits(64, data))
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            outer.report(tokens=len(labels))
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 49:
                with outer.global_parameters():  # θ and the averaged statistics; local values come back afterwards
                    right = accuracy(model, *test)
                print(f"{outer.worker_id}: step {step + 1}, loss {loss.item():.3f}, θ reads {right:.1%}", flush=True)
        outer.flush(together=True)  # all workers end on the same parameters
        torch.save(outer.global_state_dict(), path := f"convnet-{outer.shard.index}.pt")
        print(f"{outer.worker_id}: {path} holds the global parameters, which read {accuracy(model, *test):.1%}")


if __name__ == "__main__":
    main()
