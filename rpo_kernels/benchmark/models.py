"""LM heads of published models: the shapes that benchmarks and memory predictions run on."""

from typing import NamedTuple


class Model(NamedTuple):
    """What the loss layer, and the memory around it, depend on. From the models' published configurations."""

    hidden: int  # H, width of the hidden states
    vocab: int  # V, rows of the LM head
    layers: int
    parameters: float  # of the whole model, all experts included, in billions
    tied: bool = False  # the LM head is the input embedding
    softcap: float | None = None
    logit_scale: float = 1.0


MODELS = {
    "llama-3.2-1b": Model(2048, 128256, 16, 1.24, tied=True),
    "llama-3.1-8b": Model(4096, 128256, 32, 8.03),
    "llama-3.1-70b": Model(8192, 128256, 80, 70.6),
    "llama-3.1-405b": Model(16384, 128256, 126, 406),
    "llama-4-scout": Model(5120, 202048, 48, 109),
    "llama-4-maverick": Model(5120, 202048, 48, 400),
    "qwen2.5-0.5b": Model(896, 151936, 24, 0.49, tied=True),
    "qwen2.5-7b": Model(3584, 152064, 28, 7.62),
    "qwen2.5-72b": Model(8192, 152064, 80, 72.7),
    "qwen3-0.6b": Model(1024, 151936, 28, 0.6, tied=True),
    "qwen3-8b": Model(4096, 151936, 36, 8.19),
    "qwen3-32b": Model(5120, 151936, 64, 32.8),
    "qwen3-30b-a3b": Model(2048, 151936, 48, 30.5),
    "qwen3-235b-a22b": Model(4096, 151936, 94, 235),
    "gemma-2-2b": Model(2304, 256000, 26, 2.61, tied=True, softcap=30.0),
    "gemma-2-9b": Model(3584, 256000, 42, 9.24, tied=True, softcap=30.0),
    "gemma-2-27b": Model(4608, 256000, 46, 27.2, tied=True, softcap=30.0),
    "gemma-3-270m": Model(640, 262144, 18, 0.268, tied=True),
    "gemma-3-1b": Model(1152, 262144, 26, 1.0, tied=True),
    "gemma-3-4b": Model(2560, 262208, 34, 4.3, tied=True),
    "gemma-3-12b": Model(3840, 262208, 48, 12.2, tied=True),
    "gemma-3-27b": Model(5376, 262208, 62, 27.4, tied=True),
    "mistral-7b-v0.1": Model(4096, 32000, 32, 7.24),
    "mistral-7b-v0.3": Model(4096, 32768, 32, 7.25),
    "mistral-nemo-12b": Model(5120, 131072, 40, 12.2),
    "mistral-large-2407": Model(12288, 32768, 88, 123),
    "mixtral-8x7b": Model(4096, 32000, 32, 46.7),
    "mixtral-8x22b": Model(6144, 32768, 56, 141),
    "deepseek-v3": Model(7168, 129280, 61, 671),
    "kimi-k2": Model(7168, 163840, 61, 1026),
    "glm-4.5": Model(5120, 151552, 92, 355),
    "gpt-oss-20b": Model(2880, 201088, 24, 20.9),
    "gpt-oss-120b": Model(2880, 201088, 36, 117),
    "phi-4": Model(5120, 100352, 40, 14.7),
    "command-r7b": Model(4096, 256000, 32, 8.03, tied=True, logit_scale=0.25),
    "command-a": Model(12288, 256000, 64, 111, tied=True, logit_scale=0.25),
    "granite-3.1-8b": Model(4096, 49155, 40, 8.17, tied=True, logit_scale=1 / 16),
}


def find_model(name: str) -> Model:
    """The model of that name.

    Raises:
        ValueError: naming the models there are.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name]


def own_shape(hidden: int, vocab: int, layers: int, parameters: float | None) -> Model:
    """A model of these sizes. `parameters`, in billions, are by default those of a dense decoder: 12 H^2 a layer, and
    embedding and LM head apart."""
    dense = (12 * layers * hidden**2 + 2 * vocab * hidden) / 1e9
    return Model(hidden, vocab, layers, dense if parameters is None else parameters)
