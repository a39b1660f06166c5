"""Weighted and long prompts: the grammar against trees that were written out, chunks and weights
against encoding by hand.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import clip_encoders
from sfumato.errors import UserError
from sfumato.predict.conditioners._chunks import BACK, cut
from sfumato.predict.conditioners._prompt import foreign_notation, parse, parse_comfyui
from sfumato.predict.conditioners._weigh import weigh
from sfumato.predict.conditioners.base import PROMPT_WEIGHTS
from sfumato.predict.conditioners.clip_text import ClipText, ClipTextConfig
from sfumato.predict.text_encoders.clip import ClipEncoder, Token
from sfumato.train.conditions.captions import Captions
from sfumato.types import ImageSpec

quick = hypothesis_settings(max_examples=200, deadline=None)

# ---- the grammar ---------------------------------------------------------------------------------


def pieces_of(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt without BREAK."""
    (pieces,) = parse(prompt)
    return pieces


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a cat: 3 o'clock, c:\\windows", [("a cat: 3 o'clock, c:\\windows", 1.0)]),
        ("a (red) hat", [("a ", 1.0), ("red", 1.1), (" hat", 1.0)]),
        ("a (red:1.3) hat", [("a ", 1.0), ("red", 1.3), (" hat", 1.0)]),
        ("a (red: +.5 )", [("a ", 1.0), ("red", 0.5)]),
        ("(no:-1.)", [("no", -1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("[pale] (a)(b)", [("pale", 1 / 1.1), (" ", 1.0), ("ab", 1.1)]),
        ("[a (b:1.2)]", [("a ", 1 / 1.1), ("b", 1.2 / 1.1)]),
        (r"a \(red\) \[hat\] \\ \n", [(r"a (red) [hat] \ \n", 1.0)]),
        (r"(\(red\):2)", [("(red)", 2.0)]),
        (r"(a:1.2\)", [("a:1.2)", 1.1)]),
        ("a (red hat", [("a ", 1.0), ("red hat", 1.1)]),  # never closed: to the end
        ("a [red (hat", [("a ", 1.0), ("red ", 1 / 1.1), ("hat", 1.1 / 1.1)]),
        ("a red) hat] :1.2)", [("a red) hat] :1.2)", 1.0)]),  # never opened: text
        ("(a [b) c]", [("a ", 1.1), ("b", 1.1 / 1.1), (" c", 1 / 1.1)]),  # crossed
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2:3)", [("a:1.2", 3.0)]),
        ("()", [("", 1.0)]),
        ("(a|b)", [("a|b", 1.1)]),
        (r"\[a|b\] \[10:30\]", [("[a|b] [10:30]", 1.0)]),
    ],
)
def test_examples(prompt: str, pieces: list[tuple[str, float]]) -> None:
    expected = [(text, pytest.approx(weight, rel=1e-15)) for text, weight in pieces]
    assert pieces_of(prompt) == expected


