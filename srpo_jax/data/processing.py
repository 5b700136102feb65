"""Messages and images -> token ids, pixel patches and positions, exactly as Hugging Face's.

``Processor`` holds the tokenizer, the PIL image processor and the chat template of a Hugging Face
directory; ``collate`` (from data/batching.py) turns what it returns into one ``Batch``.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from srpo_jax.data.batching import Encoded, Media, encode_arrays
from srpo_jax.data.errors import RecordError, half_character, shown
from srpo_jax.data.hf_folder import end_token_ids, hf_folder, read_json, small_files, token_ids
from srpo_jax.data.images import to_rgb
from srpo_jax.data.prompts import CONTROL_TOKENS, IMAGE_PAD, VIDEO_PAD, VISION_MARKERS, Message
from srpo_jax.data.vision_arrays import VisionGeometry, VisionIds

# The recipe's pixel range: 4 to 640 merged tokens an image (MM-EUREKA, SRPO).
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 640 * 28 * 28

# Stands inside a special token that is meant as text, so that it is none; no text can hold it.
_GUARD = "\ud800"
_UNESCAPED = r"(?<!\\)((?:\\\\)*)"  # an even number of backslashes: line breaks of LaTeX
_CONTROL = re.compile(f"{_UNESCAPED}({'|'.join(map(re.escape, CONTROL_TOKENS))})")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory; ValueError naming what is missing or broken."""
    found = _load(
        AutoTokenizer.from_pretrained, hf_folder(folder), ("tokenizer.json", "vocab.json")
    )
    if not hasattr(found, "backend_tokenizer"):
        raise ValueError(f"{folder}: no fast tokenizer; copy tokenizer.json from the base model")
    return found


def _load(
    load: Callable[..., Any], folder: epath.Path, names: tuple[str, ...], **options: Any
) -> Any:
    """What transformers loads from the ``names`` of a directory, of which one must be there."""
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder}: no {' or '.join(names)}; copy it from the base model")
    try:
        return load(small_files(folder), local_files_only=True, **options)
    except Exception as error:  # transformers' and tokenizers' errors have no common class
        for path in sorted(folder.glob("*.json")):
            if not path.name.endswith(".index.json"):
                read_json(path)  # says which file is broken
        said = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: {' or '.join(names)} cannot be read ({type(error).__name__}: {said:.200}); "
            "copy the tokenizer and preprocessor files of the base model"
        ) from error


def _chat_template(hf_dir: epath.Path, tokenizer: Any) -> str:
    """The processor's template where there is one, else the tokenizer's."""
    template = read_json(hf_dir / "chat_template.json").get("chat_template")
    if template is None and (hf_dir / "chat_template.jinja").is_file():
        template = (hf_dir / "chat_template.jinja").read_text()
    template = template or tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"{hf_dir}: no chat template; add chat_template.json or chat_template.jinja"
        )
    return template


