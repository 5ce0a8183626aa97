from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_INT4: _ClassVar[Codec]
    CODEC_INT3: _ClassVar[Codec]
    CODEC_E3M0: _ClassVar[Codec]
    CODEC_MXFP4: _ClassVar[Codec]
    CODEC_INT2: _ClassVar[Codec]
    CODEC_TERNARY: _ClassVar[Codec]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_TRAINED: _ClassVar[Role]
    ROLE_FROZEN: _ClassVar[Role]
    ROLE_BUFFER: _ClassVar[Role]

class Fate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FATE_UNSPECIFIED: _ClassVar[Fate]
    FATE_COUNTED: _ClassVar[Fate]
    FATE_NOT_COUNTED: _ClassVar[Fate]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_CONTRIBUTION: _ClassVar[Purpose]
    PURPOSE_SEED: _ClassVar[Purpose]

class OutcomeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[OutcomeKind]
    OUTCOME_STAGED: _ClassVar[OutcomeKind]
    OUTCOME_PART_HELD: _ClassVar[OutcomeKind]
    OUTCOME_ALREADY_HAVE: _ClassVar[OutcomeKind]
    OUTCOME_COUNTED: _ClassVar[OutcomeKind]
    OUTCOME_CLOSED: _ClassVar[OutcomeKind]
    OUTCOME_CONFLICT: _ClassVar[OutcomeKind]
    OUTCOME_SEEDED: _ClassVar[OutcomeKind]
    OUTCOME_RESYNC: _ClassVar[OutcomeKind]

class ItemKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ITEM_UNSPECIFIED: _ClassVar[ItemKind]
    ITEM_UPDATE: _ClassVar[ItemKind]
    ITEM_SNAPSHOT: _ClassVar[ItemKind]
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_BF16: Codec
CODEC_INT8: Codec
CODEC_INT4: Codec
CODEC_INT3: Codec
CODEC_E3M0: Codec
CODEC_MXFP4: Codec
CODEC_INT2: Codec
CODEC_TERNARY: Codec
ROLE_UNSPECIFIED: Role
ROLE_TRAINED: Role
ROLE_FROZEN: Role
ROLE_BUFFER: Role
FATE_UNSPECIFIED: Fate
FATE_COUNTED: Fate
FATE_NOT_COUNTED: Fate
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_CONTRIBUTION: Purpose
PURPOSE_SEED: Purpose
OUTCOME_UNSPECIFIED: OutcomeKind
OUTCOME_STAGED: OutcomeKind
OUTCOME_PART_HELD: OutcomeKind
OUTCOME_ALREADY_HAVE: OutcomeKind
OUTCOME_COUNTED: OutcomeKind
OUTCOME_CLOSED: OutcomeKind
OUTCOME_CONFLICT: OutcomeKind
OUTCOME_SEEDED: OutcomeKind
OUTCOME_RESYNC: OutcomeKind
ITEM_UNSPECIFIED: ItemKind
ITEM_UPDATE: ItemKind
ITEM_SNAPSHOT: ItemKind

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "dtype", "role", "tied")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIED_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    role: Role
    tied: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., tied: _Optional[_Iterable[str]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class RunSettings(_message.Message):
    __slots__ = ("sync_every", "num_fragments", "fragment_pattern", "overlap_steps", "mixing_alpha", "uplink_codec", "downlink_codec", "error_feedback")
    SYNC_EVERY_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_PATTERN_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_STEPS_FIELD_NUMBER: _ClassVar[int]
    MIXING_ALPHA_FIELD_NUMBER: _ClassVar[int]
    UPLINK_CODEC_FIELD_NUMBER: _ClassVar[int]
    DOWNLINK_CODEC_FIELD_NUMBER: _ClassVar[int]
    ERROR_FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    sync_every: int
    num_fragments: int
    fragment_pattern: str
    overlap_steps: int
    mixing_alpha: float
    uplink_codec: Codec
    downlink_codec: Codec
    error_feedback: bool
    def __init__(self, sync_every: _Optional[int] = ..., num_fragments: _Optional[int] = ..., fragment_pattern: _Optional[str] = ..., overlap_steps: _Optional[int] = ..., mixing_alpha: _Optional[float] = ..., uplink_codec: _Optional[_Union[Codec, str]] = ..., downlink_codec: _Optional[_Union[Codec, str]] = ..., error_feedback: bool = ...) -> None: ...

class FragmentVersion(_message.Message):
    __slots__ = ("fragment", "version", "digest")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    digest: int
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "ready", "heartbeat", "finishing", "finished", "leave")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FINISHING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    ready: Ready
    heartbeat: Heartbeat
    finishing: Finishing
    finished: Finished
    leave: Leave
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., finishing: _Optional[_Union[Finishing, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "worker_id", "generation", "manifest", "run_id")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker_id: str
    generation: int
    manifest: Manifest
    run_id: str
    def __init__(self, protocol: _Optional[int] = ..., worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., run_id: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("step", "stall_seconds", "bytes_up", "bytes_down", "loss", "train_seconds", "steps", "tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    stall_seconds: float
    bytes_up: int
    bytes_down: int
    loss: float
    train_seconds: float
    steps: int
    tokens: int
    def __init__(self, step: _Optional[int] = ..., stall_seconds: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., loss: _Optional[float] = ..., train_seconds: _Optional[float] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Finishing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Finished(_message.Message):
    __slots__ = ("flush",)
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    flush: int
    def __init__(self, flush: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("welcome", "seed_wanted", "seeded", "opened", "committed", "all_finished", "draining", "waiting", "pace", "shard", "stop", "beat")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    SEED_WANTED_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ALL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PACE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    seed_wanted: SeedWanted
    seeded: Seeded
    opened: Opened
    committed: Committed
    all_finished: AllFinished
    draining: Draining
    waiting: Waiting
    pace: Pace
    shard: Shard
    stop: Stop
    beat: Beat
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., seed_wanted: _Optional[_Union[SeedWanted, _Mapping]] = ..., seeded: _Optional[_Union[Seeded, _Mapping]] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., all_finished: _Optional[_Union[AllFinished, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., pace: _Optional[_Union[Pace, _Mapping]] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run_id", "settings", "layout_fingerprint", "seeded", "heartbeat_seconds", "versions", "standings")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STANDINGS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    settings: RunSettings
    layout_fingerprint: int
    seeded: bool
    heartbeat_seconds: float
    versions: _containers.RepeatedCompositeFieldContainer[FragmentVersion]
    standings: _containers.RepeatedCompositeFieldContainer[Standing]
    def __init__(self, run_id: _Optional[str] = ..., settings: _Optional[_Union[RunSettings, _Mapping]] = ..., layout_fingerprint: _Optional[int] = ..., seeded: bool = ..., heartbeat_seconds: _Optional[float] = ..., versions: _Optional[_Iterable[_Union[FragmentVersion, _Mapping]]] = ..., standings: _Optional[_Iterable[_Union[Standing, _Mapping]]] = ...) -> None: ...

class Standing(_message.Message):
    __slots__ = ("fragment", "counted_base", "staged_base")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    COUNTED_BASE_FIELD_NUMBER: _ClassVar[int]
    STAGED_BASE_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    counted_base: int
    staged_base: int
    def __init__(self, fragment: _Optional[int] = ..., counted_base: _Optional[int] = ..., staged_base: _Optional[int] = ...) -> None: ...

class SeedWanted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Seeded(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[FragmentVersion]
    def __init__(self, versions: _Optional[_Iterable[_Union[FragmentVersion, _Mapping]]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("start_step",)
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    start_step: int
    def __init__(self, start_step: _Optional[int] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("ready", "needed")
    READY_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    ready: int
    needed: int
    def __init__(self, ready: _Optional[int] = ..., needed: _Optional[int] = ...) -> None: ...

class Pace(_message.Message):
    __slots__ = ("sync_every",)
    SYNC_EVERY_FIELD_NUMBER: _ClassVar[int]
    sync_every: int
    def __init__(self, sync_every: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("index", "count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    count: int
    def __init__(self, index: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("fragment", "version", "fate", "digest", "base_version")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FATE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    fate: Fate
    digest: int
    base_version: int
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., fate: _Optional[_Union[Fate, str]] = ..., digest: _Optional[int] = ..., base_version: _Optional[int] = ...) -> None: ...

class AllFinished(_message.Message):
    __slots__ = ("versions", "flush")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[FragmentVersion]
    flush: int
    def __init__(self, versions: _Optional[_Iterable[_Union[FragmentVersion, _Mapping]]] = ..., flush: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("first_block", "num_blocks")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    num_blocks: int
    def __init__(self, first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "frame")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    frame: bytes
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., frame: _Optional[bytes] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("run_id", "worker_id", "generation", "purpose", "fragment", "base_version", "codec", "parts", "frame_digests", "tokens", "steps", "since_version")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    FRAME_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    worker_id: str
    generation: int
    purpose: Purpose
    fragment: int
    base_version: int
    codec: Codec
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    frame_digests: _containers.RepeatedScalarFieldContainer[int]
    tokens: int
    steps: int
    since_version: int
    def __init__(self, run_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., fragment: _Optional[int] = ..., base_version: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., frame_digests: _Optional[_Iterable[int]] = ..., tokens: _Optional[int] = ..., steps: _Optional[int] = ..., since_version: _Optional[int] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("have", "ack", "outcome")
    HAVE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    have: Have
    ack: Ack
    outcome: Outcome
    def __init__(self, have: _Optional[_Union[Have, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ...) -> None: ...

class Have(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, frames: _Optional[_Iterable[int]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    def __init__(self, frames: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("kind", "version", "detail")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    kind: OutcomeKind
    version: int
    detail: str
    def __init__(self, kind: _Optional[_Union[OutcomeKind, str]] = ..., version: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("run_id", "fragment", "snapshot", "since_version", "skip_frames", "item_version", "stripes", "stripe", "kept", "part")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SKIP_FRAMES_FIELD_NUMBER: _ClassVar[int]
    ITEM_VERSION_FIELD_NUMBER: _ClassVar[int]
    STRIPES_FIELD_NUMBER: _ClassVar[int]
    STRIPE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fragment: int
    snapshot: bool
    since_version: int
    skip_frames: int
    item_version: int
    stripes: int
    stripe: int
    kept: int
    part: Part
    def __init__(self, run_id: _Optional[str] = ..., fragment: _Optional[int] = ..., snapshot: bool = ..., since_version: _Optional[int] = ..., skip_frames: _Optional[int] = ..., item_version: _Optional[int] = ..., stripes: _Optional[int] = ..., stripe: _Optional[int] = ..., kept: _Optional[int] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("item", "frame")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    item: Item
    frame: bytes
    def __init__(self, item: _Optional[_Union[Item, _Mapping]] = ..., frame: _Optional[bytes] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("kind", "version", "codec", "frames", "digest")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    kind: ItemKind
    version: int
    codec: Codec
    frames: int
    digest: int
    def __init__(self, kind: _Optional[_Union[ItemKind, str]] = ..., version: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., frames: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunDescription(_message.Message):
    __slots__ = ("run_id", "protocol", "config", "manifest", "layout_fingerprint", "seeded", "kept")
    class ConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    protocol: int
    config: _containers.ScalarMap[str, str]
    manifest: Manifest
    layout_fingerprint: int
    seeded: bool
    kept: _containers.RepeatedCompositeFieldContainer[KeptSnapshot]
    def __init__(self, run_id: _Optional[str] = ..., protocol: _Optional[int] = ..., config: _Optional[_Mapping[str, str]] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., layout_fingerprint: _Optional[int] = ..., seeded: bool = ..., kept: _Optional[_Iterable[_Union[KeptSnapshot, _Mapping]]] = ...) -> None: ...

class KeptSnapshot(_message.Message):
    __slots__ = ("number", "versions", "saved_at")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SAVED_AT_FIELD_NUMBER: _ClassVar[int]
    number: int
    versions: _containers.RepeatedScalarFieldContainer[int]
    saved_at: float
    def __init__(self, number: _Optional[int] = ..., versions: _Optional[_Iterable[int]] = ..., saved_at: _Optional[float] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("rounds",)
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    rounds: int
    def __init__(self, rounds: _Optional[int] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run_id", "state", "uptime_seconds", "parameters", "rounds", "bytes_in", "bytes_out", "workers", "fragments", "config", "tokens", "stopped", "rates", "storage", "sessions", "version")
    class ConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    state: str
    uptime_seconds: float
    parameters: int
    rounds: int
    bytes_in: int
    bytes_out: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    fragments: _containers.RepeatedCompositeFieldContainer[FragmentStatus]
    config: _containers.ScalarMap[str, str]
    tokens: int
    stopped: str
    rates: Rates
    storage: Storage
    sessions: int
    version: str
    def __init__(self, run_id: _Optional[str] = ..., state: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., parameters: _Optional[int] = ..., rounds: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., fragments: _Optional[_Iterable[_Union[FragmentStatus, _Mapping]]] = ..., config: _Optional[_Mapping[str, str]] = ..., tokens: _Optional[int] = ..., stopped: _Optional[str] = ..., rates: _Optional[_Union[Rates, _Mapping]] = ..., storage: _Optional[_Union[Storage, _Mapping]] = ..., sessions: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Rates(_message.Message):
    __slots__ = ("rounds_per_hour", "tokens_per_second", "bytes_in_per_second", "bytes_out_per_second", "bytes_out_per_day")
    ROUNDS_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    rounds_per_hour: float
    tokens_per_second: float
    bytes_in_per_second: float
    bytes_out_per_second: float
    bytes_out_per_day: float
    def __init__(self, rounds_per_hour: _Optional[float] = ..., tokens_per_second: _Optional[float] = ..., bytes_in_per_second: _Optional[float] = ..., bytes_out_per_second: _Optional[float] = ..., bytes_out_per_day: _Optional[float] = ...) -> None: ...

class Storage(_message.Message):
    __slots__ = ("durability", "directory", "journal_bytes", "journal_written", "journal_segments", "fsyncs", "fsync_seconds", "snapshots", "snapshot_bytes", "snapshot_rounds", "snapshot_age_seconds", "free_bytes", "trouble")
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FSYNCS_FIELD_NUMBER: _ClassVar[int]
    FSYNC_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    durability: str
    directory: str
    journal_bytes: int
    journal_written: int
    journal_segments: int
    fsyncs: int
    fsync_seconds: float
    snapshots: int
    snapshot_bytes: int
    snapshot_rounds: int
    snapshot_age_seconds: float
    free_bytes: int
    trouble: str
    def __init__(self, durability: _Optional[str] = ..., directory: _Optional[str] = ..., journal_bytes: _Optional[int] = ..., journal_written: _Optional[int] = ..., journal_segments: _Optional[int] = ..., fsyncs: _Optional[int] = ..., fsync_seconds: _Optional[float] = ..., snapshots: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ..., snapshot_rounds: _Optional[int] = ..., snapshot_age_seconds: _Optional[float] = ..., free_bytes: _Optional[int] = ..., trouble: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "state", "seen_seconds", "counted", "not_counted", "last", "shard", "sync_every", "steps_per_second")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SEEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    NOT_COUNTED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SYNC_EVERY_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    state: str
    seen_seconds: float
    counted: int
    not_counted: int
    last: Heartbeat
    shard: int
    sync_every: int
    steps_per_second: float
    def __init__(self, worker_id: _Optional[str] = ..., state: _Optional[str] = ..., seen_seconds: _Optional[float] = ..., counted: _Optional[int] = ..., not_counted: _Optional[int] = ..., last: _Optional[_Union[Heartbeat, _Mapping]] = ..., shard: _Optional[int] = ..., sync_every: _Optional[int] = ..., steps_per_second: _Optional[float] = ...) -> None: ...

class FragmentStatus(_message.Message):
    __slots__ = ("index", "kind", "parameters", "version", "digest", "contributed", "waiting_for", "open_seconds", "round_seconds", "update_bytes", "rounds", "waits")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    OPEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    index: int
    kind: str
    parameters: int
    version: int
    digest: int
    contributed: _containers.RepeatedScalarFieldContainer[str]
    waiting_for: _containers.RepeatedScalarFieldContainer[str]
    open_seconds: float
    round_seconds: float
    update_bytes: int
    rounds: _containers.RepeatedCompositeFieldContainer[RoundStatus]
    waits: _containers.RepeatedCompositeFieldContainer[Wait]
    def __init__(self, index: _Optional[int] = ..., kind: _Optional[str] = ..., parameters: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[int] = ..., contributed: _Optional[_Iterable[str]] = ..., waiting_for: _Optional[_Iterable[str]] = ..., open_seconds: _Optional[float] = ..., round_seconds: _Optional[float] = ..., update_bytes: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[RoundStatus, _Mapping]]] = ..., waits: _Optional[_Iterable[_Union[Wait, _Mapping]]] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("worker_id", "seconds", "at_most", "bound")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    seconds: float
    at_most: float
    bound: str
    def __init__(self, worker_id: _Optional[str] = ..., seconds: _Optional[float] = ..., at_most: _Optional[float] = ..., bound: _Optional[str] = ...) -> None: ...

class RoundStatus(_message.Message):
    __slots__ = ("version", "members", "missed", "open_seconds", "fill_seconds", "grace_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    OPEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[RoundMember]
    missed: _containers.RepeatedScalarFieldContainer[str]
    open_seconds: float
    fill_seconds: float
    grace_seconds: float
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[RoundMember, _Mapping]]] = ..., missed: _Optional[_Iterable[str]] = ..., open_seconds: _Optional[float] = ..., fill_seconds: _Optional[float] = ..., grace_seconds: _Optional[float] = ...) -> None: ...

class RoundMember(_message.Message):
    __slots__ = ("worker_id", "weight", "norm", "scale", "waited_seconds", "tokens", "steps", "staleness")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    weight: float
    norm: float
    scale: float
    waited_seconds: float
    tokens: int
    steps: int
    staleness: int
    def __init__(self, worker_id: _Optional[str] = ..., weight: _Optional[float] = ..., norm: _Optional[float] = ..., scale: _Optional[float] = ..., waited_seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., steps: _Optional[int] = ..., staleness: _Optional[int] = ...) -> None: ...
