"""Map the finish reasons of all servers to `stop`, `length` or `content_filter`.

`length` means that the response is incomplete because of a limit, an error or a tool call.

Sources: the API references of OpenAI (chat completions, responses), Anthropic, Gemini, Amazon Bedrock, DashScope,
Mistral, DeepSeek, Zhipu and Cohere, and the finish reasons of vLLM, SGLang, TGI and Ollama.
"""

import re

# Values in lower case. Gemini and Bedrock have many reasons for filtered content, and all of them suppress the answer.
_WORDS = {
    "stop": "stop end_turn stop_sequence stop_token eos eos_token endoftext complete completed finish finished "
    "stop_criteria_met",
    "length": "length max_tokens max_output_tokens max_length token_limit model_length model_context_window_exceeded "
    "incomplete in_progress queued abort aborted cancelled canceled user_cancel error error_toxic error_limit "
    "network_error failed timeout load unload "
    "insufficient_system_resource other pause_turn tool_call tool_calls tool_use function_call "
    "malformed_function_call unexpected_tool_call too_many_tool_calls malformed_tool_use malformed_model_output "
    "malformed_response missing_thought_signature no_image image_other repetition",
    "content_filter": "content_filter content_filtered refusal safety recitation language blocklist "
    "prohibited_content spii sensitive guardrail_intervened image_safety image_prohibited_content image_recitation",
}
FINISH_REASONS = {word: reason for reason, words in _WORDS.items() for word in words.split()}
# Words that carry no information.
_UNKNOWN = ("", "null", "none", "unknown", "unspecified")
_NEXT_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def finish_reason_of(word: str | None) -> str | None:
    """Return `stop`, `length` or `content_filter`; None if the word carries no information or is not known."""
    return FINISH_REASONS.get(_plain(word))


def is_known(word: str | None) -> bool:
    """Return whether a server's word is known, including words that carry no information."""
    return _plain(word) in FINISH_REASONS or _plain(word) in _UNKNOWN


def _plain(word: str | None) -> str:
    """Normalize a word: `FinishReason.MAX_TOKENS`, `FINISH_REASON_MAX_TOKENS`, `maxTokens` become `max_tokens`."""
    last = _NEXT_WORD.sub("_", (word or "").strip().rpartition(".")[2])
    return last.casefold().replace("-", "_").replace(" ", "_").removeprefix("finish_reason_")
