"""diloco-server: owns the global parameters of one training run and their outer optimizer."""

from diloco_server.config import RunConfig, ServerConfig
from diloco_server.daemon import serve

__all__ = ["RunConfig", "ServerConfig", "serve"]
