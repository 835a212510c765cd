"""Joint decoding: CTC prefix probabilities against sums over all alignments, and what `generate()` makes of them."""

import functools
import itertools
import math

import pytest
import torch
from transformers import GenerationConfig

from echo_hf import EchoConfig, EchoForConditionalGeneration
from echo_hf.generation_echo import IMPOSSIBLE, EchoCTCPrefixLogitsProcessor, find_cut_off, log_cumulative_products

BLANK, BOS, EOS = 0, 1, 2
VOCAB, FRAMES = 5, 5  # the blank, begin, end, and two letters: 3, 4


def random_logits(rows=1, frames=FRAMES, seed=0):
    return torch.randn(rows, frames, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def processor(logits, mask=None, weight=1.0, num_hypotheses=1):
    mask = torch.ones(logits.shape[:2], dtype=torch.long) if mask is None else mask
    return EchoCTCPrefixLogitsProcessor(logits, mask, BLANK, BOS, torch.tensor([EOS]), weight, num_hypotheses)


def collapse(path):
    return tuple(token for token, _ in itertools.groupby(path) if token != BLANK)


def transcripts(logits):
    """Probability of each transcript, by going through every path."""
    log_probs, found = logits.double().log_softmax(-1), {}
    for path in itertools.product(range(VOCAB), repeat=len(log_probs)):
        text = collapse(path)
        found[text] = found.get(text, 0.0) + math.exp(sum(log_probs[t, token].item() for t, token in enumerate(path)))
    return found


def test_texts_without_an_end_are_cut_off():
    ids = torch.tensor([[BOS, 3, EOS, BLANK], [BOS, 3, 4, 3], [BOS, 4, 4, BLANK]])
    for ends, expected in ((EOS, [False, True, True]), ([EOS, 3], [False, False, True]), (None, [False] * 3)):
        assert find_cut_off(ids, GenerationConfig(eos_token_id=ends)).tolist() == expected


@pytest.mark.parametrize("prefix", [(), (3,), (4, 4), (3, 4, 3), (3, 3, 3)])
def test_scores_are_prefix_probabilities_summed_over_all_paths(prefix):
    logits = random_logits()
    found = transcripts(logits[0])
    scores = processor(logits)(torch.tensor([[BOS, *prefix]]), torch.zeros(1, VOCAB))[0]

    def beginning(text):
        return sum(value for other, value in found.items() if other[: len(text)] == text)

    for token in (3, 4):
        expected = beginning((*prefix, token)) / beginning(prefix)
        assert math.exp(scores[token].item()) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert math.exp(scores[EOS].item()) == pytest.approx(found.get(prefix, 0.0) / beginning(prefix), rel=1e-5)
    assert scores[BLANK] == scores[BOS] == -torch.inf


def test_padding_is_blank_and_the_logits_stay_as_they_are():
    logits, mask = random_logits(rows=2), torch.tensor([[1] * FRAMES, [1, 1] + [0] * (FRAMES - 2)])
    before = logits.clone()
    probs = processor(logits, mask).probs
    assert torch.equal(logits, before)
    assert torch.allclose(probs[mask > 0], before[mask > 0].softmax(-1))
    assert (probs[mask == 0] == torch.eye(VOCAB)[BLANK]).all()


def test_scores_of_a_transcript_sum_up_to_its_ctc_likelihood():
    logits, text = random_logits(frames=40), [3, 3, 4, 3, 4, 4]
    joint, total = processor(logits), 0.0
    for i in range(len(text) + 1):
        scores = joint(torch.tensor([[BOS, *text[:i]]]), torch.zeros(1, VOCAB))[0].double()
        total += scores[text[i] if i < len(text) else EOS].item()
    expected = -torch.nn.functional.ctc_loss(
        logits.double().log_softmax(-1).transpose(0, 1), torch.tensor([text]), [40], [len(text)], reduction="sum"
    )
    assert total == pytest.approx(expected.item(), abs=1e-5)


def test_recurrence_without_a_loop_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    factors = -20 * torch.rand(2, 300, generator=generator, dtype=torch.float64)
    inputs = -50 * torch.rand(2, 300, generator=generator, dtype=torch.float64)
    inputs[:, :7] = IMPOSSIBLE
    value, expected = torch.full((2,), IMPOSSIBLE, dtype=torch.float64), []
    for t in range(300):
        value = factors[:, t] + torch.logaddexp(value, inputs[:, t])
        expected.append(value)
    result, expected = log_cumulative_products(factors, inputs), torch.stack(expected, 1)
    torch.testing.assert_close(result[:, 7:], expected[:, 7:])
    assert (result[:, :7] < IMPOSSIBLE / 2).all()


def test_padding_does_not_change_scores():
    logits = random_logits(frames=20)
    padded = torch.cat((logits, random_logits(frames=9, seed=1)), dim=1)
    mask = torch.tensor([[1] * 20 + [0] * 9])
    prefix = torch.tensor([[BOS, 3, 4]])
    alone, among = (joint(prefix, torch.zeros(1, VOCAB)) for joint in (processor(logits), processor(padded, mask)))
    torch.testing.assert_close(alone, among)


def test_reordered_beams_and_jumps_have_the_scores_of_their_own_texts():
    logits = random_logits(frames=20).expand(3, -1, -1)
    joint = processor(logits, num_hypotheses=3)
    zeros = torch.zeros(3, VOCAB)
    joint(torch.tensor([[BOS]] * 3), zeros)
    joint(torch.tensor([[BOS, 3], [BOS, 4], [BOS, 3]]), zeros)
    for texts in ([[BOS, 4, 3], [BOS, 4, 4], [BOS, 3, 4]], [[BOS, 4, 3, 3, 4], [BOS, 3, 3, 3, 3], [BOS, 4, 4, 3, 4]]):
        scores = joint(torch.tensor(texts), zeros)
        for row, text in enumerate(texts):
            fresh = processor(logits[:1])(torch.tensor([text]), zeros[:1])[0]
            torch.testing.assert_close(scores[row], fresh)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_finished_rows_score_padding_alone(weight):
    joint, decoder = (
        processor(random_logits().expand(2, -1, -1), weight=weight, num_hypotheses=2),
        torch.zeros(2, VOCAB),
    )
    joint(torch.tensor([[BOS]] * 2), decoder)
    for texts in ([[BOS, 3], [BOS, EOS]], [[BOS, 3, 4], [BOS, EOS, BLANK]]):
        scores = joint(torch.tensor(texts), decoder)
        assert scores[0, BLANK] == -torch.inf and scores[0, 3:].isfinite().all()
        assert scores[1, BLANK] == 0.0 and (scores[1, BLANK + 1 :] == -torch.inf).all()


def test_an_end_in_the_prompt_finishes_nothing():
    prompt, decoder = torch.tensor([[BOS, EOS, BLANK, 3]]), torch.zeros(1, VOCAB)
    expected = processor(random_logits())(torch.tensor([[BOS, 3]]), decoder)
    assert torch.equal(processor(random_logits())(prompt, decoder), expected)


def test_weight_mixes_decoder_and_ctc():
    logits, prefix = random_logits(), torch.tensor([[BOS, 3]])
    decoder = torch.randn(1, VOCAB)
    heard = processor(logits)(prefix, decoder)
    mixed = processor(logits, weight=0.3)(prefix, decoder)
    torch.testing.assert_close(mixed[:, 2:], 0.3 * heard[:, 2:] + 0.7 * decoder.log_softmax(-1)[:, 2:])


def test_a_begin_that_is_the_end_too_is_scored_as_the_end():
    logits, mask, ends = random_logits(), torch.ones(1, FRAMES, dtype=torch.long), torch.tensor([EOS])
    prefix, zeros = torch.tensor([[EOS, 3]]), torch.zeros(1, VOCAB)
    same = EchoCTCPrefixLogitsProcessor(logits, mask, BLANK, EOS, ends, 1.0)(prefix, zeros)
    torch.testing.assert_close(same[:, EOS:], processor(logits)(prefix, zeros)[:, EOS:])


@pytest.mark.parametrize("weight", [-0.1, 0.0, 1.5])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match="ctc_weight"):
        processor(random_logits(), weight=weight)


