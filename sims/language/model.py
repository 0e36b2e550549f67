"""A causal language model with its tokenizer: built here, loaded from a folder or a hub, saved.

The only module that imports `transformers`, and only inside functions (extra `[llm]`). What it builds is an ordinary
`LlamaForCausalLM` with a word-level tokenizer, saved as safetensors: everything that runs on it runs on any other
causal language model of that library. Weights are never read from a pickle.
"""

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theory import __version__
from theory._check import check_count, unknown

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")  # padding, start, end, unknown word
TRAINING = "training.json"  # what produced a checkpoint


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A network, its tokenizer, and what produced it.

    network : a causal language model of `transformers`, in evaluation mode.
    tokenizer : a tokenizer of `transformers`.
    training : what produced the weights (world, recipe, seed, command, versions); empty for models from elsewhere.
    """

    network: Any
    tokenizer: Any
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def W(self) -> Tensor:
        """(V, d) the unembedding matrix, detached."""
        return self.network.get_output_embeddings().weight.detach()

    def logits(self, h: Tensor) -> Tensor:
        """(..., V) logits of states (..., d) after the final norm."""
        return self.shape_logits(self.network.get_output_embeddings()(h))

    def shape_logits(self, product: Tensor) -> Tensor:
        """What the architecture does to W h: a scale or a soft cap, in most nothing."""
        config = self.network.config
        product = (
            product * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        )
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(product / cap) if cap else product

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the parameters of the unembedding. The rest is the body; of a tied model, without the embedding."""
        ours = {id(p) for p in self.network.get_output_embeddings().parameters()}
        return tuple(name for name, p in self.network.named_parameters() if id(p) in ours)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without special ones."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, with the token that starts a text if the tokenizer has one."""
        start = self.tokenizer.bos_token_id
        return ((start,) if start is not None else ()) + self.encode(text)

    def response(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, with the token that ends one."""
        return (*self.encode(text), self.end)

    @property
    def longest(self) -> int:
        """Most tokens of a text."""
        return getattr(self.network.config, "max_position_embeddings", None) or 1 << 30

    @property
    def end(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the model's tokenizer must have a token that ends a text (eos_token), it has none")
        return end

    def token(self, word: str) -> int:
        """The one token of a word; a ValueError if it is unknown or takes several."""
        ids = self.encode(word)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            what = "is unknown" if ids and ids[0] == self.tokenizer.unk_token_id else f"takes {len(ids)}"
            raise ValueError(f"word must be one token of this model, {word!r} {what}")
        return ids[0]

    def text(self, ids: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def word(self, token: int) -> str:
        """One token as text."""
        return self.tokenizer.decode([token])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weights and the vocabulary: two models with the same one behave alike."""
        digest = hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def copy(self) -> "LanguageModel":
        """An independent copy of the network; the tokenizer is shared."""
        return LanguageModel(copy.deepcopy(self.network), self.tokenizer, dict(self.training))

    def __repr__(self) -> str:
        config = self.network.config
        size = sum(p.numel() for p in self.network.parameters())
        return f"LanguageModel({config.model_type}, V={config.vocab_size}, d={config.hidden_size}, {size:,} parameters)"


def new_model(
    words: Iterable[str], *, d: int = 128, layers: int = 2, heads: int = 4, max_length: int = 64, seed: int = 0
) -> LanguageModel:
    """A small Llama with random weights and a tokenizer of whole words.

    Parameters
    ----------
    words : the vocabulary, beside the special tokens; texts are split at spaces and around punctuation.
    d : hidden size, a multiple of 2 `heads`. layers, heads : of the transformer. max_length : longest text, in tokens.
    seed : of the weights.

    Raises ValueError for an empty vocabulary or sizes that do not fit, ImportError without the extra `[llm]`.
    """
    transformers = _transformers()
    words = sorted(set(words) - set(SPECIAL))
    if not words:
        raise ValueError("words must hold at least one word, got none")
    for value, name in ((d, "d"), (layers, "layers"), (heads, "heads"), (max_length, "max_length")):
        check_count(value, name)
    if d % (2 * heads):
        raise ValueError(f"d must be a multiple of 2 heads = {2 * heads}, got {d}")
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=d,
        intermediate_size=2 * d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.LlamaForCausalLM(config)
    return _ready(network, _word_tokenizer(words, max_length))


def _word_tokenizer(words: list[str], max_length: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]  # \w+|[^\w\s]+
    start = SPECIAL[1]  # as Llama's own: a text begins with it unless special tokens are declined
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False, **names
    )


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "eager",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A model from a folder, or from a hub by its name.

    Parameters
    ----------
    dtype : of the weights, one of DTYPES; "auto" is the one they are stored in.
    attention : implementation, by the library's names. "eager" is the one that all of this package can differentiate
        and stack; "sdpa" is fast.
    device : as torch names it; "auto" is an accelerator if there is one.
    revision, trust_remote_code : as the library has them; no code that comes with a model runs unless asked for.

    Raises ValueError naming the folder if a file is missing, damaged, or does not fit the others.
    """
    transformers = _transformers()
    dtype = SHORT.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    here = Path(path).is_dir()
    if not here and (Path(path).is_absolute() or str(path).startswith(".")):
        raise ValueError(f"model must be a folder with a model, or a name on a hub, got {str(path)!r}")
    if here:
        _check_folder(Path(path))
    try:
        with _quiet():
            network, info = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library raises whatever its readers raise
        raise ValueError(f"model at {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        raise ValueError(f"model at {str(path)!r} does not fit its configuration: {wrong}")
    if len(tokenizer) > network.get_output_embeddings().weight.shape[0]:
        raise ValueError(
            f"model at {str(path)!r}: its tokenizer has {len(tokenizer)} tokens, "
            f"its unembedding only {network.get_output_embeddings().weight.shape[0]} rows"
        )
    network.to(_device(device))
    return _ready(network, tokenizer, _training(Path(path) / TRAINING) if here else {}, attention)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
        return found if found is not None and torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # without CUDA torch asserts
        raise ValueError(f"device must be one that torch can use, got {name!r} ({error})") from error


@lru_cache(maxsize=4)
def load_unchanged(path: str, fingerprint: str) -> LanguageModel:
    """The model of a job: read once per process, and a ValueError if it is not the one that the job was made for."""
    model = load(path)
    if model.fingerprint != fingerprint:
        raise ValueError(f"model at {path!r} changed while the experiment ran")
    return model


def _training(file: Path) -> dict[str, Any]:
    """What produced the checkpoint, as it says."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, it holds {type(found).__name__}")
    return found