def test_doctests_of_the_program_whose_notation_it_is() -> None:
    """Those of its parse_prompt_attention, with "on" at 1.1 / 1.1 = 1 beside its neighbours."""
    cases = {
        "normal text": [("normal text", 1.0)],
        "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
        "(unbalanced": [("unbalanced", 1.1)],
        r"\(literal\]": [("(literal]", 1.0)],
        "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    }
    for prompt, pieces in cases.items():
        expected = [(text, pytest.approx(weight, rel=1e-12)) for text, weight in pieces]
        assert pieces_of(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a BREAK b", ["a", "b"]),
        ("a\nBREAK\nb", ["a", "b"]),
        ("a,BREAK,b", ["a,", ",b"]),
        ("a, BREAK b,\n BREAK: c", ["a,", "b,", ": c"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK", ["a", ""]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("BREAK", ["", ""]),
        ("a.BREAK!", ["a.", "!"]),
        ("a break Break BREAKFAST OUTBREAK _BREAK", ["a break Break BREAKFAST OUTBREAK _BREAK"]),
    ],
)
def test_break_is_a_word_of_its_own_in_capitals(prompt: str, segments: list[str]) -> None:
    assert parse(prompt) == [[(text, 1.0)] for text in segments]


def test_brackets_reach_beyond_break() -> None:
    assert parse("a (b BREAK c:1.5) [BREAK d]") == [
        [("a ", 1.0), ("b", 1.5)],
        [("c", 1.5), (" ", 1.0)],
        [("d", 1 / 1.1)],
    ]


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1.0)]),
        ("a [red] BREAK hat", [("a [red] BREAK hat", 1.0)]),
        ("a (red) (hat:1.3)", [("a ", 1.0), ("red", 1.1), (" ", 1.0), ("hat", 1.3)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("((red:1.3) hat:0.5)", [("red", 1.3), (" hat", 0.5)]),  # replaced, not multiplied
        ("(a (b))", [("a ", 1.1), ("b", 1.1 * 1.1)]),
        (r"\(a\) (b\):2)", [("(a) ", 1.0), ("b)", 2.0)]),
        (r"a \[b\] c:\d", [(r"a \[b\] c:\d", 1.0)]),
        ("a (red hat", [("a (red hat", 1.0)]),  # never closed: text
        ("a) b", [("a) b", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("(a:1.2:3)", [("a:1.2", 3.0)]),
        ("(a: -1e-1 )", [("a", -0.1)]),
        ("()", [("", 1.0)]),
    ],
)
def test_examples_of_comfyui(prompt: str, pieces: list[tuple[str, float]]) -> None:
    assert parse_comfyui(prompt) == pieces


@pytest.mark.parametrize("number", ["30", "-11", "nan", "inf"])
def test_comfyuis_weights_are_bounded_too(number: str) -> None:
    with pytest.raises(UserError, match=f"weight {number} in prompt .*expected -10 to 10"):
        parse_comfyui(f"a (b:{number})")


def test_parentheses_nest_without_bound() -> None:
    assert parse_comfyui("(" * 3000 + "a:0.5" + ")" * 3000) == [("a", 0.5)]
    assert pieces_of("([" * 3000 + "a" + "])" * 3000) == [("a", pytest.approx(1.0))]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            "lunch (at 12:30)",
            r"weight 30 in prompt 'lunch \(at 12:30\)': expected -10 to 10; write",
        ),
        ("(a:-11)", "weight -11"),
        ("(a:" + "9" * 400 + ")", "expected -10 to 10"),
        ("a [cat:dog:0.5]", r"has \[from:to:when\] or \[one\|other\]"),
        ("a [cat:10]", "expected one prompt for all steps"),
        ("a [cat|(dog:1.2)] b", "expected one prompt for all steps"),
    ],
)
def test_bad_prompts_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse(prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("prompt", "notation"),
    [
        ("a <lora:name:0.8> cat", "<lora:name:0.8>"),
        ("a cat <hypernet:x:1>", "<hypernet:x:1>"),
        ("a cat AND a dog", "AND"),
        ("a CAT AND A DOG", "AND"),
        ("CATS AND DOGS", None),
        ("sand and ANDES", None),
        ("embedding:easynegative, blurry", "embedding:easynegative"),
        ("a {red|blue} __animal__", "{red|blue}"),
        ("a __animals/cat__", "__animals/cat__"),
        ("a (red:1,3) cat", ":1,3)"),
        ("a (red)1.3 cat", ")1.3"),
        ("boot++, red", "boot++"),
        ("a (red bag)--", ")--"),
        ("a (red bag)- and (cat)+", ")-"),
        ('("a cat", "a dog").blend(1, 2)', ".blend("),
        ('a "cat".swap("dog")', ".swap("),
        ("C++ and g++, 18+, half-(open)-ended, pro--am, a -- b, and (b)", None),
        ("a (red:1.3) [cat], <cat> at 12:30 {in set} f/1.4 snake_case (C++), 3, 4", None),
    ],
)
def test_notations_of_other_programs(prompt: str, notation: str | None) -> None:
    assert foreign_notation(prompt) == notation


def test_the_first_notation_of_several_prompts(sd: ClipText) -> None:
    prompts = ["a cat", None, "a <lora:x:1> cat"]
    assert sd.foreign_notation(prompts) == "<lora:x:1>"
    assert sd.foreign_notation(prompts[:2]) is None


Tree = Any  # a text, or (bracket, number or None, trees)
texts = st.text(alphabet=r"ab ,()[]\.1", min_size=1, max_size=6)
numbers = st.one_of(st.none(), st.sampled_from(["1.3", "0.5", "-2", ".75", "+1", "10."]))


