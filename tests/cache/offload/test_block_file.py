import dataclasses

import numpy as np
import pytest

from tests.cache.offload.block_fixtures import BLOCK, RECORD, ROOT, chain, item
from v4jax.cache.offload.block_file import (
    BlockKey,
    BlockSchema,
    CorruptBlockError,
    checksum,
    decode_payload,
    encode_header,
    parse_filename,
)

NAME, OTHER = chain("a", 2)


def whole(form, name=NAME, parent=ROOT):
    one = item(form, name, parent)
    return np.concatenate([np.frombuffer(encode_header(form, name, parent, one.checksum), np.uint8), one.payload])


@pytest.mark.parametrize("form", [BLOCK, RECORD], ids=["block", "record"])
def test_what_is_written_is_read(form):
    data = whole(form)
    assert data.size == form.file_bytes and (form.file_bytes - form.nbytes) % 64 == 0
    payload, sum = decode_payload(data, form, NAME, ROOT)
    assert np.array_equal(payload, item(form, NAME).payload) and sum == checksum(payload)


@pytest.mark.parametrize("form", [BLOCK, RECORD], ids=["block", "record"])
def test_every_flipped_byte_is_seen(form):
    data = whole(form)
    for i in range(data.size):
        data[i] ^= 1 << i % 8
        with pytest.raises(CorruptBlockError):
            decode_payload(data, form, NAME, ROOT)
        data[i] ^= 1 << i % 8
    decode_payload(data, form, NAME, ROOT)


@pytest.mark.parametrize("size", [0, 1, 7, 50, 99, 100, 200, BLOCK.file_bytes - 1, BLOCK.file_bytes + 1])
def test_any_other_length_is_seen(size):
    with pytest.raises(CorruptBlockError, match="bytes where"):
        decode_payload(np.resize(whole(BLOCK), size), BLOCK, NAME, ROOT)


def test_a_sound_file_under_another_key_is_not_read():
    data = whole(BLOCK)
    renamed = dataclasses.replace(BLOCK, table=(("csa.mean", *BLOCK.table[0][1:]), *BLOCK.table[1:]))
    assert renamed.file_bytes == BLOCK.file_bytes
    for form, name, parent in [(BLOCK, OTHER, ROOT), (BLOCK, NAME, OTHER), (renamed, NAME, ROOT)]:
        with pytest.raises(CorruptBlockError, match="another key"):
            decode_payload(data, form, name, parent)


def test_a_header_with_another_array_table_is_not_read():
    """The header's own checksum is right, and its key is the expected one."""

    class Forged(BlockSchema):
        digest = BLOCK.digest

    forged = Forged("block", (("csa.mean", *BLOCK.table[0][1:]), *BLOCK.table[1:]))
    with pytest.raises(CorruptBlockError, match="another array table"):
        decode_payload(whole(forged), BLOCK, NAME, ROOT)


def test_forms_differ_by_kind_names_dtypes_and_shapes():
    tables = [
        BLOCK.table,
        BLOCK.table[::-1],
        BLOCK.table[:-1],
        (("csa.main", "int16", (4, 16)),),
        (("csa.main", "int16", (64,)),),
    ]
    forms = [BlockSchema(kind, table) for kind in ("block", "record") for table in tables]
    assert len({form.digest for form in forms}) == len(forms)
    assert len({form.key(NAME) for form in forms}) == len(forms)


def test_names_of_files_tell_what_they_hold():
    key = BLOCK.key(NAME)
    assert parse_filename(key.file(OTHER)) == (key, OTHER)
    assert RECORD.key(NAME).file(ROOT) != BLOCK.key(NAME).file(ROOT)
    for file in ["lock", "", "x.block", key.file(OTHER) + ".partial", key.file(OTHER).upper(), "../" + key.file(OTHER)]:
        assert parse_filename(file) is None


def test_the_format_is_the_one_of_version_1():
    """Files outlive the process that wrote them: whoever changes their bytes changes VERSION, too."""
    form = BlockSchema("block", (("a", "uint8", (4,)),))
    data = np.arange(4, dtype=np.uint8)
    start = encode_header(form, bytes(range(16)), bytes(16), checksum(data))
    assert form.digest.hex() == "0a1a52e466b0c6b91111936e70001563" and checksum(start) == 5806745303635244694
    assert isinstance(form.key(NAME), BlockKey)
