"""What our tokenizers make of tiktoken's files is what tiktoken makes of them."""

import base64
import inspect
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.tasks.tiktoken_files import ENCODINGS
from archzoo.tasks.tokenizers import Tokenizer, from_files, learn_bpe

tiktoken = pytest.importorskip("tiktoken")
openai_public = pytest.importorskip("tiktoken_ext.openai_public")

pytestmark = pytest.mark.extras

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["r50k_base", "cl100k_base", "o200k_base"]


def pattern_of(name: str) -> str:
    """tiktoken's own, out of its source: asking for an encoding would download its ranks."""
    if name == "r50k_base":
        return openai_public.r50k_pat_str
    kept: dict[str, str] = {}
    source = inspect.getsource(getattr(openai_public, name))
    source = source.replace("load_tiktoken_bpe(", "dict(url=")
    exec(source, vars(openai_public) | {"dict": lambda **_: {}}, kept)  # ranks: none
    return str(kept[name]()["pat_str"])  # type: ignore[operator]


def learned() -> dict[bytes, int]:
    """Ranks of a vocabulary that was learned here from two languages."""
    texts = [
        (ROOT / "data" / f"{n}.txt").read_text()[:60_000] for n in ("shakespeare", "three_kingdoms")
    ]
    library = learn_bpe([*texts, "0123456789 1234 \r\n\r\n\t  x" * 50], 1500)
    bytes_of = {chr(byte if printable(byte) else 256 + n): byte for n, byte in numbered()}
    vocabulary = library.library.get_vocab()
    return {bytes(bytes_of[letter] for letter in word): rank for word, rank in vocabulary.items()}


def printable(byte: int) -> bool:
    return byte in {*range(33, 127), *range(161, 173), *range(174, 256)}


def numbered() -> list[tuple[int, int]]:
    others = iter(range(256))
    return [(0 if printable(byte) else next(others), byte) for byte in range(256)]


RANKS = learned()


@pytest.fixture(scope="module", params=NAMES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tiktoken.Encoding]:
    name = request.param
    path = tmp_path_factory.mktemp("ranks") / f"{name}.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in RANKS.items()))
    theirs = tiktoken.Encoding(
        name,
        pat_str=pattern_of(name),
        mergeable_ranks=RANKS,
        special_tokens=dict(ENCODINGS[name].special),
    )
    return Tokenizer.load(path), theirs


def test_texts_are_encoded_as_by_tiktoken(both: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, theirs = both
    for path in (
        *sorted((ROOT / "data").glob("*.txt")),
        *sorted((ROOT / "archzoo" / "tasks").glob("*.py")),
    ):
        text = path.read_text()[-100_000:]
        assert ours.encode(text) == theirs.encode_ordinary(text), path.name
        assert ours.decode(ours.encode(text)) == text
    again = from_files(ours.files())
    assert again.encode("to be or not") == theirs.encode_ordinary("to be or not")
    assert ours.stop_token == theirs.eot_token and ours.vocab_size == theirs.n_vocab


ODD = st.text(
    st.sampled_from("ab AB'sSLltT123  \n\r\t.,!/é字ſ😀\u00a0\u0301\u2028\u200b²½ǅ\x1c\x85"),
    max_size=40,
)


@settings(max_examples=500, deadline=None)
@given(text=ODD | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=30))
def test_odd_texts_are_encoded_as_by_tiktoken(
    both: tuple[Tokenizer, tiktoken.Encoding], text: str
) -> None:
    ours, theirs = both
    assert ours.encode(text) == theirs.encode_ordinary(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(min_size=2, max_size=5).map(lambda b: bytes(97 + n % 3 for n in b)), max_size=30
    ),
    st.text("abc", max_size=40),
)
def test_any_ranks_give_what_tiktoken_gives(tokens: list[bytes], text: str) -> None:
    """Ranks that no learning gave, in which several pairs of tokens make the same one."""
    from archzoo.tasks.tokenizers import from_ranks

    every = [*(bytes([n]) for n in range(256)), *tokens]
    ranks = {token: n for n, token in enumerate(dict.fromkeys(every))}
    theirs = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    assert from_ranks(ranks, r"\S+|\s+").encode(text) == theirs.encode_ordinary(text)
