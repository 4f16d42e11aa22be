"""The messages of `inference.GRPCInferenceService` (Open Inference Protocol, version 2), described here by field.

The descriptors are built when this is imported, so that no generated code has to be kept in step with a compiler. A
field is written `name:type=number`; `*` before a type is a repeated one, `%` a map from text to that message, and a
number after `/` puts it into the message's one choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_TENSOR = "name:string=1 datatype:string=2 shape:*int64=3 parameters:%InferParameter=4 contents:InferTensorContents=5"
_MESSAGES: Mapping[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool=1",
    "ModelReadyRequest": "name:string=1 version:string=2",
    "ModelReadyResponse": "ready:bool=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string=1 version:string=2 extensions:*string=3",
    "ModelMetadataRequest": "name:string=1 version:string=2",
    "TensorMetadata": "name:string=1 datatype:string=2 shape:*int64=3",
    "ModelMetadataResponse": "name:string=1 versions:*string=2 platform:string=3 inputs:*TensorMetadata=4 "
    "outputs:*TensorMetadata=5",
    "InferParameter": "bool_param:bool=1/1 int64_param:int64=2/1 string_param:string=3/1 double_param:double=4/1 "
    "uint64_param:uint64=5/1",
    "InferTensorContents": "bool_contents:*bool=1 int_contents:*int32=2 int64_contents:*int64=3 "
    "uint_contents:*uint32=4 uint64_contents:*uint64=5 fp32_contents:*float=6 fp64_contents:*double=7 "
    "bytes_contents:*bytes=8",
    "InferInputTensor": _TENSOR,
    "InferOutputTensor": _TENSOR,
    "InferRequestedOutputTensor": "name:string=1 parameters:%InferParameter=2",
    "ModelInferRequest": "model_name:string=1 model_version:string=2 id:string=3 parameters:%InferParameter=4 "
    "inputs:*InferInputTensor=5 outputs:*InferRequestedOutputTensor=6 raw_input_contents:*bytes=7",
    "ModelInferResponse": "model_name:string=1 model_version:string=2 id:string=3 parameters:%InferParameter=4 "
    "outputs:*InferOutputTensor=5 raw_output_contents:*bytes=6",
}
_FIELD = descriptor_pb2.FieldDescriptorProto


def _add(file: Any, name: str, fields: str) -> None:
    message = file.message_type.add(name=name)
    for text in fields.split():
        title, _, rest = text.partition(":")
        kind, _, numbers = rest.partition("=")
        number, _, choice = numbers.partition("/")
        field = message.field.add(name=title, number=int(number), label=_FIELD.LABEL_OPTIONAL)
        if choice:
            if not message.oneof_decl:
                message.oneof_decl.add(name="parameter_choice")
            field.oneof_index = 0
        if kind[0] in "*%":
            field.label = _FIELD.LABEL_REPEATED
        if kind[0] == "%":
            entry = message.nested_type.add(name=f"{title.title()}Entry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=_FIELD.LABEL_OPTIONAL, type=_FIELD.TYPE_STRING)
            value = entry.field.add(name="value", number=2, label=_FIELD.LABEL_OPTIONAL)
            value.type, value.type_name = _FIELD.TYPE_MESSAGE, f".{PACKAGE}.{kind[1:]}"
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{PACKAGE}.{name}.{entry.name}"
            continue
        plain = kind.lstrip("*")
        if plain in _MESSAGES:
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
        else:
            field.type = _FIELD.Type.Value(f"TYPE_{plain.upper()}")


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="consortium/open_inference.proto", package=PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        _add(file, name, fields)
    # A pool of its own: another library in this process may bring the same names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _MESSAGES
    }


MESSAGES: Mapping[str, Any] = _classes()
"""Message classes by name."""
