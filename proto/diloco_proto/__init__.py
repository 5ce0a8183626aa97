"""What server and client must agree on, byte for byte."""

import os

# gRPC's fork handlers cannot stop its threads and abort DataLoader workers (grpc issue 32992); our code never
# uses gRPC in a forked child. It must be set before grpc is imported for the first time.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
