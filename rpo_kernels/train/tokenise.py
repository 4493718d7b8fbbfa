"""From groups of text to token ids: prompt and responses apart, so that all responses share the prompt's tokens."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .data import DataError, Group, Messages, as_messages

# Used, with a warning, for chat messages where the tokenizer brings no template of its own.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BATCH = 256  # groups handed to the tokenizer at once, which works on them in its own threads
TokenIds = list[int]
logger = logging.get_logger(__name__)


def tokenise(
    groups: Iterable[Group], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Group, TokenIds, list[TokenIds]]]:
    """Each group with its prompt's and its responses' token ids, in order and uncut.

    A response given as a string ends with the tokenizer's end-of-sequence token; messages end as the template says.

    Raises:
        DataError: naming the group, if the chat template fails, leaves something out or does not render the prompt as
            the start of a conversation, or if an empty prompt has no token to stand for it.
    """
    groups = iter(groups)
    while batch := list(islice(groups, BATCH)):
        strings = _encode_strings([group for group in batch if isinstance(group.prompt, str)], tokenizer)
        messages = _encode_messages([group for group in batch if not isinstance(group.prompt, str)], tokenizer)
        for group in batch:
            yield group, *next(strings if isinstance(group.prompt, str) else messages)


def _encode_strings(
    groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[TokenIds, list[TokenIds]]]:
    if not groups:
        return
    eos = tokenizer.eos_token_id
    prompts = _ids(tokenizer, [str(group.prompt) for group in groups], add_special_tokens=True)
    responses = iter(_ids(tokenizer, [str(text) for group in groups for text in group.responses]))
    for group, prompt in zip(groups, prompts, strict=True):
        if prompt and prompt[-1] == eos:
            prompt = prompt[:-1]
        if not prompt:
            # Something must stand before the first response token for it to be predicted from.
            first = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            if first is None:
                raise DataError(
                    f"{group.source}: the prompt is empty and the tokenizer has neither a BOS nor an EOS token, so "
                    "nothing stands before the first token of a response"
                )
            prompt = [first]
        own = [next(responses) for _ in group.responses]
        yield prompt, [ids if eos is None else [*ids, eos] for ids in own]


def _encode_messages(
    groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[TokenIds, list[TokenIds]]]:
    if not groups:
        return
    if tokenizer.chat_template is None:
        logger.warning_once("The tokenizer has no chat template: messages are rendered as 'role: content' lines.")
    texts = [text for group in groups for text in _rendered(group, tokenizer)]
    ids = iter(_ids(tokenizer, texts))
    for group in groups:
        yield next(ids), [next(ids) for _ in group.responses]


def _rendered(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt and, without it, the responses as the chat template renders them."""
    context = as_messages(group.prompt, "user")
    prompt = _render(group, tokenizer, context, add_generation_prompt=True)
    conversations = [context + as_messages(response, "assistant") for response in group.responses]
    texts = [_render(group, tokenizer, messages) for messages in conversations]
    for text in texts:
        if not text.startswith(prompt):
            raise DataError(
                f"{group.source}: the chat template does not render a conversation so that it starts with its prompt; "
                f"prompt {prompt[-80:]!r}, conversation {text[: len(prompt)][-80:]!r}"
            )
    for messages, text in zip(conversations, texts, strict=True):
        _check_nothing_left_out(group, tokenizer, messages, text)
    return [prompt, *(text[len(prompt) :] for text in texts)]


def _check_nothing_left_out(group: Group, tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> None:
    """Tool calls and tools that a template passes over would make different responses the same text."""
    if any("tool_calls" in message for message in messages):
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if _render(group, tokenizer, bare) == text:
            raise DataError(f"{group.source}: has tool_calls, which the tokenizer's chat template does not render")
    if group.tools and _render(group, tokenizer, messages, tools=None) == text:
        raise DataError(f"{group.source}: has tools, which the tokenizer's chat template does not render")


def _render(group: Group, tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> str:
    template = None if tokenizer.chat_template is not None else PLAIN_CHAT_TEMPLATE
    options = {"tools": group.tools, "chat_template": template, "tokenize": False, **options}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{group.source}: the chat template fails on this conversation: {error}") from error


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = False) -> list[TokenIds]:
    options = dict(return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]  # type: ignore[arg-type, return-value]