def groups(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.tuples(st.sampled_from("(["), numbers, st.lists(inner, min_size=1, max_size=3))


trees = st.lists(st.recursive(texts, groups, max_leaves=8), max_size=4)


def written(tree: Tree) -> str:
    if isinstance(tree, str):
        return "".join("\\" + c if c in r"()[]\ ".strip() else c for c in tree)
    bracket, number, inner = tree
    body = "".join(map(written, inner))
    return f"[{body}]" if bracket == "[" else f"({body}{'' if number is None else ':' + number})"


def weights(tree: Tree) -> Iterator[tuple[str, float]]:
    if isinstance(tree, str):
        yield tree, 1.0
        return
    bracket, number, inner = tree
    factor = 1 / 1.1 if bracket == "[" else 1.1 if number is None else float(number)
    yield from ((text, weight * factor) for part in inner for text, weight in weights(part))


def joined(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Letter by letter: neighbours may be joined or not."""
    return [(letter, weight) for text, weight in pieces for letter in text]


@quick
@given(trees)
def test_weights_nest_and_multiply_and_all_text_survives(forest: list[Tree]) -> None:
    result = pieces_of("".join(map(written, forest)))
    assert joined(result) == joined([piece for tree in forest for piece in weights(tree)])
    assert all(a[1] != b[1] for a, b in pairwise(result)) and len(result) >= 1


@quick
@given(
    st.text(alphabet=st.characters(blacklist_characters="()[]\\", blacklist_categories=("Cs",))),
    st.integers(1, 4),
)
def test_plain_text_is_itself(text: str, depth: int) -> None:
    assert pieces_of(text) == [(text, 1.0)]
    assert pieces_of(text + ")" * depth) == [(text + ")" * depth, 1.0)]
    weight = 1.0
    for _ in range(depth):
        weight *= 1.1
    if text:
        assert pieces_of("(" * depth + text) == [(text, weight)]


@quick
@given(st.text(alphabet=r"a:1.|()[]\ ,"), st.sampled_from([pieces_of, parse_comfyui]))
def test_any_text_is_read_or_refused_in_a_sentence(text: str, notation: Any) -> None:
    try:
        pieces = notation(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert pieces and all(abs(weight) < float("inf") for _, weight in pieces)
        kept = iter(text)  # no letter is invented, and none changes places
        assert all(letter in kept for part, _ in pieces for letter in part)


# ---- chunks --------------------------------------------------------------------------------------


@st.composite
def sentences(draw: st.DrawFn) -> list[Token]:
    kinds = draw(st.lists(st.sampled_from(["part", "word", "word", "word", "comma"]), max_size=120))
    return [Token(i, last=kind != "part", comma=kind == "comma") for i, kind in enumerate(kinds)]


@quick
@given(sentences(), st.integers(3, 40))
def test_chunks_are_the_tokens_in_order_cut_between_words(tokens: list[Token], room: int) -> None:
    chunks = cut(tokens, room)
    assert [token for chunk in chunks for token in chunk] == tokens
    assert all(0 < len(chunk) <= room for chunk in chunks) or chunks == [[]]
    assert len(chunks) == 1 or len(tokens) > room
    words = [0, *accumulate(token.last for token in tokens)]  # which word a token belongs to
    sizes = Counter(words[token.id] for token in tokens)
    for chunk, following in pairwise(chunks):
        word = words[following[0].id]
        if not chunk[-1].last:  # a word is cut: it could not be kept whole
            assert sizes[word] > room
        elif not chunk[-1].comma:  # then none was near, and the next word would not have fitted
            assert not any(token.comma for token in chunk[-BACK:])
            assert len(chunk) + sizes[word] > room


def test_a_chunk_ends_at_a_comma_that_is_near_and_at_a_word_otherwise() -> None:
    def sizes(*commas: int) -> list[int]:
        return [len(chunk) for chunk in cut([Token(i, comma=i in commas) for i in range(100)], 75)]

    assert sizes() == [75, 25]
    assert sizes(10, 60, 70) == [71, 29]
    assert sizes(55) == [56, 44]
    assert sizes(54) == [75, 25]  # more than BACK tokens before the end
    assert [len(c) for c in cut([Token(i, last=i % 50 == 49) for i in range(100)], 75)] == [50, 50]
    assert [len(c) for c in cut([Token(i, last=False) for i in range(160)], 75)] == [75, 75, 10]


# ---- encoders ------------------------------------------------------------------------------------

PICTURE = ImageSpec(64, 48)


@pytest.fixture(scope="module")
def sd() -> ClipText:
    return ClipText(ClipEncoder(clip_encoders.tokenizer(), clip_encoders.encoder(False, 0), False))


@pytest.fixture(scope="module")
def sdxl(sd: ClipText) -> ClipText:
    config = ClipTextConfig(force_zeros_for_empty_prompt=True)
    return ClipText(
        sd.encoder,
        ClipEncoder(clip_encoders.tokenizer("!"), clip_encoders.encoder(True, 1), True),
        config,
    )


def tokens(conditioner: ClipText, *prompts: str | None) -> Tensor:
    result = conditioner(prompts, PICTURE).tokens
    assert result is not None
    return result


def pooled(conditioner: ClipText, *prompts: str | None) -> Tensor:
    result = conditioner(prompts, PICTURE).vector
    assert result is not None
    return result[:, :10]


CATS, DOGS = "cat " * 75, "dog " * 75


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_long_prompt_is_its_chunks_each_encoded_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    conditioner: ClipText = request.getfixturevalue(kind)
    assert tokens(conditioner, CATS).shape[1] == 77  # 75 words fit
    assert tokens(conditioner, CATS + "dog").shape[1] == 2 * 77
    for prompt, parts in (
        (CATS + DOGS + "red", [CATS, DOGS, "red"]),
        ("cat " * 70 + ", " + "dog " * 10, ["cat " * 70 + ",", "dog " * 10]),
    ):
        expected = torch.cat([tokens(conditioner, part) for part in parts], 1)
        assert torch.equal(tokens(conditioner, prompt), expected)
        if kind == "sdxl":
            assert torch.equal(pooled(conditioner, prompt), pooled(conditioner, parts[0]))
    weighted = tokens(conditioner, CATS + "(dog:1.4)")
    assert torch.equal(weighted[:, :77], tokens(conditioner, CATS)) and torch.equal(
        weighted[:, 77:], tokens(conditioner, "(dog:1.4)")
    )


@pytest.mark.invariance
def test_rows_equal_single_prompts_and_the_mask_ends_with_them(sdxl: ClipText) -> None:
    prompts = ["red dog", CATS + DOGS + "red", None, CATS + "red", "red dog", ""]
    result, lengths = sdxl(prompts, PICTURE), [77, 231, 77, 154, 77, 77]
    assert result.mask is not None and result.tokens is not None and result.vector is not None
    assert result.mask.sum(1).tolist() == lengths
    for k, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = sdxl([prompt], PICTURE)
        assert alone.mask is None and alone.tokens is not None and alone.vector is not None
        assert torch.equal(result.tokens[k, :length], alone.tokens[0]) and torch.equal(
            result.vector[k], alone.vector[0]
        )
        assert not result.tokens[k, length:].any() and result.mask[k, :length].all()
    assert sdxl(["a", "b", None], PICTURE).mask is None


def test_attention_does_not_see_where_a_short_row_was_padded(sd: ClipText) -> None:
    from sfumato.nn.attention import Attention

    layer, x = (
        Attention(8, 2, 4, context_width=sd.width).eval(),
        torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)),
    )
    both = sd(["red dog", CATS + "red"])
    assert both.mask is not None and both.tokens is not None
    with torch.no_grad():
        padded = layer(x.expand(2, -1, -1), both.tokens, both.mask)[0]
        torch.testing.assert_close(padded, layer(x, tokens(sd, "red dog"))[0], rtol=1e-5, atol=1e-6)


def test_each_prompt_is_encoded_once(sd: ClipText, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = ClipEncoder.encode

    def counted(self: Any, chunk: Any, **more: Any) -> Any:
        seen.append(len(chunk))
        return before(self, chunk, **more)

    monkeypatch.setattr(ClipEncoder, "encode", counted)
    sd(["cat", "red dog", "cat", "cat"])
    assert seen == [1, 2]


def test_a_long_prompt_can_be_refused_and_nothing_is_cut_off(sd: ClipText) -> None:
    strict = replace(sd, config=replace(sd.config, truncation="refuse"))
    assert torch.equal(tokens(strict, CATS), tokens(sd, CATS))
    with pytest.raises(
        UserError,
        match=r"prompt 'cat cat .* dog' has 76 tokens: expected at most 75 tokens in one chunk; "
        r"shorten it, or set truncation='chunks'",
    ):
        strict(["cat", CATS + "dog"])
    with pytest.raises(UserError, match="prompt 'cat BREAK dog' has BREAK: expected at most 75"):
        strict(["cat BREAK dog"])
    for count in (74, 75, 76, 149, 150, 151):  # the last word always shows
        assert not torch.equal(tokens(sd, "cat " * count), tokens(sd, "cat " * (count - 1) + "dog"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_break_ends_a_chunk_that_padding_fills(kind: str, request: pytest.FixtureRequest) -> None:
    """Each chunk is as its text alone; an empty one is of padding; the last BREAK begins none."""
    conditioner: ClipText = request.getfixturevalue(kind)
    for prompt, parts in (
        ("cat BREAK dog", ["cat", "dog"]),
        ("cat,\nBREAK\n, dog", ["cat,", ", dog"]),
        ("BREAK cat BREAK", ["", "cat"]),
        ("cat BREAK BREAK red dog", ["cat", "", "red dog"]),
        (CATS + "BREAK " + CATS + "dog", [CATS, CATS, "dog"]),
        ("(cat BREAK red:1.5) dog", ["(cat:1.5)", "(red:1.5) dog"]),
    ):
        expected = torch.cat([tokens(conditioner, part) for part in parts], 1)
        assert torch.equal(tokens(conditioner, prompt), expected), prompt
        if kind == "sdxl":
            assert torch.equal(pooled(conditioner, prompt), pooled(conditioner, parts[0]))
    for rule in ("comfyui", "none"):  # a word there
        word = conditioner.with_prompt_weights(rule)
        assert tokens(word, "cat BREAK dog").shape[1] == 77
    assert torch.equal(tokens(word, "cat BREAK dog"), tokens(conditioner, "cat break dog"))


WEIGHTED = "a (cat:1.5), [red dog]"


def states_by_hand(conditioner: ClipText, rule: str) -> Tensor:
    """The states of WEIGHTED by the formulas, in float64, each encoder for itself."""
    plain, empty = (tokens(conditioner, text)[0].double() for text in ("a cat, red dog", ""))
    column = torch.ones(77, 1, dtype=torch.float64)
    # begin, a, cat, comma, red, dog; [ ] is text in ComfyUI
    column[2], column[4:6] = 1.5, 1 / 1.1
    parts = []
    for z, z_0 in zip(*(v.split([16, v.shape[1] - 16], 1) for v in (plain, empty)), strict=True):
        if rule == "lerp":
            parts.append(z_0 + column * (z - z_0))
        elif z.numel():
            factor = z.mean() / (column * z).mean() if rule == "a1111" else 1
            parts.append(factor * column * z)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rule", ["lerp", "a1111", "a1111_no_norm"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_rules_by_hand(kind: str, rule: str, request: pytest.FixtureRequest) -> None:
    conditioner: ClipText = request.getfixturevalue(kind)
    weighing = conditioner.with_prompt_weights(rule)
    result, plain = tokens(weighing, WEIGHTED)[0], tokens(conditioner, "a cat, red dog")[0]
    expected = states_by_hand(conditioner, rule)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    unweighted = torch.tensor([0, 1, 3, *range(6, 77)])
    assert torch.equal(result[unweighted], plain[unweighted]) == (rule != "a1111")
    assert not torch.allclose(result, plain, rtol=1e-2)
    if kind == "sdxl":
        assert torch.equal(pooled(weighing, WEIGHTED), pooled(conditioner, "a cat, red dog"))


def test_the_usual_rule_is_comfyuis_with_another_notation(sdxl: ClipText) -> None:
    assert sdxl.prompt_weights == "lerp" == ClipTextConfig().weighting
    comfyui = sdxl.with_prompt_weights("comfyui")
    prompt = "a (cat:1.5), (red dog)"
    assert torch.equal(tokens(sdxl, prompt), tokens(comfyui, prompt))
    # numbers inside of brackets replace there and multiply here; [ ] is text there
    assert torch.equal(tokens(sdxl, "((cat:1.5):2)"), tokens(comfyui, "(cat:3)"))
    assert torch.equal(tokens(comfyui, "((cat:1.5):2)"), tokens(sdxl, "(cat:1.5)"))
    assert torch.equal(tokens(comfyui, "[cat]"), tokens(sdxl, r"\[cat\]"))


@pytest.mark.parametrize("weight", [0, -1.0, 0.3, 1.1, 1.9, 8.0])
def test_unweighted_words_keep_every_bit_whatever_the_weights(
    sdxl: ClipText, weight: float
) -> None:
    """No factor acts on them, and none can change its sign."""
    result, plain = tokens(sdxl, f"a (cat:{weight}) red"), tokens(sdxl, "a cat red")
    assert torch.equal(result[:, [0, 1, *range(3, 77)]], plain[:, [0, 1, *range(3, 77)]])
    if weight == 0:  # as padding at that place
        assert torch.equal(result[:, 2], tokens(sdxl, "")[:, 2])


def test_a1111s_factor_is_that_programs_and_logged(
    sdxl: ClipText, caplog: pytest.LogCaptureFixture
) -> None:
    """States whose mean is nearly 0, as SDXL's, change their sign: its images are made so."""
    states = torch.tensor([[1.0], [-0.9], [-0.01]])
    chunk = [Token(0, 2.0)]
    weighted = states * torch.tensor([[1.0], [2.0], [1.0]])
    factor = states.mean() / weighted.mean()
    assert factor < 0
    assert torch.equal(weigh(states, chunk, "a1111"), weighted * factor)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "under the rule a1111, as in that program" in caplog.text
    caplog.clear()
    for rule in ("a1111_no_norm", "lerp"):
        weigh(states, chunk, rule, 0 * states)
    weigh(states + 9, chunk, "a1111")
    assert not caplog.records


def test_a_weight_of_one_changes_no_bit_and_brackets_can_be_text(sd: ClipText) -> None:
    plain = tokens(sd, "a cat, red dog")
    for prompt in (
        "(a cat, red dog:1)",
        "a (cat:1.0), red dog",
        "a ([cat]), red dog",
        "a cat(), red dog",
    ):
        assert torch.equal(tokens(sd, prompt), plain)
    off = sd.with_prompt_weights("none")
    assert torch.equal(tokens(off, "a (cat:1.5)"), tokens(sd, r"a \(cat:1.5\)"))
    assert not torch.equal(tokens(off, "a (cat:1.5)"), tokens(sd, "a (cat:1.5)"))


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights \[-2.0\] leave a prompt no mean"):
        weigh(torch.ones(3, 2), [Token(0, -2.0)], "a1111")  # 1 - 2 + 1


def test_plain_prompts_are_the_same_under_every_rule(sdxl: ClipText) -> None:
    for prompt in ("a cat, red dog", CATS + DOGS, "a cat: red, 3 o'clock", ""):
        plain = sdxl([prompt], PICTURE)
        for rule in PROMPT_WEIGHTS:
            result = sdxl.with_prompt_weights(rule)([prompt], PICTURE)
            assert all(map(torch.equal, result.tensors, plain.tensors))


def test_captions_of_training_images_are_text(sd: ClipText) -> None:
    texts = ["miku (vocaloid)", "at (12:30)", "a [b|c] BREAK"]
    captions, plain = Captions(sd, texts), sd.with_prompt_weights("none")
    for index, text in enumerate(texts):
        result = captions.from_labels(torch.tensor([index])).tokens
        assert result is not None and torch.equal(result, tokens(plain, text))


def test_files_hold_the_rule_and_older_ones_are_read() -> None:
    for rule in PROMPT_WEIGHTS:
        config = ClipTextConfig(weighting=rule)
        assert ClipTextConfig.from_dict(config.to_dict()) == config
    stored = [ClipTextConfig(weighting=rule).to_dict()["weighting"] for rule in ("lerp", "none")]
    assert stored == [True, False], "as before, so that a model keeps its hash"


def test_half_precision_gives_float32_near_by(sdxl: ClipText) -> None:
    assert sdxl.encoder is not None and sdxl.encoder_2 is not None
    encoders = [
        replace(e, model=clip_encoders.encoder(e.projected, int(e.projected)).to(torch.bfloat16))
        for e in (sdxl.encoder, sdxl.encoder_2)
    ]
    result = ClipText(encoders[0], encoders[1], sdxl.config)(
        ["a (cat:1.5)", CATS + "red", None], PICTURE
    )
    exact = sdxl(["a (cat:1.5)", CATS + "red", None], PICTURE)
    assert [t.dtype for t in result.tensors] == [torch.float32, torch.bool, torch.float32]
    for actual, reference in zip(result.tensors, exact.tensors, strict=True):
        assert float((actual.float() - reference.float()).abs().max()) <= 0.1 * float(
            reference.float().abs().max()
        )