# In generate() -------------------------------------------------------------------------------------------------------


def tiny_model(**overrides):
    torch.manual_seed(0)
    settings = {"size": "2m", "encoder_num_hidden_layers": 1, "vocab_size": 12, "max_target_positions": 30}
    model = EchoForConditionalGeneration(EchoConfig.from_preset("all", **{**settings, **overrides})).eval()
    if model.ctc_head is not None:
        torch.nn.init.normal_(model.ctc_head.weight, std=0.5)
    return model


def features(lengths=(200, 120)):
    values = torch.rand(len(lengths), max(lengths), 81, generator=torch.Generator().manual_seed(0))
    values[..., -1] *= 200
    mask = torch.zeros(values.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length], values[row, length:] = 1, 0.0
    return {"input_features": values, "attention_mask": mask}


def test_ctc_alone_finds_the_most_likely_of_all_transcripts():
    model = tiny_model(vocab_size=VOCAB)
    inputs = features((20,))  # 5 encoder frames
    with torch.no_grad():
        logits = model.ctc_head(model.model.encoder(**inputs).last_hidden_state)[0]
    logits[:, BOS] = -1e4  # is not written, so not searched for
    logits[:, EOS] = -1e4
    found = transcripts(logits)
    with torch.no_grad():
        model.ctc_head.bias[[BOS, EOS]] = -1e4
    text = model.generate(**inputs, ctc_weight=1.0, num_beams=32, length_penalty=0.0, max_length=8)[0, 1:].tolist()
    best = max(found, key=found.get)
    assert tuple(token for token in text if token > EOS) == best


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_one_alone_is_decoded_as_among_others(settings):
    model, inputs = tiny_model(), features()
    together = model.generate(**inputs, ctc_weight=0.5, **settings)
    count = settings.get("num_return_sequences", 1)
    for row, length in enumerate((200, 120)):
        alone = model.generate(
            input_features=inputs["input_features"][row : row + 1, :length],
            attention_mask=inputs["attention_mask"][row : row + 1, :length],
            ctc_weight=0.5,
            **settings,
        )
        expected = together[row * count : (row + 1) * count, : alone.shape[1]]
        assert torch.equal(alone, expected)


