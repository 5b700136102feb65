"""The peer's side of `tools.bench.peers`: the name of a phase on stdin, "seconds N" on stdout.

transformers generates, or runs forward (and backward) passes over given completions; TRL's
GRPOTrainer makes one step of its training (images, a rollout, an update). Completions have the
lengths that the task names. Imports nothing of this repository; needs torch and, for TRL, trl.
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
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

Task = dict[str, Any]
ON_GPU = torch.cuda.is_available()
TURNS = 100  # of TRL, at most


class GivenLengths(LogitsProcessor):
    """Ends each sample with its end token exactly where the task says, and draws no image token."""

    def __init__(self, task: Task):
        self._lengths, self._task = torch.tensor(task["lengths"]), task
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
        last = self._lengths.to(scores.device) == input_ids.shape[1] - self._start + 1
        scores = scores.clone()
        scores[:, self._task["forbidden"]] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self._task["end"]] = 0.0
        return scores


class _Processor(Qwen2_5_VLProcessor):
    """The released processor without a video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class _NoVideos:
    model_input_names: list[str] = []


def make_processor(task: Task) -> Any:
    """Tokenizer, image processor and chat template of the directory."""
    (low, high), folder = task["pixels"], task["hf_dir"]
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=low, max_pixels=high)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _Processor(images, tokenizer, _NoVideos(), chat_template=tokenizer.chat_template)


def make_model(task: Task) -> Any:
    """The same weights, on the GPU where there is one, with one end token; the tower is frozen."""
    dtype = getattr(torch, task["dtype"])
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(task["hf_dir"], dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = task["end"]
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in path)
    return model.to("cuda" if ON_GPU else "cpu")


def load_images(folder: Path, task: Task) -> list[list[Image.Image]]:
    """The images of each prompt."""
    paths = [folder / f"{p}.png" for p in range(len(task["messages"]))]
    return [[Image.open(path).convert("RGB")] if path.exists() else [] for path in paths]


# --- transformers -----------------------------------------------------------------------------


class Transformers:
    """A model, its prompts, and the phases by their names."""

    def __init__(self, folder: Path, task: Task):
        self.task, self.model = task, make_model(task)
        self.processor, self.images = make_processor(task), load_images(folder, task)
        self.at_once = task["group_size"]  # samples of a pass; halved until they fit
        self.prompts = [self.inputs([p]) for p in range(len(task["messages"]))]
        self.everything = self.inputs(range(len(task["messages"])))

    def inputs(self, prompts: Any) -> Any:
        """Arrays of some prompts, padded on the left."""
        render = functools.partial(
            self.processor.apply_chat_template, add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(
            text=[render(self.task["messages"][p]) for p in prompts],
            images=[image for p in prompts for image in self.images[p]] or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device)
        inputs["mm_token_type_ids"] = self.types(inputs["input_ids"])
        return inputs

    def types(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are an image's; without it positions are silently others."""
        return (ids == self.model.config.image_token_id).int()

    @torch.no_grad()
    def decode(self) -> None:
        """Sample every group."""
        self.model.generate(
            **self.everything,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=self.task["group_size"],
            max_new_tokens=self.task["max_new_tokens"],
            logits_processor=LogitsProcessorList([GivenLengths(self.task)]),
        )

    @torch.no_grad()
    def logprobs(self) -> None:
        """Log-probs of every completion."""
        self.model.eval()
        self.passes(lambda loss: None)

    def update(self) -> None:
        """Forward and backward pass over every completion; no optimizer."""
        self.model.train()
        if ON_GPU:
            self.model.gradient_checkpointing_enable()
        self.passes(torch.Tensor.backward)
        self.model.zero_grad()

    def passes(self, finish: Callable[[torch.Tensor], None]) -> None:
        """Over each prompt with some of its completions at a time."""
        G, lengths, p, g = self.task["group_size"], self.task["lengths"], 0, 0
        while p < len(self.prompts):
            end = min(g + self.at_once, G)
            try:
                finish(self.loss(self.prompts[p], lengths[p * G + g : p * G + end]))
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once //= 2
                torch.cuda.empty_cache()
                continue
            p, g = (p + 1, 0) if end == G else (p, end)

    def loss(self, prompt: Any, lengths: list[int]) -> torch.Tensor:
        """Minus the sum of the log-probs of some samples of a prompt, padded to the longest."""
        count, longest, device = len(lengths), max(lengths), self.model.device
        own = torch.randint(0, min(self.task["forbidden"]), (count, longest), device=device)
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        ids = torch.cat([prompt["input_ids"].expand(count, -1), own], 1)
        images = {
            name: prompt[name].repeat(count, 1)
            for name in ("pixel_values", "image_grid_thw")
            if name in prompt
        }
        seen = torch.cat([prompt["attention_mask"].expand(count, -1), mask.int()], 1)
        out = self.model(
            input_ids=ids,
            attention_mask=seen,
            mm_token_type_ids=self.types(ids),
            logits_to_keep=longest + 1,
            use_cache=False,
            **images,
        )
        logits = out.logits[:, :-1].float()
        logp = logits.gather(2, own[..., None])[..., 0] - logits.logsumexp(2)
        return -(logp * mask).sum()


def transformers_peer(folder: Path, task: Task) -> None:
    """The phase that is named, once a turn."""
    peer = Transformers(folder, task)
    for name in map(str.strip, sys.stdin):
        start = time.perf_counter()
        getattr(peer, name)()
        tell(start)


# --- TRL --------------------------------------------------------------------------------------


def trl_peer(folder: Path, task: Task) -> None:
    """One step of GRPOTrainer a turn; on a GPU a group at a time, as `Transformers` works."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore

    model, rows = make_model(task), []
    model.generate = with_lengths(model.generate, task)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                sys.exit(0)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell(self.start)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    for messages, own in zip(task["messages"], load_images(folder, task), strict=True):
        text = messages[0]["content"][-1]["text"]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": text}]}
        rows.append(row | ({"image": own[0]} if own else {}))
    accumulated = len(rows) if ON_GPU else 1
    config = GRPOConfig(
        output_dir=str(folder / "out"),
        # All at once where that fits; on a GPU their logits would not.
        per_device_train_batch_size=len(task["lengths"]) // accumulated,
        gradient_accumulation_steps=accumulated,
        num_generations=task["group_size"],
        max_completion_length=task["max_new_tokens"],
        max_steps=TURNS,
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        bf16=task["dtype"] == "bfloat16",
        use_cpu=not ON_GPU,
        gradient_checkpointing=ON_GPU,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
    )
    trainer: Any = GRPOTrainer  # whose annotations are narrower than what it takes
    trainer(
        model,
        reward,
        args=config,
        train_dataset=Dataset.from_list(rows * TURNS),
        processing_class=make_processor(task),
        callbacks=[Turns()],
    ).train()


def with_lengths(generate: Callable[..., Any], task: Task) -> Callable[..., Any]:
    """``model.generate`` whose samples end where the task says."""

    @functools.wraps(generate)
    def ending(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **kwargs, logits_processor=LogitsProcessorList([GivenLengths(task)]))

    return ending


def tell(start: float) -> None:
    """The seconds since then, when the device is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    print(f"seconds {time.perf_counter() - start}", flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    peer = {"hf": transformers_peer, "trl": trl_peer}[sys.argv[1]]
    peer(place, json.loads((place / "task.json").read_text()))
