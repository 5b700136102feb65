"""The peer's side of `tools.bench.peers`: "go" on stdin, "seconds N" on stdout.

transformers generates, or TRL's GRPOTrainer makes one step of its training (images, a rollout, an
update), each with completions of the lengths that the task names. Needs torch and, for TRL, trl.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class GivenLengths(LogitsProcessor):
    """Ends each sample with its end token exactly where the task says."""

    def __init__(self, lengths: list[int], eos: int):
        self._lengths, self._eos = torch.tensor(lengths), eos
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
        last = self._lengths.to(scores.device) == input_ids.shape[1] - self._start + 1
        scores = scores.clone()
        scores[:, self._eos] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self._eos] = 0.0
        return scores


class _Processor(Qwen2_5_VLProcessor):
    """The released processor without a video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class _NoVideos:
    model_input_names: list[str] = []


def make_processor(task: dict[str, Any]) -> Any:
    """Tokenizer, image processor and chat template of the directory."""
    from transformers import AutoTokenizer

    low, high = task["pixels"]
    folder = task["hf_dir"]
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=low, max_pixels=high)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _Processor(images, tokenizer, _NoVideos(), chat_template=tokenizer.chat_template)


def make_model(task: dict[str, Any]) -> Any:
    """The same weights, on the GPU where there is one, with one end token."""
    dtype = getattr(torch, task["dtype"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(task["hf_dir"], dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end_token(task)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def end_token(task: dict[str, Any]) -> int:
    """The first end token of generation_config.json."""
    found = json.loads((Path(task["hf_dir"]) / "generation_config.json").read_text())
    ids = found["eos_token_id"]
    return ids[0] if isinstance(ids, list) else ids


def load_images(folder: Path, task: dict[str, Any]) -> list[list[Image.Image]]:
    """The images of each prompt."""
    paths = [folder / f"{p}.png" for p in range(len(task["messages"]))]
    return [[Image.open(path).convert("RGB")] if path.exists() else [] for path in paths]


def transformers_peer(folder: Path, task: dict[str, Any]) -> None:
    """Sample every group once per "go"."""
    model, processor = make_model(task), make_processor(task)
    texts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in task["messages"]
    ]
    images = load_images(folder, task)
    inputs = processor(
        text=texts,
        images=[image for own in images for image in own] or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()

    def run() -> None:
        ends = GivenLengths(task["lengths"], end_token(task))
        model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=task["group_size"],
            max_new_tokens=task["max_new_tokens"],
            logits_processor=LogitsProcessorList([ends]),
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    with torch.no_grad():
        while wait():
            timed(run)


def trl_peer(folder: Path, task: dict[str, Any]) -> None:
    """One step of GRPOTrainer per "go"."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, processor = make_model(task), make_processor(task)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in path)
    model.generate = _with_lengths(model.generate, task)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not wait():
                sys.exit(0)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f"seconds {time.perf_counter() - self.start}", flush=True)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    images, rows = load_images(folder, task), []
    for messages, own in zip(task["messages"], images, strict=True):
        text = messages[0]["content"][-1]["text"]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": text}]}
        rows.append(row | ({"image": own[0]} if own else {}))
    samples = len(rows) * task["group_size"]
    config = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=samples,
        num_generations=task["group_size"],
        max_completion_length=task["max_new_tokens"],
        max_steps=1000,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        bf16=task["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model,
        reward,
        args=config,
        train_dataset=Dataset.from_list(rows * 1000),
        processing_class=processor,
        callbacks=[Turns()],
    )
    trainer.train()


def _with_lengths(generate: Callable[..., Any], task: dict[str, Any]) -> Callable[..., Any]:
    """``model.generate`` whose samples end where the task says."""

    @functools.wraps(generate)
    def ending(*args: Any, **kwargs: Any) -> Any:
        ends = GivenLengths(task["lengths"], end_token(task))
        return generate(*args, **kwargs, logits_processor=LogitsProcessorList([ends]))

    return ending


def wait() -> bool:
    """Whether there is another turn."""
    return sys.stdin.readline().strip() == "go"


def timed(run: Callable[[], None]) -> None:
    """Run once and tell the seconds."""
    start = time.perf_counter()
    run()
    print(f"seconds {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    peer = {"hf": transformers_peer, "trl": trl_peer}[sys.argv[1]]
    peer(place, json.loads((place / "task.json").read_text()))