class Processor:
    """Tokenizer, image processor and chat template of one Hugging Face directory.

    Attributes: tokenizer (HF), geometry, vocab_size (ids the tokenizer knows), eos_ids, pad_id,
    image_token_id, ids (of images and videos), forbidden_ids (never to be sampled).
    """

    def __init__(
        self,
        hf_dir: str | Path,
        *,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
    ):
        folder = hf_folder(hf_dir)
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(
                f"min_pixels={min_pixels}, max_pixels={max_pixels}: need 0 < min <= max"
            )
        self.hf_dir, self.min_pixels, self.max_pixels = folder, min_pixels, max_pixels
        self.tokenizer = load_tokenizer(hf_dir)
        self._backend = self.tokenizer.backend_tokenizer
        # Called from several threads: padding or truncation would be shared mutable state.
        self._backend.no_padding()
        self._backend.no_truncation()
        added = (t[1:] for t in self.tokenizer.get_added_vocab() if t.startswith("<"))
        self._escaped = re.compile(rf"{_UNESCAPED}\\<({'|'.join(map(re.escape, added))})")
        # size=... would be ignored where the file has min_pixels and max_pixels.
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        load = Qwen2VLImageProcessorPil.from_pretrained
        self.image_processor = _load(load, folder, _PROCESSOR_FILES, **pixels)
        self.chat_template = _chat_template(folder, self.tokenizer)
        self._read_config()

    def _read_config(self) -> None:
        """Window size, time scale and special ids from config.json and generation_config.json."""
        config = read_json(self.hf_dir / "config.json")
        vision = config.get("vision_config", {})
        for key in ("patch_size", "temporal_patch_size"):
            ours = getattr(self.image_processor, key)
            if vision.get(key, ours) not in (ours, [ours, ours]):
                raise ValueError(
                    f"{self.hf_dir}: {key} is {ours} in the preprocessor's file and {vision[key]} "
                    "in config.json: they are not of the same model"
                )
        self.geometry = VisionGeometry(
            patch_size=self.image_processor.patch_size,
            merge_size=self.image_processor.merge_size,
            temporal_patch_size=self.image_processor.temporal_patch_size,
            window_size=vision.get("window_size", VisionGeometry.window_size),
        )
        self.vocab_size = len(self.tokenizer)
        ids = {t: self.tokenizer.convert_tokens_to_ids(t) for t in CONTROL_TOKENS}
        known = self.tokenizer.get_added_vocab()
        missing = [t for t in CONTROL_TOKENS if t not in known]
        if missing:
            raise ValueError(f"{self.hf_dir}: the tokenizer has no added tokens {missing}")
        for key, token in (("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD)):
            if config.get(key, ids[token]) != ids[token]:
                raise ValueError(
                    f"{self.hf_dir}/config.json: {key}={config[key]}, but {token} is {ids[token]} "
                    "in the tokenizer"
                )
        self.image_token_id = ids[IMAGE_PAD]
        self.forbidden_ids = tuple(ids[t] for t in VISION_MARKERS)
        time_scale = vision.get("tokens_per_second", 2)
        self.ids = VisionIds(ids[IMAGE_PAD], ids[VIDEO_PAD], time_scale, self.geometry)
        self.eos_ids = end_token_ids(self.hf_dir, ids)
        pad = token_ids(self.hf_dir / "generation_config.json", "pad_token_id")
        pad += [i for i in (self.tokenizer.pad_token_id, ids["<|endoftext|>"]) if i is not None]
        self.pad_id = pad[0]
        if max(*self.eos_ids, self.pad_id) >= self.vocab_size:
            raise ValueError(
                f"{self.hf_dir}/generation_config.json: end tokens {list(self.eos_ids)} and "
                f"padding {self.pad_id}, but the tokenizer has {self.vocab_size} tokens"
            )

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except TemplateError as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self.hf_dir}: the chat template cannot be used ({said}); copy "
                "chat_template.json from the base model"
            ) from error

    def images_to_arrays(
        self, images: Sequence[Image.Image], origin: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """PIL images -> HF's pixel_values [sum(h*w), patch_dim] float32 and grid_thw [I, 3]."""
        if not images:
            return np.zeros((0, self.geometry.patch_dim), np.float32), np.zeros((0, 3), np.int64)
        for image in images:
            if max(image.size) > 200 * min(image.size):
                raise RecordError(
                    origin,
                    f"image of {image.width} x {image.height} pixels: aspect ratio above 200",
                    "crop the image",
                )
        images = [image if image.mode == "RGB" else to_rgb(image) for image in images]
        out = self.image_processor(images, return_tensors="np")
        return np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"])

    def resized(self, image: Image.Image) -> Image.Image:
        """The RGB picture that `images_to_arrays` cuts into patches; resized again it is the same.

        ValueError for an aspect ratio above 200.
        """
        side = self.geometry.patch_size * self.geometry.merge_size
        limits = (self.min_pixels, self.max_pixels)
        height, width = smart_resize(image.height, image.width, side, *limits)
        return to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)

    @functools.cached_property
    def black_patch(self) -> np.ndarray:
        """[patch_dim] float32: the normalised pixels of a black patch."""
        side = 2 * self.geometry.patch_size * self.geometry.merge_size
        return self.images_to_arrays([Image.new("RGB", (side, side))])[0][0]

    def _expand(self, text: str, grid: np.ndarray, origin: str) -> str:
        """Repeat the k-th image placeholder once for each merged token of image k."""
        pieces = text.split(IMAGE_PAD)
        if len(pieces) - 1 != len(grid):
            raise RecordError(
                origin,
                f"{len(pieces) - 1} image places in the messages, but {len(grid)} images",
                "give one image for each place",
            )
        counts = (grid.prod(-1) // self.geometry.merge_unit).tolist()
        return pieces[0] + "".join(
            IMAGE_PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )

    def _guard(self, text: str) -> str:
        r"""``\<|im_end|>`` as the text behind the backslash, not as the special token."""
        return self._escaped.sub(rf"\1<{_GUARD}\2", text)

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their escaped tokens guarded."""

        def guarded(content: Any) -> Any:
            if isinstance(content, str):
                return self._guard(content)
            return [
                {**part, "text": guarded(part["text"])} if part["type"] == "text" else part
                for part in content
            ]

        return [{**message, "content": guarded(message["content"])} for message in messages]

    def _encode(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids, and [2, T] their first and last character in ``text``; a guard is no token."""
        token_ids, spans, start = [], [], 0
        for piece in text.split(_GUARD):
            encoding = self._backend.encode(piece, add_special_tokens=False)
            token_ids += encoding.ids
            spans.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + start)
            start += len(piece) + len(_GUARD)
        return token_ids, np.concatenate(spans).T

    def encode_prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image] = (),
        *,
        generation_prompt: bool = True,
        prefix: str = "",
        origin: str = "",
    ) -> Encoded:
        """Messages in HF's form (image parts as {"type": "image"}) -> Encoded, ready to sample.

        The generation prompt is appended (without it: a conversation as it stands, no loss), and
        ``prefix`` after it: how the assistant's turn is to begin. Ids and image-token counts equal
        HF's processor's.
        Raises RecordError for control tokens in the text, a wrong number of images, and images
        that cannot be resized.
        """
        check_messages([*messages, {"role": "assistant", "content": prefix}], origin)
        messages, prefix = self._guarded(messages), self._guard(prefix)
        pixel_values, grid = self.images_to_arrays(images, origin)
        text = self._expand(self._render(messages, generation_prompt), grid, origin) + prefix
        token_ids, _ = self._encode(text)
        return encode_arrays(
            token_ids,
            self.ids,
            Media(pixel_values, grid),
            loss_mask=np.zeros(len(token_ids), np.float32),
            origin=origin,
        )

    def encode_conversation(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image] = (),
        *,
        mask_first_attempt: bool = False,
        origin: str = "",
    ) -> Encoded:
        """A whole conversation -> Encoded with loss on the assistant's tokens.

        The loss covers each assistant turn's text and its <|im_end|>, not the newline after it.
        ``mask_first_attempt`` takes the content of the first think and of the first answer block
        of the last assistant turn out of the loss (their tags stay in it): the model still sees
        a wrong first attempt, but does not learn to make it. Raises RecordError as
        ``encode_prompt`` does, and when there is no assistant turn or no block to mask.
        """
        check_messages(messages, origin)
        messages = self._guarded(messages)
        pixel_values, grid = self.images_to_arrays(images, origin)
        raw = self._render(messages, False)
        text = self._expand(raw, grid, origin)
        spans, masked = self._loss_spans(messages, raw, mask_first_attempt, origin)
        token_ids, (starts_T, stops_T) = self._encode(text)
        loss_mask = np.zeros(len(token_ids), np.float32)
        # Spans were found before the placeholders grew; their ends move by what grew before them.
        shift = _growth(raw, grid.prod(-1) // self.geometry.merge_unit)
        for weight, places in ((1.0, spans), (0.0, masked)):
            for start, stop in places:
                overlap = (stops_T > shift(start)) & (starts_T < shift(stop))
                loss_mask[overlap] = weight
        return encode_arrays(
            token_ids,
            self.ids,
            Media(pixel_values, grid),
            loss_mask=loss_mask,
            origin=origin,
        )

    def _loss_spans(
        self, messages: Sequence[Message], text: str, mask_first_attempt: bool, origin: str
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Character spans of the rendered text that the loss covers, and those taken out again."""
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:k], True)
            until = self._render(messages[: k + 1], False)
            if not (text.startswith(until) and until.startswith(before)):
                raise ValueError(
                    f"{self.hf_dir}: the chat template rewrites earlier turns; the assistant's "
                    "tokens cannot be told apart"
                )
            spans.append((len(before), len(until.rstrip("\n"))))
        if not spans:
            raise RecordError(origin, "no assistant turn to learn from", "add one")
        masked = []
        if mask_first_attempt:
            start, stop = spans[-1]
            for tag in ("think", "answer"):
                found = re.compile(f"<{tag}>(.*?)</{tag}>", re.DOTALL).search(text, start, stop)
                if not found:
                    raise RecordError(origin, f"no <{tag}> block to mask", "check the response")
                masked.append(found.span(1))
        return spans, masked


def _growth(raw: str, counts: np.ndarray) -> Callable[[int], int]:
    """Map a character offset of ``raw`` to one after each image placeholder was repeated."""
    places = np.array([m.end() for m in re.finditer(re.escape(IMAGE_PAD), raw)], np.int64)
    grown = np.concatenate([[0], np.cumsum((np.asarray(counts, np.int64) - 1) * len(IMAGE_PAD))])

    def shift(offset: int) -> int:
        return offset + int(grown[np.searchsorted(places, offset, side="right")])

    return shift


def check_messages(messages: Sequence[Message], origin: str = "") -> None:
    """RecordError unless the messages have HF's form and no control token in their text.

    A message is {"role", "content"}; its content a string or a list of {"type": "text", "text"}
    and {"type": "image", ...} parts. A token behind a backslash is text.
    """
    remedy = "write {'role', 'content'}, the content text or a list of text and image parts"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RecordError(origin, "a message without a role", remedy)
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise RecordError(origin, "a message without content", remedy)
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                continue
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RecordError(origin, "a part that is neither text nor image", remedy)
            token, half = _CONTROL.search(part["text"]), half_character(part["text"])
            if token:
                raise RecordError(
                    origin,
                    f"control token {token[2]} in the text",
                    f"remove it, or write \\{token[2]} where its text is meant",
                )
            if half is not None:
                raise RecordError(
                    origin, f"half a surrogate pair in {shown(half)}", "write it as UTF-8"
                )


def token_bytes(tokenizer: Any, size: int | None = None) -> list[bytes]:
    """The bytes that each token id stands for, by id; what byte-exact block spans are found on.

    Byte-level BPE tokens map back through the byte alphabet, added tokens are their literal text
    in UTF-8. ``size`` pads the list with b"" up to the model's vocabulary, which is larger than the
    tokenizer's. ValueError for a tokenizer that is not byte-level.
    """
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    table = [b""] * max(size or 0, max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if token in added:
            table[index] = token.encode("utf-8")
            continue
        try:
            table[index] = bytes(alphabet[c] for c in token)
        except KeyError:
            raise ValueError(f"token {index} ({token!r}): not a byte-level BPE tokenizer") from None
    return table
