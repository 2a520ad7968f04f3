import json
import pathlib

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.config import Model
from v4jax.core.errors import UserError
from v4jax.data.corpus import load_corpus
from v4jax.data.tokenizer import SPECIALS, Detokenizer, Tokenizer, load_tokenizer, token_bytes

TOKENIZER = Tokenizer()
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aT 's\n\t\x0b\x1c1.<é€😀\u0301½")))


def test_specials_come_first():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.vocab_size) == (0, 1, 2, 2048)
    assert TOKENIZER.decode([0, *TOKENIZER.encode("To be"), 1, 2]) == "To be"


@pytest.mark.parametrize("special", SPECIALS)
def test_user_text_never_becomes_a_special_token(special):
    text = f"a{special}b {special}"
    assert not set(TOKENIZER.encode(text)) & {0, 1, 2}
    assert TOKENIZER.encode_batch([text, text + "é"]) == [TOKENIZER.encode(text), TOKENIZER.encode(text + "é")]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXT, max_size=4))
def test_round_trip_batch_and_bytes(texts):
    batch = TOKENIZER.encode_batch(texts)
    assert batch == [TOKENIZER.encode(text) for text in texts]
    for text, ids in zip(texts, batch, strict=True):
        assert TOKENIZER.decode(ids) == text
        assert token_bytes(TOKENIZER)[ids].sum() == len(text.encode())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 2050), max_size=60))
def test_stream_joins_to_decode(ids):
    stream = Detokenizer(TOKENIZER)
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOKENIZER.decode(ids)


def test_stream_waits_for_whole_characters():
    stream = Detokenizer(TOKENIZER)
    ids = TOKENIZER.encode("né 😀 €")
    shown = [stream.push(i) for i in ids]
    assert "".join(shown) == "né 😀 €" and stream.flush() == ""
    assert "" in shown  # the emoji is several tokens
    assert stream.push(TOKENIZER.encode("é")[0]) == "" and stream.flush() == "\ufffd"


def test_whole_play_batch_equals_library():
    text = load_corpus().heldout[0].text
    (ids,) = TOKENIZER.encode_batch([text])
    assert ids == TOKENIZER.encode(text)
    assert 2.5 < len(text) / len(ids) < 4


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "new")
    again = Tokenizer(tmp_path / "new")
    assert again.encode("Enter HAMLET") == TOKENIZER.encode("Enter HAMLET")
    assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, 2)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def saved_spec(directory: pathlib.Path) -> dict:
    """Return tokenizer.json of the built-in tokenizer, which is saved into `directory`."""
    TOKENIZER.save(directory)
    return json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_document_begins_as_the_post_processor_says(tmp_path):
    assert TOKENIZER.encode_document("To be") == [0, *TOKENIZER.encode("To be")]
    assert TOKENIZER.encode_document("") == [0] and TOKENIZER.encode_document("", add_special_tokens=False) == []
    spec = saved_spec(tmp_path)
    silent, byte_level = {"post_processor": None}, {"post_processor": spec["pre_tokenizer"]}
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    for change in (silent, byte_level):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
        assert Tokenizer(tmp_path).encode_document("To be") == TOKENIZER.encode("To be")
        Tokenizer(tmp_path, add_bos=True).save(tmp_path / "saved")
        for again in (Tokenizer(tmp_path, add_bos=True), Tokenizer(tmp_path / "saved")):
            assert again.encode_document("To be é") == TOKENIZER.encode_document("To be é")
            assert again.encode("To be") == TOKENIZER.encode("To be")
            assert again.encode_document("a<eos>") == [0, *again.encode("a<eos>")]
    with pytest.raises(UserError, match="no token of the id 9999, which is to be its bos"):
        Tokenizer(tmp_path, bos_id=9999, add_bos=True)


def test_a_bos_that_the_post_processor_ignores_is_said(tmp_path, caplog):
    spec = saved_spec(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).encode_document("a") == TOKENIZER.encode("a")
    [record] = caplog.records
    assert "asks for bos before a text" in record.message and "\n" not in record.message


def test_special_tokens_are_parsed_when_asked():
    text = "a<eos>b<pad> <bos>"
    assert TOKENIZER.special_tokens_in(text) == ["<bos>", "<eos>", "<pad>"] and not TOKENIZER.special_tokens_in("<b>")
    parsed = TOKENIZER.encode_document(text, parse_special_tokens=True)
    encode = TOKENIZER.encode
    assert parsed == [0, *encode("a"), 1, *encode("b"), 2, *encode(" "), 0]
    assert TOKENIZER.encode_document(text) == [0, *encode(text)]  # the other setting is not left behind


def test_tokens_that_no_file_names_are_the_models(tmp_path):
    _sentencepiece_like(tmp_path)
    of = lambda **ids: load_tokenizer(tmp_path, Model(layer_types=("swa",), **ids))
    assert (of(bos_id=5, eos_id=(7, 8)).bos_id, of(bos_id=5, eos_id=(7, 8)).eos_id) == (5, 7)
    assert (of(bos_id=None, eos_id=None).bos_id, of(bos_id=None, eos_id=None).eos_id) == (None, None)
    of(bos_id=None, eos_id=None).save(tmp_path / "saved")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "nowhere"}))
    assert (of(bos_id=5, eos_id=7).bos_id, of(bos_id=5, eos_id=7).eos_id) == (0, 7)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert (of(bos_id=5, eos_id=7).bos_id, of(bos_id=5, eos_id=7).eos_id) == (0, 1)


def _sentencepiece_like(path):
    """A BPE in the manner of Llama: U+2581 for spaces, byte fallback, the decoder strips the first space."""
    vocab = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a"]
    model = tokenizers.models.BPE({t: i for i, t in enumerate(vocab)}, [("\u2581", "a")], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<s>", "</s>"])
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.enable_truncation(3)
    backend.save(str(path / "tokenizer.json"))


def test_other_hugging_face_tokenizers(tmp_path):
    _sentencepiece_like(tmp_path)
    with pytest.raises(UserError, match="no bos token; name it in tokenizer_config.json or pass bos_id="):
        Tokenizer(tmp_path)
    assert Tokenizer(tmp_path, bos_id=0, eos_id=1).pad_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    ids = tokenizer.encode("ab a\u20acb")
    assert tokenizer.encode_batch(["ab a\u20acb"]) == [ids]
    assert tokenizer.decode(ids) == "ab a\u20acb"
    stream = Detokenizer(tokenizer)  # keeps the space that decode strips
    assert "".join([*map(stream.push, [0, *ids, 1]), stream.flush()]) == " ab a\u20acb"


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no tokenizer .*missing.json"):
        Tokenizer(tmp_path / "missing.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="it has no 'model'"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer(tmp_path)
