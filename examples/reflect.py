"""Explore and call a service by reflection, like grpcurl, without its .proto files or generated code.

python examples/reflect.py 127.0.0.1:50051                                          # services and methods
python examples/reflect.py 127.0.0.1:50051 moeserve.v1.MoEService/ListLayers        # one call, with JSON in and out
python examples/reflect.py 127.0.0.1:50051 grpc.health.v1.Health/Check '{"service": "model.layers.0.mlp"}'
"""

from __future__ import annotations

import sys

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main(target: str, method: str = "", request: str = "{}") -> None:
    with grpc.insecure_channel(target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        if not method:
            show(database, pool)
            return
        service, _, name = method.partition("/")
        described = pool.FindServiceByName(service).methods_by_name[name]
        take, give = GetMessageClass(described.input_type), GetMessageClass(described.output_type)
        call = channel.unary_unary(f"/{method}", take.SerializeToString, give.FromString)
        print(json_format.MessageToJson(call(json_format.Parse(request, take()), timeout=10)))


def show(database: ProtoReflectionDescriptorDatabase, pool: DescriptorPool) -> None:
    for service in database.get_services():
        for method in pool.FindServiceByName(service).methods:
            print(f"{service}/{method.name}({method.input_type.name}) -> {method.output_type.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
