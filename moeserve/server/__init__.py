"""gRPC in front of an engine, which is a protocol here."""

from moeserve.server.boundary import Observe
from moeserve.server.control import Control
from moeserve.server.engine import Engine
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.proxy import SharedPort
from moeserve.server.security import check_exposure, controller_address, frontend_tokens

__all__ = [
    "Control",
    "Engine",
    "GrpcServer",
    "Observe",
    "SharedPort",
    "check_exposure",
    "controller_address",
    "frontend_tokens",
]
