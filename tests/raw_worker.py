"""Workers made of bare messages: what a client sends, without the client."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence

import grpc
import numpy as np

from diloco_proto import outer_pb2 as pb
from diloco_proto import outer_pb2_grpc as rpc
from diloco_proto.channel import CLIENT_OPTIONS, PROTOCOL_VERSION
from diloco_proto.codec import BLOCK, Encoded, Format, encode_fragment, frame_checksum, pack_frames
from diloco_proto.codec.formats import Floats
from diloco_proto.manifest import Manifest, Role, TensorSpec
from diloco_proto.wire import manifest_to_pb


def manifest_of(*sizes: int, frozen: int = 0) -> Manifest:
    """One layer a size, and perhaps a frozen tensor."""
    tensors = [TensorSpec(f"layers.{i}.weight", (n,), "float32", Role.TRAINED) for i, n in enumerate(sizes)]
    if frozen:
        tensors.append(TensorSpec("table", (frozen,), "float32", Role.FROZEN))
    return Manifest(tuple(tensors))


def flat(values: Sequence[float] | Floats) -> Floats:
    """The values as a fragment: float32, padded to whole blocks."""
    out = np.zeros(-(-len(values) // BLOCK) * BLOCK, np.float32)
    out[: len(values)] = values
    return out


def encoded_fp32(values: Floats) -> Encoded:
    """Any bits: nothing is checked."""
    return Encoded(Format.FP32, np.empty(0, np.uint8), values.view(np.uint8))


def frames_of(values: Sequence[float] | Floats, fmt: Format = Format.FP32, first_block: int = 0) -> list[bytes]:
    padded = flat(values)
    return pack_frames(encoded_fp32(padded) if fmt is Format.FP32 else encode_fragment(fmt, padded), first_block)


def hello(worker_id: str, manifest: Manifest, *, generation: int = 1, run_id: str = "") -> pb.Hello:
    return pb.Hello(
        protocol=PROTOCOL_VERSION,
        worker_id=worker_id,
        generation=generation,
        manifest=manifest_to_pb(manifest),
        run_id=run_id,
    )


def header(
    worker_id: str, fragment: int, frames: Iterable[bytes], num_blocks: int, /, **changes: object
) -> pb.PushHeader:
    """Of a contribution in fp32 against version 0, of one token and step, unless `changes` say otherwise."""
    settings = {
        "worker_id": worker_id,
        "generation": 1,
        "purpose": pb.PURPOSE_CONTRIBUTION,
        "fragment": fragment,
        "codec": pb.CODEC_FP32,
        "parts": [pb.Part(first_block=0, num_blocks=num_blocks)],
        "frame_digests": [frame_checksum(f) for f in frames],
        "tokens": 1,
        "steps": 1,
    }
    return pb.PushHeader(**(settings | changes))


class RawWorker:
    """One worker over real gRPC: a session whose events are read one by one, pushes and pulls."""

    def __init__(self, address: str, worker_id: str = "w", generation: int = 1) -> None:
        self.worker_id = worker_id
        self.generation = generation
        self.channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
        self.stub = rpc.OuterStub(self.channel)
        self._requests: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()

    def __enter__(self) -> RawWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_session()
        self.channel.close()

    def join(self, manifest: Manifest, timeout: float = 60) -> RawWorker:
        self.end_session()
        self._requests = queue.SimpleQueue()
        self.say(hello=hello(self.worker_id, manifest, generation=self.generation))
        self.events = self.stub.Session(iter(self._requests.get, None), timeout=timeout)
        return self

    def say(self, **body: object) -> None:
        self._requests.put(pb.SessionRequest(**body))

    def end_session(self) -> None:
        self._requests.put(None)

    def expect(self, kind: str) -> object:
        """The next event of that kind; those before it are passed over."""
        for event in self.events:
            if event.WhichOneof("body") == kind:
                return getattr(event, kind)
        raise AssertionError(f"the session ended without {kind}")

    def push(self, fragment: int, frames: Sequence[bytes], **changes: object) -> pb.Outcome:
        *_, outcome = self.push_stream([pb.PushRequest(header=self.header(fragment, frames, **changes)), *frames])
        return outcome.outcome

    def header(self, fragment: int, frames: Sequence[bytes], **changes: object) -> pb.PushHeader:
        blocks = sum(int.from_bytes(f[12:16], "little") for f in frames)
        return header(self.worker_id, fragment, frames, blocks, **({"generation": self.generation} | changes))

    def push_stream(self, requests: Iterable[pb.PushRequest | bytes]) -> Iterator[pb.PushReply]:
        messages = (pb.PushRequest(frame=r) if isinstance(r, bytes) else r for r in requests)
        return self.stub.Push(messages, timeout=60)

    def seed(self, fragments: Iterable[Sequence[float] | Floats]) -> None:
        for index, values in enumerate(fragments):
            outcome = self.push(index, frames_of(values), purpose=pb.PURPOSE_SEED)
            assert outcome.kind == pb.OUTCOME_SEEDED

    def enter(self, manifest: Manifest, fragments: Iterable[Sequence[float] | Floats]) -> RawWorker:
        """Join, seed if asked to, and train: until the run is open."""
        self.join(manifest)
        welcome = self.expect("welcome")
        if not welcome.seeded:
            self.expect("seed_wanted")
            self.seed(fragments)
            self.expect("seeded")
        self.say(ready=pb.Ready())
        self.expect("opened")
        return self

    def pull(self, fragment: int, **fields: object) -> list[tuple[pb.Item, list[bytes]]]:
        items: list[tuple[pb.Item, list[bytes]]] = []
        for reply in self.stub.Pull(pb.PullRequest(fragment=fragment, **fields), timeout=60):
            if reply.HasField("item"):
                items.append((reply.item, []))
            else:
                items[-1][1].append(reply.frame)
        return items
