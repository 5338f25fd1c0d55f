from dataclasses import replace

import pytest

from lit_isdpo.data.encoding import load_tokenizer, pad_token_id, terminator_ids
from lit_isdpo.data.outcomes import Reason, RowError
from lit_isdpo.data.tokenization import (
    Limits,
    TextEncoder,
    tokenize_example,
    tokenize_pair,
    tokenize_response,
    transcript,
)
from lit_isdpo.types import InputError, Message, PreferenceExample, SFTExample

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (  # Llama-2's: BOS and EOS are text of the template, contents are trimmed
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # the generation prompt opens a thought that the rendered turn does not have
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_TERMINATOR = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML

QUESTION = [Message(role="user", content="2 + 2?")]
LENGTHS = Limits(100, 60)


def shown(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, False), (False, True)])
def test_strings_get_the_bos_the_tokenizer_wants_and_one_eos(make_tokenizer, bos, eos):
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    pair = tokenize_pair(PreferenceExample("2 + 2 =", " 4", " 5<eos>"), TextEncoder(tokenizer), LENGTHS)
    assert shown(pair.prompt_ids, tokenizer) == "<bos>" * bos + "2 + 2 ="
    assert shown(pair.chosen_ids, tokenizer) == " 4<eos>"
    assert shown(pair.rejected_ids, tokenizer) == " 5<eos>"


def test_a_bos_in_the_text_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer()
    example = tokenize_example(SFTExample("<bos>a", "b"), TextEncoder(tokenizer), LENGTHS)
    assert shown(example.prompt_ids, tokenizer) == "<bos>a"


def test_an_empty_prompt_needs_a_bos(make_tokenizer):
    example = SFTExample("", "b")
    assert tokenize_example(example, TextEncoder(make_tokenizer(eos=True)), LENGTHS).prompt_ids == [1]
    with pytest.raises(RowError) as error:
        tokenize_example(example, TextEncoder(make_tokenizer(bos=False)), LENGTHS)
    assert error.value.reason is Reason.EMPTY_PROMPT


@pytest.mark.parametrize(
    ("template", "eos_token", "prompt", "completion"),
    [
        (CHATML, "<eos>", "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", " 4 <|im_end|>"),
        (CHATML, "<|im_end|>", "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", " 4 <|im_end|>"),
        (TRIMMING, "<eos>", "<bos>[INST] 2 + 2? [/INST]", " 4 <eos>"),
        (NO_TERMINATOR, "<eos>", "user: 2 + 2?\nassistant: ", " 4<eos>"),
    ],
)
def test_a_chat_template_gives_one_bos_and_one_terminator(make_tokenizer, template, eos_token, prompt, completion):
    tokenizer = make_tokenizer(template=template, eos_token=eos_token)
    example = tokenize_example(SFTExample(QUESTION, " 4 "), TextEncoder(tokenizer), LENGTHS)
    assert shown(example.prompt_ids, tokenizer) == prompt == TextEncoder(tokenizer).render(QUESTION)
    assert shown(example.completion_ids, tokenizer) == completion
    assert example.completion_ids[-1] in terminator_ids(tokenizer)


def test_a_terminator_in_the_text_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(template=CHATML)
    example = tokenize_example(SFTExample(QUESTION, "4<|im_end|>"), TextEncoder(tokenizer), LENGTHS)
    assert shown(example.completion_ids, tokenizer) == "4<|im_end|>"
    assert terminator_ids(tokenizer) == [2, 4]
    assert terminator_ids(make_tokenizer()) == [2]


def test_a_prompt_that_is_no_prefix_is_an_error_that_shows_both(make_tokenizer):
    tokenizer = make_tokenizer(template=THINKING)
    with pytest.raises(RowError, match=r"goes on with '<think>\\n', and both together with '4<\|im_end"):
        tokenize_example(SFTExample(QUESTION, "4"), TextEncoder(tokenizer), LENGTHS)
    assert tokenize_example(SFTExample(QUESTION, "4"), TextEncoder(tokenizer, "never"), LENGTHS)


def test_a_row_that_the_template_refuses_is_left_out(make_tokenizer):
    messages = [Message(role="system", content="Be brief."), *QUESTION]
    with pytest.raises(RowError) as error:
        tokenize_example(SFTExample(messages, "4"), TextEncoder(make_tokenizer(template=NO_SYSTEM)), LENGTHS)
    assert error.value.reason is Reason.TEMPLATE


@pytest.mark.parametrize("prompt", ["2 + 2?", QUESTION])
def test_chat_template_modes(make_tokenizer, prompt):
    tokenizer = make_tokenizer(template=CHATML)
    templated, plain = TextEncoder(tokenizer).render(QUESTION), "\n\nHuman: 2 + 2?\n\nAssistant:"
    assert TextEncoder(tokenizer, "always").render(prompt) == templated
    assert TextEncoder(tokenizer, "auto").render(prompt) == ("2 + 2?" if prompt == "2 + 2?" else templated)
    assert TextEncoder(tokenizer, "never").render(prompt) == ("2 + 2?" if prompt == "2 + 2?" else plain)
    with pytest.raises(InputError, match="has no chat template"):
        TextEncoder(make_tokenizer(), "always").render(prompt)


