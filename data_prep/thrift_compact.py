"""Thrift's compact protocol, in which Parquet writes its footer: any struct to plain values and back, without a schema.

Fields that a reader does not know are kept as they are, which generated code would leave out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Types as they stand in the low four bits before a value. (Maps are not in Parquet's footer.)
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _, STRUCT = range(1, 13)
_INTEGERS = (I16, I32, I64)
_LONG_LIST = 15


class Field(NamedTuple):
    """One value and its type; a list's value is (type of its elements, elements)."""

    kind: int
    value: Any


# field number -> value
Struct = dict[int, Field]


class Reader:
    """Reads values from a position of some bytes on."""

    def __init__(self, content: bytes, position: int = 0) -> None:
        self._content, self._position = content, position

    def struct(self) -> Struct:
        """Read one struct.

        Raises:
            ValueError: this is something else.
        """
        fields: Struct = {}
        number = 0
        while head := self._byte():
            # Numbers are written as the step from the field before, large steps apart from the type.
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = Field(head & 15, self._value(head & 15))
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE):
            return None
        if kind in _INTEGERS:
            return self._signed()
        if kind == STRUCT:
            return self.struct()
        if kind == BINARY:
            return self._bytes(self._unsigned())
        if kind in (LIST, SET):
            return self._list()
        if kind in (BYTE, DOUBLE):
            return self._bytes(1 if kind == BYTE else 8)
        raise ValueError(f"type {kind} at byte {self._position} is not of Thrift's compact protocol")

    def _list(self) -> tuple[int, list[Any]]:
        head = self._byte()
        kind, count = head & 15, head >> 4
        if count == _LONG_LIST:
            count = self._unsigned()
        if kind in (TRUE, FALSE):
            # In a list a truth value is a byte of its own.
            kind = BYTE
        return kind, [self._value(kind) for _ in range(count)]

    def _byte(self) -> int:
        self._position += 1
        return self._content[self._position - 1]

    def _bytes(self, count: int) -> bytes:
        self._position += count
        return self._content[self._position - count : self._position]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        # Zigzag: 0, -1, 1, -2 are written as 0, 1, 2, 3.
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)


def encode_struct(fields: Struct) -> bytes:
    """The bytes of a struct."""
    content = bytearray()
    before = 0
    for number, field in sorted(fields.items()):
        step = number - before
        content += bytes([step << 4 | field.kind]) if 0 < step < 16 else bytes([field.kind]) + _signed(number)
        content += _encode(field.kind, field.value)
        before = number
    return bytes(content) + b"\0"


def _encode(kind: int, value: Any) -> bytes:
    if value is None:
        return b""
    if kind in _INTEGERS:
        return _signed(value)
    if kind == STRUCT:
        return encode_struct(value)
    if kind == BINARY:
        return _unsigned(len(value)) + value
    if kind in (LIST, SET):
        return _encode_list(*value)
    content: bytes = value
    return content


def _encode_list(kind: int, values: list[Any]) -> bytes:
    count = len(values)
    head = bytes([count << 4 | kind]) if count < _LONG_LIST else bytes([_LONG_LIST << 4 | kind]) + _unsigned(count)
    return head + b"".join(_encode(kind, value) for value in values)


def _unsigned(value: int) -> bytes:
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(content) + bytes([value])


def _signed(value: int) -> bytes:
    return _unsigned(value << 1 ^ value >> 63)