def test_the_weight_is_a_generation_setting_that_is_saved(tmp_path):
    model, inputs = tiny_model(), features()
    model.generation_config.ctc_weight = 0.0
    plain = model.generate(**inputs)
    joint = model.generate(**inputs, ctc_weight=0.9)
    assert plain.shape != joint.shape or not torch.equal(plain, joint)
    model.generation_config.ctc_weight = 0.9
    model.save_pretrained(tmp_path)
    loaded = EchoForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.ctc_weight == 0.9
    assert torch.equal(loaded.generate(**inputs), joint)


def test_settings_of_another_making_do():
    model, inputs = tiny_model(), features((80,))
    expected = model.generate(**inputs, ctc_weight=0.3, max_length=9)
    model.generation_config = GenerationConfig(max_length=9, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=BLANK)
    assert torch.equal(model.generate(**inputs, ctc_weight=0.3, decoder_start_token_id=BOS), expected)
    settings = GenerationConfig(ctc_weight=0.3, max_length=9, decoder_start_token_id=BOS)
    assert torch.equal(model.generate(**inputs, generation_config=settings), expected)


def test_assisted_and_sampled_generation_take_it_too():
    model, inputs = tiny_model(), features((200,))
    greedy = model.generate(**inputs, ctc_weight=0.7)
    assert torch.equal(model.generate(**inputs, ctc_weight=0.7, assistant_model=tiny_model()), greedy)
    without_head = tiny_model(ctc_loss_weight=0.0)
    assert torch.equal(model.generate(**inputs, ctc_weight=0.7, assistant_model=without_head), greedy)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, ctc_weight=0.7, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 3 and not (sampled[:, 1:] == BOS).any()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}])