def test_a_tokenizer_of_several_templates_without_a_default(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(InputError, match=r"has the chat templates rag, tool_use, and none is the default; copy "):
        TextEncoder(tokenizer).render(QUESTION)
    assert TextEncoder(tokenizer, "never").render(QUESTION) == "\n\nHuman: 2 + 2?\n\nAssistant:"
    assert TextEncoder(tokenizer).render("2 + 2?") == "2 + 2?"
    tokenizer.chat_template["default"] = CHATML
    assert TextEncoder(tokenizer).render(QUESTION) == TextEncoder(make_tokenizer(template=CHATML)).render(QUESTION)


def test_without_a_template_a_transcript_is_the_text_that_it_was_read_from(make_tokenizer):
    tokenizer = make_tokenizer()
    example = tokenize_example(SFTExample(QUESTION, "4"), TextEncoder(tokenizer), LENGTHS)
    assert shown(example.prompt_ids + example.completion_ids, tokenizer) == (
        "<bos>\n\nHuman: 2 + 2?\n\nAssistant: 4<eos>"
    )
    system = Message(role="system", content="Be brief.")
    answered = [system, *QUESTION, Message(role="assistant", content="4"), *QUESTION]
    assert transcript(answered) == ("Be brief.\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: 2 + 2?\n\nAssistant:")


def test_a_long_prompt_keeps_its_bos_and_its_end_or_its_start(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = PreferenceExample("abcdefgh", "xy", "z")
    lengths = Limits(8, 4)
    assert shown(tokenize_pair(pair, TextEncoder(tokenizer), lengths).prompt_ids, tokenizer) == "<bos>fgh"
    kept = tokenize_pair(pair, TextEncoder(tokenizer), replace(lengths, truncation_mode="keep_start")).prompt_ids
    assert shown(kept, tokenizer) == "<bos>abc"
    without = make_tokenizer(bos=False)
    assert shown(tokenize_pair(pair, TextEncoder(without), lengths).prompt_ids, without) == "efgh"


def test_a_cut_response_has_no_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = tokenize_pair(PreferenceExample("abc", "uvwxyz", "uv"), TextEncoder(tokenizer), Limits(8, 4))
    assert [shown(ids, tokenizer) for ids in pair[1:3]] == ["uvwx", "uv<eos>"]


def test_what_truncation_can_spoil_is_left_out(make_tokenizer):
    tokenizer, lengths = make_tokenizer(), Limits(6, 4)
    with pytest.raises(RowError) as error:
        tokenize_pair(PreferenceExample("abc", "uvw", "uvx"), TextEncoder(tokenizer), lengths)
    assert error.value.reason is Reason.IDENTICAL_TOKENS
    for pair in (PreferenceExample("abc", "u", "vw", -1.0, -2.0), PreferenceExample("abcd", "u", "v", -1.0, -2.0)):
        with pytest.raises(RowError) as error:
            tokenize_pair(pair, TextEncoder(tokenizer), lengths)
        assert error.value.reason is Reason.CUT_BEHAVIOR
    assert tokenize_pair(PreferenceExample("abc", "u", "v", -1.0, -2.0), TextEncoder(tokenizer), lengths)[3:5] == (
        -1.0,
        -2.0,
    )


def test_a_pairs_numbers_are_handed_on(make_tokenizer):
    pair = tokenize_pair(PreferenceExample("a", "b", "c", -1.0, -2.0, 0.5, 3.0), TextEncoder(make_tokenizer()), LENGTHS)
    assert pair[3:7] == (-1.0, -2.0, 0.5, 3.0)


@pytest.mark.parametrize(
    ("prompt", "response"), [("a", ""), ("a", " \n"), ("a", "<eos>"), (QUESTION, ""), (QUESTION, " ")]
)
def test_a_response_without_text_is_empty(make_tokenizer, prompt, response):
    for tokenizer in (make_tokenizer(), make_tokenizer(template=CHATML)):
        with pytest.raises(RowError) as error:
            tokenize_pair(PreferenceExample(prompt, "b", response), TextEncoder(tokenizer), LENGTHS)
        assert error.value.reason is Reason.EMPTY_RESPONSE


def test_a_pair_needs_two_responses(make_tokenizer):
    with pytest.raises(RowError) as error:
        tokenize_pair(PreferenceExample("a", "b", "b"), TextEncoder(make_tokenizer()), LENGTHS)
    assert error.value.reason is Reason.IDENTICAL


@pytest.mark.parametrize(("begun", "text"), [(False, "b<eos>"), (True, "  b<eos>")])
def test_a_sampled_response_gets_the_transcripts_blank_once(make_tokenizer, begun, text):
    """A policy writes it itself, but not where an answer has begun: there a blank is its own."""
    tokenizer = make_tokenizer()
    prompt = [*QUESTION, Message(role="assistant", content="a", prefix=True)] if begun else QUESTION
    example = tokenize_response(prompt, "  b" if begun else " b", TextEncoder(tokenizer), LENGTHS, finished=True)
    assert shown(example.completion_ids, tokenizer) == (text if begun else f" {text}")


def test_a_token_that_the_model_has_no_row_for_leaves_the_row_out(make_tokenizer):
    tokenizer = make_tokenizer()
    encoder = TextEncoder(tokenizer, first_without_row=max(tokenizer("abc")["input_ids"]))
    assert tokenize_example(SFTExample("a", "b"), encoder, LENGTHS)
    for prompt, completion in (("c", "b"), ("a", "c")):
        with pytest.raises(RowError) as error:
            tokenize_example(SFTExample(prompt, completion), encoder, LENGTHS)
        assert error.value.reason is Reason.NO_ROW


def test_loading(make_tokenizer, tokenizer_path, tmp_path):
    assert load_tokenizer(tokenizer_path).eos_token == "<eos>"
    assert pad_token_id(make_tokenizer()) == 0
    assert pad_token_id(make_tokenizer(pad=False)) == 2
    with pytest.raises(InputError, match=r"no tokenizer can be loaded from '.*nowhere'"):
        load_tokenizer(str(tmp_path / "nowhere"))
    make_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no EOS token"):
        load_tokenizer(str(tmp_path))
