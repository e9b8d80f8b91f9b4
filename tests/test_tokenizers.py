"""Tokenizers: texts come back as they were, files load, streams hold incomplete characters."""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.tasks import tokenizers
from archzoo.tasks.tokenizers import (
    CharacterTokenizer,
    LibraryTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    check_name,
    from_files,
    learn_bpe,
    learn_characters,
    learn_unigram,
)

SAMPLE = [
    "The king doth wake to-night and takes his rouse, 1603 and 42.\n\n  HAMLET\nTo be, or not.\n"
    * 30,
    "话说天下大势，分久必合，合久必分。\n周末七国分争，并入于秦。\n" * 30,
]
LEARN = {"characters": learn_characters, "bpe": learn_bpe, "unigram": learn_unigram}
SIZE = {"characters": None, "bpe": 400, "unigram": 400}

# Everything a file can hold but surrogates; sentencepiece's own blank is the documented exception.
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@pytest.fixture(scope="module", params=LEARN)
def learned(request):
    return LEARN[request.param](SAMPLE, SIZE[request.param])


def test_a_text_comes_back(learned):
    for text in (*SAMPLE, "", " ", "\n\n ", "  To be\n"):
        tokens = learned.encode(text)
        assert learned.decode(tokens) == text
        assert all(0 <= token < learned.vocab_size for token in tokens)
        assert [part.tolist() for part in learned.encode_many([text, text])] == [tokens, tokens]


@settings(max_examples=100, deadline=None)
@given(text=anything)
def test_any_text_comes_back(text):
    for tokenizer in (learned_once("bpe"), learned_once("unigram"), learn_characters([text])):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(text=anything)
def test_streamed_text_is_the_text(text):
    for tokenizer in (learned_once("bpe"), learned_once("unigram"), learn_characters([text])):
        stream = StreamDecoder(tokenizer)
        parts = [stream.push(token) for token in tokenizer.encode(text)]
        assert "".join(parts) + stream.finish() == text


LEARNED = {}


def learned_once(name):
    if name not in LEARNED:
        LEARNED[name] = LEARN[name](SAMPLE, SIZE[name])
    return LEARNED[name]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_a_stream_waits_for_all_bytes_of_a_character(name):
    tokenizer = learned_once(name)
    tokens = tokenizer.encode("a😀b")
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(token) for token in tokens]
    assert len(tokens) >= 6
    assert "\ufffd" not in "".join(parts)
    assert parts.index("😀") >= 4
    # A character that never ends is shown as such at the end, once.
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(token) for token in tokens[:-2]) == "a"
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_a_stream_keeps_what_a_decoder_strips_at_the_beginning(tmp_path):
    """Decoders such as Metaspace drop the first blank of a text, not of every token."""
    words = library.Tokenizer(library.models.WordLevel({"▁to": 0, "▁be": 1}, unk_token="▁to"))
    words.pre_tokenizer = library.pre_tokenizers.Metaspace()
    words.decoder = library.decoders.Metaspace()
    tokenizer = LibraryTokenizer(words)
    stream = StreamDecoder(tokenizer)
    tokens = tokenizer.encode("to be to be")
    assert "".join(stream.push(token) for token in tokens) == "to be to be"


def test_files_load_again(learned, tmp_path):
    learned.save(tmp_path / "model")
    (name,) = learned.files()
    text = SAMPLE[0] + SAMPLE[1]
    for again in (
        Tokenizer.load(tmp_path / "model"),
        Tokenizer.load(tmp_path / "model" / name),
        from_files(learned.files()),
    ):
        assert type(again) is type(learned)
        assert again.encode(text) == learned.encode(text)
        assert again.fingerprint() == learned.fingerprint()
        assert again.vocab_size == learned.vocab_size
        assert again.digit_tokens == learned.digit_tokens
    assert [path.name for path in (tmp_path / "model").iterdir()] == [name]


@pytest.mark.parametrize("name", LEARN)
def test_the_same_text_gives_the_same_tokenizer(name):
    assert LEARN[name](SAMPLE, SIZE[name]).fingerprint() == learned_once(name).fingerprint()


def test_the_character_file_works_in_the_tokenizers_library(tmp_path):
    tokenizer = CharacterTokenizer("0123456789+=\n ", special=True)
    tokenizer.save(tmp_path)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("12 +\n3=").ids == tokenizer.encode("12 +\n3=")
    assert theirs.decode(tokenizer.encode("12 +\n3=")) == "12 +\n3="
    assert theirs.token_to_id("<stop>") == tokenizer.stop_token
    assert theirs.get_vocab_size() == tokenizer.vocab_size


