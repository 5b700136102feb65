"""A Hugging Face directory that is none, or half of one, is told what it is and what to do."""

import json
import shutil

import pytest
from transformers import Qwen2_5_VLConfig

from srpo_jax.data.hf_folder import end_token_ids, model_folder, read_json
from srpo_jax.data.processing import Processor, load_tokenizer
from srpo_jax.model.config import ModelConfig
from tests.data_helpers import make_hf_dir
from tests.test_model_config import FLAT, nested

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_hf_dir(tmp_path_factory.mktemp("good") / "hf")


@pytest.fixture
def folder(good, tmp_path):
    """A copy to be spoiled."""
    return shutil.copytree(good, tmp_path / "hf")


def write(path, **values):
    """A JSON file, its old keys kept."""
    path.write_text(json.dumps(read_json(path) | values))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir Qwen"),
        ("Qwen2.5-VL-7B-Instruct", "hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir Qwen"),
        ("./models/mine", "no such directory; give a Hugging Face Qwen2.5-VL model directory"),
        ("~/qwen", r"write \$HOME instead of ~"),
        ("", "'': no such directory"),
    ],
)
def test_a_directory_that_is_not_there_says_how_to_get_it(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        model_folder(path)


def test_what_is_no_model_directory_says_what_it_is(folder, tmp_path):
    assert model_folder(folder) == folder
    with pytest.raises(ValueError, match="config.json: is a file; give the .* directory it lies"):
        model_folder(folder / "config.json")
    with pytest.raises(FileNotFoundError, match=f"no config.json; did you mean {folder}?"):
        model_folder(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="of this project is init_from"):
        model_folder(tmp_path / "run")


def test_an_adapter_is_named_with_its_base_alone_and_beside_a_model(folder, tmp_path):
    write(folder / "adapter_config.json", **ADAPTER)
    with pytest.raises(ValueError, match="beside a whole model, and the adapter would be left out"):
        model_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="a PEFT adapter of Qwen/Qwen2.5-VL-7B-Instruct, .*merge"):
        model_folder(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json or vocab.json; copy it"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json: not valid JSON"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json .*cannot be read"),
        (
            lambda d: (d / "tokenizer.json").write_text("version https://git-lfs.github.com/spec"),
            "tokenizer.json: is a Git LFS pointer.*git lfs pull",
        ),
        (lambda d: (d / "preprocessor_config.json").unlink(), "no preprocessor_config.json or"),
        (lambda d: (d / "preprocessor_config.json").write_text("[]"), "expected a JSON object"),
        (
            lambda d: (
                write(d / "preprocessor_config.json", temporal_patch_size=1)
                or write(d / "config.json", vision_config={"temporal_patch_size": 2})
            ),
            "temporal_patch_size is 1 in the preprocessor's file and 2 in config.json",
        ),
        (
            lambda d: write(d / "generation_config.json", eos_token_id="<|im_end|>"),
            "generation_config.json: eos_token_id: expected a token id",
        ),
        (
            lambda d: write(d / "generation_config.json", eos_token_id=999),
            r"generation_config.json: end tokens \[999, .*but the tokenizer has",
        ),
    ],
)
def test_a_file_that_is_missing_or_broken_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        Processor(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["{% for x", "{{ messages.nothing.at.all }}"])
def test_a_chat_template_that_cannot_be_used_is_named_with_its_folder(folder, template):
    write(folder / "chat_template.json", chat_template=template)
    with pytest.raises(ValueError, match=f"{folder}: the chat template cannot be used .*; copy"):
        Processor(folder).encode_prompt([{"role": "user", "content": "?"}], [])


def test_end_tokens_are_those_that_are_named_and_the_chat_formats_own(folder):
    known = load_tokenizer(folder).get_vocab()
    end, text = known["<|im_end|>"], known["<|endoftext|>"]
    for value in (None, [], end, [end], [end, text]):
        write(folder / "generation_config.json", eos_token_id=value)
        assert end_token_ids(folder, known) == Processor(folder).eos_ids == (end, text)
    write(folder / "generation_config.json", eos_token_id=[5])
    assert Processor(folder).eos_ids == (5, end, text)
    write(folder / "generation_config.json", eos_token_id=None)
    write(folder / "config.json", eos_token_id=7)  # as transformers falls back
    assert Processor(folder).eos_ids == (7, end, text)


@pytest.mark.parametrize("outer", [True, False, "absent"])
@pytest.mark.parametrize("inner", [True, False, "absent"])
def test_embeddings_are_tied_where_transformers_ties_them(outer, inner):
    config = nested(FLAT)
    for table, value in ((config, outer), (config["text_config"], inner)):
        table.pop("tie_word_embeddings", None)
        if value != "absent":
            table["tie_word_embeddings"] = value
    theirs = Qwen2_5_VLConfig(**config).tie_word_embeddings
    assert ModelConfig.from_hf(config).tie_word_embeddings is theirs
