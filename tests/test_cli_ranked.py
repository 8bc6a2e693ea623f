"""`jaxkv generate --beams`, `--best-of` and `--layout`, with an untrained model of one layer."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

import jaxkv
from jaxkv.cli import main
from jaxkv.cli.prompts import Prompt
from jaxkv.cli.sharing import describe_prefill
from jaxkv.models import ByteTokenizer, Decoder, DecoderConfig, GenerationConfig, Model, tiny

ROOT = Path(__file__).parent.parent
PROMPT = "A list of what is read once"
TOKENS = list(PROMPT.encode())


@functools.cache
def untrained():
    config = DecoderConfig(vocab_size=128, width=16, num_layers=1, num_heads=2)
    return Model.of(
        Decoder(config, rngs=nnx.Rngs(0)), generation=GenerationConfig(stop_tokens=(0,)), make_tokenizer=ByteTokenizer
    )


@pytest.fixture
def model(monkeypatch):
    """The model in place of the shipped one, laid out as the command does it: so the programs are the same."""
    monkeypatch.setattr(tiny, "load", untrained)
    monkeypatch.setenv("JAXKV_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    forward, params = jaxkv.nnx.functional(jaxkv.nnx.fuse(untrained().module))
    return dataclasses.replace(untrained(), forward=forward, params=params)


def said(capsys, *words: str) -> tuple[list[dict], str]:
    """Returns the objects on standard output, and standard error."""
    assert main(["generate", PROMPT, "-n", "6", "--json", *words]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def texts_of(found, i=0):
    return [[token for token in row.tolist() if token > 0] for row in found.tokens[i]]


def test_beams_find_what_beam_search_finds_and_say_what_was_shared(model, capsys):
    found, err = said(capsys, "--beams", "3", "--samples", "2")
    assert "prefilled 27 tokens once for 3 texts, not 3 times; 1 page of 16 shared by all; wrote 12 in" in err
    assert "beam search: 3 beams\n" in err
    num_pages = int(re.search(r"for 3 texts of up to 1,024 tokens, in (\d+) pages of 16\n", err).group(1))
    cache = jaxkv.Cache.init(model.specs, 3, 1024, layout=jaxkv.Pages(num_pages))
    options = dict(num_beams=3, num_return=2, max_new_tokens=6, stop_tokens=0)
    wanted = jaxkv.beam_search(model.forward, model.params, [TOKENS], cache, **options)
    assert [one["tokens"] for one in found] == texts_of(wanted)
    assert [one["score"] for one in found] == pytest.approx(wanted.scores[0], abs=1e-4)
    assert [one["sample"] for one in found] == [1, 2]
    assert main(["generate", PROMPT, "-n", "6", "--beams", "3", "-q"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{PROMPT}{found[0]['text']}\n", "")


def test_the_best_of_several_is_drawn_even_from_a_greedy_checkpoint(model, capsys, tmp_path):
    words = ["--best-of", "3", "--layout", "rows"]
    found, err = said(capsys, *words, "--samples", "3")
    cache = jaxkv.Cache.init(model.specs, 3, 1024)
    key = jax.random.fold_in(jax.random.key(0), 0)
    sampler = jaxkv.sampling.sampler(temperature=1, stop_tokens=[0])
    options = dict(n=3, max_new_tokens=6, sampler=sampler, stop_tokens=0, key=key)
    wanted = jaxkv.best_of(model.forward, model.params, [TOKENS], cache, **options)
    assert [one["tokens"] for one in found] == texts_of(wanted)
    assert len({tuple(one["tokens"]) for one in found}) == 3
    assert re.search(r"prefilled 27 tokens once for 3 texts, not 3 times; wrote \d+ in", err)
    assert "sampling: temperature 1 (as asked); the best of 3\n" in err
    file = tmp_path / "prompts.txt"
    file.write_text("A list\nAnother\n")
    assert main(["generate", "--prompts", str(file), "-n", "4", "--rows", "3", *words]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"--- line 1\nA list.*\n--- line 2\nAnother", out, re.DOTALL)
    assert "prefilled 13 tokens once" in err


def test_a_text_that_is_not_there_has_no_score(model, capsys, monkeypatch):
    generation = GenerationConfig(suppress_tokens=tuple(range(2, 128)))
    monkeypatch.setattr(tiny, "load", lambda: dataclasses.replace(untrained(), generation=generation))
    assert main(["generate", PROMPT, "-n", "1", "--json", "--beams", "3", "--samples", "3"]) == 0
    out, err = capsys.readouterr()
    *there, none = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert sorted(one["tokens"] for one in there) == [[0], [1]]
    assert (none["reason"], none["score"], none["text"]) == ("none", None, "")
    assert "wrote 2 in" in err and "as many different texts as there are" in err


def test_samples_in_pages_are_those_in_rows(model, capsys):
    in_rows, _ = said(capsys, "--samples", "40", "--temperature", "1")
    in_pages, err = said(capsys, "--samples", "40", "--temperature", "1", "--layout", "pages")
    assert in_rows == in_pages
    assert "prefilled 27 tokens once for 40 texts, not 40 times; 1 page of 16 shared by all, wrote " in err
    assert "for 40 texts of up to 1,024 tokens, in 81 pages of 16\n" in err  # 27 tokens and 6: 3 pages each


def test_a_prompt_is_prefilled_again_for_the_samples_of_the_next_batch():
    prompt = Prompt(PROMPT, TOKENS, 6, False)
    told = describe_prefill([[(prompt, 2)], [(prompt, 1)]], jaxkv.Pages(64))
    once = "once for all texts of a prompt that are decoded together"
    assert told == f"prefilled 54 tokens, not 81: {once}; 1 page of 16 shared by all"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beams", "0"], "'0' is not a count"),
        (["--beams", "2", "--best-of", "2"], "--beams searches and --best-of samples; leave out one of them"),
        (["--beams", "2", "--top-k", "3"], "--beams does not sample; leave out --top-k"),
        (["--best-of", "2", "--greedy"], "--greedy gives the same text each time"),
        (["--beams", "2", "--samples", "3"], "--samples 3 is more than --beams 2 gives; give at most 2"),
        (["--best-of", "4", "--rows", "3"], "--rows 3 is fewer than the 4 texts of one prompt"),
        (["--beams", "2", "--compare"], "--compare decodes one text, greedily; leave out"),
        (["--layout", "shelves"], "invalid choice: 'shelves'"),
    ],
)
def test_what_does_not_go_together_is_said(model, capsys, words, message):
    try:
        status = main(["generate", "A list", *words])
    except SystemExit as error:  # what argparse refuses
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