def test_special_tokens():
    tokenizer = CharacterTokenizer("ab", special=True)
    assert (tokenizer.stop_token, tokenizer.pad_token, tokenizer.vocab_size) == (2, 3, 4)
    assert tokenizer.decode([0, 2, 1, 3]) == "ab"
    assert [tokenizer.show(token) for token in range(4)] == ["a", "b", "stop", "pad"]
    assert CharacterTokenizer(" \n").show(0) + CharacterTokenizer(" \n").show(1) == "␣\\n"
    again = from_files(tokenizer.files())
    assert (again.stop_token, again.pad_token) == (2, 3)
    assert CharacterTokenizer("ab").stop_token is None


@pytest.mark.parametrize("name", LEARN)
def test_each_digit_is_one_token(name):
    tokenizer = LEARN[name](["0123456789 1234 567 890 2024 1603\n" * 100], SIZE[name])
    digits = tokenizer.digit_tokens
    assert len(set(digits)) == 10
    assert tokenizer.decode(digits) == "0123456789"
    number = "31415926535897932384626"
    assert [tokenizer.encode(digit)[0] for digit in number] == tokenizer.encode(number)


def test_merged_digits_are_found_out():
    merged = library.Tokenizer(library.models.BPE())
    merged.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    merged.train_from_iterator(["0123456789 " * 50], trainer)
    assert LibraryTokenizer(merged).digit_tokens is None
    assert CharacterTokenizer("abc").digit_tokens is None


def test_a_given_tokenizer_knows_its_stop_token():
    given = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    given.add_special_tokens(["<|endoftext|>"])
    tokenizer = from_files({"tokenizer.json": given.to_str().encode()})
    assert isinstance(tokenizer, LibraryTokenizer)
    assert tokenizer.stop_token == given.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == max(given.get_vocab().values()) + 1  # ids may have gaps


BLANKS = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b"


@pytest.mark.parametrize("name", LEARN)
def test_many_texts_at_once_are_encoded_as_each_alone(name):
    texts = [*SAMPLE, "to be", "", "or not", " to be\n", *SAMPLE] * 3
    tokenizer = learned_once(name)
    assert [t.tolist() for t in tokenizer.encode_many(texts)] == list(map(tokenizer.encode, texts))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from(BLANKS) | st.sampled_from("ab'sé1½٣!?,"), max_size=20)))
def test_words_encoded_once_are_what_the_library_makes_of_the_text(texts):
    tokenizer = learned_once("bpe")
    assert [tokens.tolist() for tokens in tokenizer.encode_many(texts)] == [
        tokenizer.encode(text) for text in texts
    ]


def test_a_memory_of_words_that_is_full_forgets_and_continues(monkeypatch):
    monkeypatch.setattr(tokenizers._Words, "MOST", 5)
    monkeypatch.setattr(tokenizers._Words, "LONGEST", 4)
    tokenizer = learn_bpe(SAMPLE, SIZE["bpe"])
    for text in ("to be or not to be that is", "the king", "a" * 9 + " to " + "b" * 9, "", "to be"):
        for again in range(2):
            (tokens,) = tokenizer.encode_many([text])
            assert tokens.tolist() == tokenizer.encode(text), again
    assert len(tokenizer._words._index) <= 5


def test_threads_that_share_a_tokenizer_get_what_each_would_alone():
    tokenizer = tokenizers.learn_bpe(["to be or not to be " * 20], 270)
    texts = [" ".join(f"w{n}x{word}" for word in range(2000)) for n in range(12)]
    want = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: tokenizer.encode_many([text])[0].tolist(), texts))
    assert found == want


def test_words_are_not_remembered_where_tokens_may_cross_them():
    tokenizer = learn_bpe(SAMPLE, SIZE["bpe"])
    assert tokenizers._splits_at_blanks(tokenizer.library)
    other = library.Tokenizer.from_str(tokenizer.library.to_str())
    other.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert not tokenizers._splits_at_blanks(other)
    (tokens,) = LibraryTokenizer(other).encode_many(["to be or not"])
    assert tokens.tolist() == other.encode("to be or not").ids
    tokenizer.library.add_tokens(["be or"])  # a word of two
    assert not tokenizers._splits_at_blanks(tokenizer.library)


