"""What lies between gRPC and a method: messages are read when there is room for them, parsed, and their answers written or left to gRPC.

A server of gRPC reads the message of a unary call before anybody is asked, however large it is. To the server every call is therefore one
with many messages, of which nothing is read before it is asked for; on the wire there is no difference.
"""

from __future__ import annotations

import inspect
from contextlib import aclosing
from typing import Any

import grpc

from moeserve.server.parsing import Parser
from moeserve.server.rpc import Behavior, Context, Handler
from moeserve.server.transfers import Transfers


def answering(method: str, handler: Handler, transfers: Transfers) -> Behavior:
    """The method as it is to be called for a call whose messages have not been read.

    A message without a deserializer brings tensors: it is counted while it is answered, and not read when there is no room.
    """
    parser = Parser(method, handler.request_deserializer)
    kinds = {True: "stream", False: "unary"}
    inner: Behavior = getattr(handler, f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}")

    async def counted(_messages: Any, context: Context) -> Any:
        budget = transfers.budget
        budget.require_room()
        transfers.refuse_early(context)
        message = await transfers.read(context)
        nbytes = len(message)
        budget.take(nbytes)
        try:
            answer = await inner(message, context)
        finally:
            budget.add(-nbytes)
        transfers.leave(context, len(answer))
        return answer

    async def answer_one(_messages: Any, context: Context) -> Any:
        message = await transfers.read(context)
        answer = await _answered(inner(parser.one(message, context), context), context, transfers)
        if not handler.response_streaming:
            transfers.leave(context, 0)
        return answer

    async def answer_many(_messages: Any, context: Context) -> Any:
        async with transfers.arriving.stream(context):
            read = parser.each(transfers.messages(context), context)
            return await _answered(inner(read, context), context, transfers)

    if handler.request_streaming:
        return answer_many
    return counted if handler.request_deserializer is None else answer_one


def as_stream(handler: Handler, behavior: Behavior) -> Handler:
    """`behavior` in place of the method of `handler`: it reads its messages itself."""
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(behavior, None, handler.response_serializer)


async def _answered(answer: Any, context: Context, transfers: Transfers) -> Any:
    if not inspect.isasyncgen(answer):
        return await answer
    async with aclosing(answer):
        async for message in answer:
            await transfers.write(context, message, 0)
    return None
