from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Record(_message.Message):
    __slots__ = ("frame", "staged", "closed", "published", "member", "progress")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    staged: Staged
    closed: Closed
    published: Published
    member: Member
    progress: Progress
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., staged: _Optional[_Union[Staged, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., published: _Optional[_Union[Published, _Mapping]] = ..., member: _Optional[_Union[Member, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("serial", "fragment", "base_version")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    serial: int
    fragment: int
    base_version: int
    def __init__(self, serial: _Optional[int] = ..., fragment: _Optional[int] = ..., base_version: _Optional[int] = ...) -> None: ...

class Staged(_message.Message):
    __slots__ = ("serial", "key", "generation", "tokens", "steps", "since_version", "norm")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SINCE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    serial: int
    key: Key
    generation: int
    tokens: int
    steps: int
    since_version: int
    norm: float
    def __init__(self, serial: _Optional[int] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., generation: _Optional[int] = ..., tokens: _Optional[int] = ..., steps: _Optional[int] = ..., since_version: _Optional[int] = ..., norm: _Optional[float] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("fragment", "base_version", "worker_id")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    base_version: int
    worker_id: str
    def __init__(self, fragment: _Optional[int] = ..., base_version: _Optional[int] = ..., worker_id: _Optional[str] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("fragment", "base_version", "serials", "weights", "scales", "delay")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERIALS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    DELAY_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    base_version: int
    serials: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    scales: _containers.RepeatedScalarFieldContainer[float]
    delay: int
    def __init__(self, fragment: _Optional[int] = ..., base_version: _Optional[int] = ..., serials: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[float]] = ..., scales: _Optional[_Iterable[float]] = ..., delay: _Optional[int] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("fragment", "version", "digest", "void", "expected")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    digest: int
    void: bool
    expected: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[int] = ..., void: bool = ..., expected: _Optional[_Iterable[str]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("worker_id", "generation", "shard", "state", "sync_every", "counted", "not_counted", "done", "flush", "barrier", "step", "tokens", "hung")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SYNC_EVERY_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    NOT_COUNTED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HUNG_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    generation: int
    shard: int
    state: str
    sync_every: int
    counted: int
    not_counted: int
    done: bool
    flush: int
    barrier: int
    step: int
    tokens: int
    hung: bool
    def __init__(self, worker_id: _Optional[str] = ..., generation: _Optional[int] = ..., shard: _Optional[int] = ..., state: _Optional[str] = ..., sync_every: _Optional[int] = ..., counted: _Optional[int] = ..., not_counted: _Optional[int] = ..., done: bool = ..., flush: _Optional[int] = ..., barrier: _Optional[int] = ..., step: _Optional[int] = ..., tokens: _Optional[int] = ..., hung: bool = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("opened", "stopped", "barriers", "shards")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    BARRIERS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    opened: bool
    stopped: str
    barriers: int
    shards: int
    def __init__(self, opened: bool = ..., stopped: _Optional[str] = ..., barriers: _Optional[int] = ..., shards: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("run_id", "rounds_committed", "progress", "members", "fragments", "first_segment", "saved_at", "clean", "next_serial", "segment")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SAVED_AT_FIELD_NUMBER: _ClassVar[int]
    CLEAN_FIELD_NUMBER: _ClassVar[int]
    NEXT_SERIAL_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    rounds_committed: int
    progress: Progress
    members: _containers.RepeatedCompositeFieldContainer[Member]
    fragments: _containers.RepeatedCompositeFieldContainer[FragmentState]
    first_segment: int
    saved_at: float
    clean: bool
    next_serial: int
    segment: int
    def __init__(self, run_id: _Optional[str] = ..., rounds_committed: _Optional[int] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., fragments: _Optional[_Iterable[_Union[FragmentState, _Mapping]]] = ..., first_segment: _Optional[int] = ..., saved_at: _Optional[float] = ..., clean: bool = ..., next_serial: _Optional[int] = ..., segment: _Optional[int] = ...) -> None: ...

class FragmentState(_message.Message):
    __slots__ = ("fragment", "version", "digest", "buffered", "window", "bounds", "tokens", "norms", "sizes", "works", "last_counted", "expected", "nobody", "arrays", "padding")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUFFERED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    WORKS_FIELD_NUMBER: _ClassVar[int]
    LAST_COUNTED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    NOBODY_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    version: int
    digest: int
    buffered: int
    window: int
    bounds: _containers.RepeatedScalarFieldContainer[float]
    tokens: int
    norms: _containers.RepeatedScalarFieldContainer[float]
    sizes: _containers.RepeatedScalarFieldContainer[float]
    works: _containers.RepeatedScalarFieldContainer[float]
    last_counted: _containers.RepeatedCompositeFieldContainer[Counted]
    expected: _containers.RepeatedScalarFieldContainer[str]
    nobody: bool
    arrays: _containers.RepeatedCompositeFieldContainer[ArrayDigest]
    padding: bytes
    def __init__(self, fragment: _Optional[int] = ..., version: _Optional[int] = ..., digest: _Optional[int] = ..., buffered: _Optional[int] = ..., window: _Optional[int] = ..., bounds: _Optional[_Iterable[float]] = ..., tokens: _Optional[int] = ..., norms: _Optional[_Iterable[float]] = ..., sizes: _Optional[_Iterable[float]] = ..., works: _Optional[_Iterable[float]] = ..., last_counted: _Optional[_Iterable[_Union[Counted, _Mapping]]] = ..., expected: _Optional[_Iterable[str]] = ..., nobody: bool = ..., arrays: _Optional[_Iterable[_Union[ArrayDigest, _Mapping]]] = ..., padding: _Optional[bytes] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("key", "frames", "version")
    class FramesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    key: Key
    frames: _containers.ScalarMap[int, int]
    version: int
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., frames: _Optional[_Mapping[int, int]] = ..., version: _Optional[int] = ...) -> None: ...

class ArrayDigest(_message.Message):
    __slots__ = ("name", "xxh3")
    NAME_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    name: str
    xxh3: int
    def __init__(self, name: _Optional[str] = ..., xxh3: _Optional[int] = ...) -> None: ...