def test_what_a_file_says_of_cutting_and_adding_is_switched_off():
    """A tokenizer.json that was saved with truncation kept 1,536 of a text's 71,312 tokens."""
    text = "again and again <|endoftext|> and <pad> again " * 40
    given = learn_bpe([text], 300).library
    given.add_special_tokens(["<|endoftext|>", "<s>"])
    given.add_tokens([library.AddedToken("<pad>", special=False)])
    plain = from_files({"tokenizer.json": given.to_str().encode()})
    given.enable_truncation(5)
    given.enable_padding(length=900, pad_id=0)
    given.model.dropout = 0.5  # merges left out at random
    given.post_processor = library.processors.TemplateProcessing(
        single="<s> $A <|endoftext|>",
        special_tokens=[(name, given.token_to_id(name)) for name in ("<s>", "<|endoftext|>")],
    )
    tokenizer = from_files({"tokenizer.json": given.to_str().encode()})
    for each in (plain, tokenizer, from_files(tokenizer.files())):
        tokens = each.encode(text)
        assert len(tokens) > 400 and each.decode(tokens) == text
        assert tokens == plain.encode(text) == each.encode(text)
        assert [tokens] * 2 == [found.tolist() for found in each.encode_many([text, text])]
        control = {each.library.token_to_id(name) for name in ("<s>", "<|endoftext|>", "<pad>")}
        assert not control & set(tokens)
        assert {each.stop_token, each.pad_token} < control
        # By name it is the special token, for `generate --stop`.
        assert each.single("<s>") in control and each.single("<s>x") is None


def test_sentencepiece_adds_nothing_and_reads_no_control_symbols():
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be <s> or </s> not to be"] * 50),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=["<|user|>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    processor = tokenizer.processor
    tokens = tokenizer.encode("to <s> be </s><|user|>")
    control = {processor.piece_to_id(name) for name in ("<s>", "</s>", "<|user|>")}
    assert not control & set(tokens) and tokenizer.stop_token in control
    assert tokenizer.decode(tokens) == "to <s> be </s><|user|>"
    assert tokenizer.single("<|user|>") == processor.piece_to_id("<|user|>")


# ---------------------------------------------------------------------------- bad input


def refused(error, message, call, *arguments):
    with pytest.raises(error, match=message) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)


def test_unknown_characters_are_named():
    tokenizer = CharacterTokenizer("abc")
    refused(ValueError, r"'é' \(U\+00E9\) at position 2 .*'abc'.*bpe", tokenizer.encode, "abé")
    refused(ValueError, r"'😀' \(U\+1F600\) at position 0", tokenizer.encode, "😀")
    refused(ValueError, r"'a' \(U\+0061\)", CharacterTokenizer("").encode, "a")


def test_a_vocabulary_too_small_says_what_is_needed():
    refused(ValueError, "3 is too small: the text has 4 different", learn_characters, ["abcd"], 3)
    refused(ValueError, "200 is too small.*256 bytes", learn_bpe, SAMPLE, 200)
    refused(ValueError, "vocab_size 260 does not suit a unigram", learn_unigram, SAMPLE, 260)
    assert learn_characters(["abcd", "bcd"], 4).vocab_size == 4


def test_unknown_names_and_missing_files(tmp_path):
    refused(
        ValueError, "unknown tokenizer 'unigrams'.*did you mean unigram?", check_name, "unigrams"
    )
    refused(ValueError, "unknown tokenizer 'byte'", check_name, "byte")
    refused(FileNotFoundError, "no tokenizer at nowhere.json", check_name, "nowhere.json")
    refused(FileNotFoundError, "holds no tokenizer.json", Tokenizer.load, tmp_path)
    (tmp_path / "last.ckpt").touch()
    refused(FileNotFoundError, "; the checkpoint .*last.ckpt holds its", Tokenizer.load, tmp_path)
    (tmp_path / "last.ckpt").unlink()
    for name in LEARN:
        check_name(name)
    check_name(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe\x00 nonsense"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(ValueError, f"{name}: not a ", Tokenizer.load, tmp_path / name)


def test_a_tokenizer_is_one_file():
    refused(ValueError, "one file, not 0", from_files, {})


def test_unigram_keeps_the_model_it_was_given():
    model = learned_once("unigram").model
    assert SentencePieceTokenizer(model).files() == {"tokenizer.model": model}