def test_scores_of_a_batch_are_finite(settings):
    model, inputs = tiny_model(), features()
    with torch.no_grad():  # what is silent ends at once
        model.ctc_head.bias[BLANK] = 3.0
    inputs["input_features"][1] = 0.0
    options = {"ctc_weight": 0.5, "return_dict_in_generate": True, "output_scores": True, **settings}
    output = model.generate(**inputs, **options)
    assert (output.sequences[:, -1] == BLANK).any()  # one has ended before another
    scores = model.compute_transition_scores(output.sequences, output.scores)
    assert scores.isfinite().all() and not scores[output.sequences[:, 1:] == BLANK].any()


def endless_model(number=6):
    """The CTC head hears 3 and 4 in turn, `number` tokens in all in its 50 frames, unsurely; the decoder always expects
    the other of the two, and hardly ever an end."""
    model = tiny_model()
    ctc_logits = torch.zeros(50, 12)
    ctc_logits[:, BLANK] = 5.0
    for i in range(number):
        ctc_logits[2 + 4 * i, [BLANK, 3 + i % 2]] = torch.tensor([0.0, 5.0])
    model.ctc_head.forward = lambda hidden_states: ctc_logits[: hidden_states.shape[1]].expand(
        len(hidden_states), -1, -1
    )
    next_logits = torch.zeros(12, 12)
    next_logits[:, 3:5] = -3.0
    next_logits[[BOS, 4], 3] = next_logits[3, 4] = 8.0
    next_logits[:, EOS] = -0.5
    forward = model.forward

    @functools.wraps(forward)  # generate() reads the signature
    def expect_more(decoder_input_ids, **kwargs):
        output = forward(decoder_input_ids=decoder_input_ids, **kwargs)
        output.logits = next_logits[decoder_input_ids]
        return output

    model.forward = expect_more
    return model


def test_a_decoder_that_lost_its_place_writes_no_more_than_was_heard(monkeypatch):
    model, inputs = endless_model(), features((200,))
    expected = [BOS, 3, 4, 3, 4, 3, 4, EOS]
    assert model.generate(**inputs, ctc_weight=0.4)[0].tolist() == expected
    monkeypatch.setattr("echo_hf.generation_echo.END_MARGIN", math.inf)
    longer = model.generate(**inputs, ctc_weight=0.4)[0].tolist()
    assert longer[:7] == expected[:7] and len(longer) > 10


