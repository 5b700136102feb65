"""A local checkpoint as the policy of the reflection builder: batches through our sampler."""

import argparse

import numpy as np

from srpo_jax.data.batching import Encoded
from srpo_jax.data.errors import RecordError
from srpo_jax.data.images import load_image
from srpo_jax.data.prompts import MESSAGES
from srpo_jax.reflection.settings import Settings
from srpo_jax.reflection.stages import Ask
from srpo_jax.sampling.sampler import Sampler
from srpo_jax.structs import Rollout
from tools import generate
from tools.lib import loading

MAX_PROMPT_TOKENS = 8192


class SamplerPolicy:
    """``stages.LocalPolicy`` on all devices of this process."""

    def __init__(self, settings: Settings):
        self._args = argparse.Namespace(
            hf_dir=settings.policy_hf_dir, dtype=None, tensor=1,
            min_pixels=settings.min_pixels, max_pixels=settings.max_pixels,
            batch_size=settings.batch_size or 8, seed=settings.seed,
            n=1, top_k=0, top_p=1.0, min_p=0.0,
        )  # fmt: skip
        self._model = loading.load_model(self._args, for_sampling=True)
        self._samplers: dict[tuple[float, int], Sampler] = {}
        self.name = settings.policy_hf_dir

    def sample(
        self, asks: list[Ask], *, prompt: str, temperature: float, max_new_tokens: int
    ) -> list[tuple[str, int, int, bool]]:
        """See ``stages.LocalPolicy.sample``. The seed of an ask alone decides its randomness."""
        args = argparse.Namespace(
            **{**vars(self._args), "temperature": temperature, "max_new_tokens": max_new_tokens}
        )
        key = (temperature, max_new_tokens)
        if key not in self._samplers:
            self._samplers[key] = generate.make_sampler(self._model, args)
        encoded = {i: self._encode(ask, prompt) for i, ask in enumerate(asks)}
        fitting = {i: one for i, one in encoded.items() if one is not None}
        found: list[tuple[str, int, int, bool]] = [("", 0, 0, False)] * len(asks)
        if fitting:
            rollout = generate.sample(
                self._model,
                self._samplers[key],
                list(fitting.values()),
                [str(asks[i].seed) for i in fitting],
                args,
            )
            for place, (i, one) in enumerate(fitting.items()):
                found[i] = self._read(rollout, place, one.num_tokens)
        return found

    def _encode(self, ask: Ask, prompt: str) -> Encoded | None:
        """The prompt with the beginning of its answer; None where it does not fit."""
        record = ask.record
        messages = MESSAGES[prompt](record.question, record.images, record.choices)
        images = [load_image(ref) for ref in record.images]
        try:
            encoded = self._model.processor.encode_prompt(
                messages, images, prefix=ask.prefix, origin=record.origin
            )
        except RecordError:
            return None
        return encoded if encoded.num_tokens <= MAX_PROMPT_TOKENS else None

    def _read(
        self, rollout: Rollout[np.ndarray], place: int, prompt_tokens: int
    ) -> tuple[str, int, int, bool]:
        processor = self._model.processor
        length = int(rollout.completion_mask[place, 0].sum())
        ids = rollout.completions[place, 0, :length].tolist()
        text_ids = ids[:-1] if ids and ids[-1] in processor.eos_ids else ids
        text = processor.tokenizer.decode(text_ids, skip_special_tokens=False)
        return text, prompt_tokens, length, bool(np.asarray(rollout.finished[place, 0]))