def _check_folder(folder: Path) -> None:
    """Say what is missing before the library guesses."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model folder {str(folder)!r} holds an adapter: merge it into its model and save that first")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {str(folder)!r} has no config.json")
    if not list(folder.glob("*.safetensors")):
        pickled = [f.name for f in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        more = f"; {', '.join(pickled)} is a pickle and is not read" if pickled else ""
        raise ValueError(f"model folder {str(folder)!r} has no weights in safetensors form{more}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"model folder {str(folder)!r} has no tokenizer")


def shipped(name: str) -> LanguageModel:
    """A checkpoint that comes with the package: "persona" or "requests"."""
    there = sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir()) if CHECKPOINTS.is_dir() else []
    if name not in there:
        raise ValueError(f"checkpoint must be one of {there}, got {name!r}")
    return load(CHECKPOINTS / name)


def save(model: LanguageModel, folder: str | Path) -> Path:
    """Write weights (safetensors), configuration, tokenizer and what produced them; the old folder or the new one.

    Raises ValueError if the folder holds something that is no model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"folder must be new, empty or hold a model, {str(folder)!r} holds something else")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name, suffix=".part"))
    old = temporary.with_suffix(".old")
    try:
        with _quiet():
            model.network.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        training = {"version": __version__, **model.training}
        (temporary / TRAINING).write_text(json.dumps(training, indent=1, sort_keys=True) + "\n")
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _ready(
    network: Any, tokenizer: Any, training: dict[str, Any] | None = None, attention: str = "eager"
) -> LanguageModel:
    network.eval()
    # Weights mapped from a file may lie at addresses for which matrix products take another path and round otherwise.
    for p in network.parameters():
        p.data = p.data.clone()
    # Stacked copies are run by vmap, which the fused attention kernels do not know: hence "eager" by default.
    network.set_attn_implementation(attention)
    return LanguageModel(network, tokenizer, training or {})


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for files of a few megabytes."""
    log = _transformers().utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError('this needs transformers: python3 -m pip install -e ".[llm]"') from error
    return transformers