def test_going_back_changes_no_other_row_and_keeps_scores_in_step():
    model, inputs = endless_model(), features((200, 48))  # of 50 and 12 frames, in which 3 tokens are heard
    options = {"ctc_weight": 0.4, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(**inputs, **options)
    assert output.sequences.tolist() == [[BOS, 3, 4, 3, 4, 3, 4, EOS], [BOS, 3, 4, 3, EOS, BLANK, BLANK, BLANK]]
    assert len(output.scores) == 7
    scores = model.compute_transition_scores(output.sequences, output.scores)
    assert scores.isfinite().all() and (scores[1, :4] < 0).all() and not scores[1, 4:].any()


def test_who_asks_for_a_least_length_gets_it():
    text = endless_model().generate(**features((200,)), ctc_weight=0.4, min_length=12)
    assert text.shape[1] >= 12 and EOS not in text[0, :12]


def test_assisted_generation_goes_back_too():
    model, inputs = endless_model(), features((200,))
    expected = model.generate(**inputs, ctc_weight=0.4)
    assert torch.equal(model.generate(**inputs, ctc_weight=0.4, assistant_model=endless_model()), expected)


def one_token_at_a_time(model, **inputs):
    """What `generate()` gives where it verifies no drafts."""
    return model.generate(**inputs, return_dict_in_generate=True).sequences


@pytest.mark.parametrize("seed", range(4))
def test_drafts_change_no_token(seed):
    model, inputs = tiny_model(), features((200, 120, 40))  # no more than DRAFT_ROWS
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # heads that are sure of themselves, and seldom of one opinion; few blanks
        model.ctc_head.weight.copy_(torch.randn(model.ctc_head.weight.shape, generator=generator))
        model.proj_out.weight.copy_(torch.randn(model.proj_out.weight.shape, generator=generator) * 0.2)
    for weight in (0.2, 0.6, 1.0):
        expected = one_token_at_a_time(model, **inputs, ctc_weight=weight)
        assert torch.equal(model.generate(**inputs, ctc_weight=weight), expected)


def test_a_good_draft_takes_one_pass(monkeypatch):
    model, inputs = endless_model(), features((200, 48))
    expected, passes, forward = one_token_at_a_time(model, **inputs, ctc_weight=1.0), [], model.forward

    @functools.wraps(forward)
    def count(**kwargs):
        passes.append(kwargs["decoder_input_ids"].shape)
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", count)
    assert torch.equal(model.generate(**inputs, ctc_weight=1.0), expected)
    assert len(passes) == 1 and expected.shape == (2, 8)


@pytest.mark.parametrize("settings", [{}, {"attention_mask": None}, {"max_length": 5}, {"max_new_tokens": 1}])
def test_where_two_tokens_are_too_close_all_is_done_again(settings, monkeypatch):
    model, inputs = tiny_model(), {**features(), "ctc_weight": 0.5, **settings}
    expected = one_token_at_a_time(model, **inputs)
    assert torch.equal(model.generate(**inputs), expected)
    monkeypatch.setattr("echo_hf.generation_echo.TOO_CLOSE", math.inf)
    assert torch.equal(model.generate(**inputs), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"ctc_weight": 0.0},
        {"num_beams": 2},
        {"do_sample": True},
        {"return_dict_in_generate": True},
        {"repetition_penalty": 1.1},
        {"min_length": 3},
        {"max_time": 60.0},
        {"eos_token_id": None},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"streamer": True},
        {"logits_processor": True},
        {"decoder_input_ids": torch.tensor([[BOS, 3]]), "decoder_attention_mask": torch.ones(1, 2)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_where_others_have_a_say_no_draft_is_verified(settings, monkeypatch):
    class Streamer:
        put = end = lambda *_: None

    def refuse(*_):
        raise AssertionError("a draft was verified")

    if "streamer" in settings:
        settings = {"streamer": Streamer()}
    if "logits_processor" in settings:
        settings = {"logits_processor": [lambda input_ids, scores: scores]}
    model = tiny_model()
    monkeypatch.setattr(model, "_verify_drafts", refuse)
    assert model.generate(**{**features((40,)), "max_length": 6, "ctc_weight": 0.5, **settings}).__len__() >= 1
    with pytest.raises(AssertionError, match="a draft"):
        model.generate(**features((40,)), max_length=6, ctc_weight=0.5)


def test_without_an_end_it_goes_on():
    model = tiny_model()
    text = model.generate(**features((40,)), eos_token_id=None, max_length=20)
    assert text.shape == (1, 20) and not (text[:, 1:] <= BOS).any()


def test_a_begin_that_is_the_end_too_ends_the_text():
    model = tiny_model(bos_token_id=EOS, eos_token_id=EOS, decoder_start_token_id=EOS)
    with torch.no_grad():  # CTC hears nothing
        model.ctc_head.weight.zero_()
        model.ctc_head.bias[BLANK] = 20.0
    assert model.generate(**features((40,)), ctc_weight=0.9, max_length=20).tolist() == [[EOS, EOS]]


def test_a_checkpoint_without_its_ctc_head_generates(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = EchoForConditionalGeneration.from_pretrained(tmp_path, ctc_loss_weight=0.0)
    assert model.generate(**features((40,)), max_length=4).shape[0] == 1


def test_a_model_without_ctc_head_says_so():
    model = tiny_model(ctc_loss_weight=0.0)
    assert model.generation_config.ctc_weight == 0.0
    model.generate(**features((40,)), max_length=4)
    with pytest.raises(ValueError, match="no CTC head"):
        model.generate(**features((40,)), ctc_weight=0.5)
